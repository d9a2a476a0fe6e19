#include "cpu/dense_bounds.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace effc {
namespace {

char* BoundsOf(const CacheTensor& tensor, int64_t row, int64_t head, int64_t block) {
  const int64_t at = ((row * tensor.dims[1] + head) * tensor.dims[2] + block) * tensor.dims[3];
  return tensor.data + at * ElementBytes(tensor.type);
}

constexpr int64_t kStreamBytes = 4096;  // how far ahead rows are fetched

// Sums, or minima and maxima, of no keys.
void Open(const SelectionSpec& spec, std::vector<float>& bounds) {
  const auto middle = bounds.begin() + static_cast<int64_t>(bounds.size()) / 2;
  if (spec.by_mean()) return std::fill(bounds.begin(), bounds.end(), 0.0f);
  std::fill(bounds.begin(), middle, std::numeric_limits<float>::infinity());
  std::fill(middle, bounds.end(), -std::numeric_limits<float>::infinity());
}

void Take(const SelectionSpec& spec, const std::vector<float>& key, std::vector<float>& bounds) {
  const size_t d = key.size();
  for (size_t j = 0; j < d; ++j) {
    if (spec.by_mean()) {
      bounds[j] += key[j];
      continue;
    }
    bounds[j] = std::min(bounds[j], key[j]);
    bounds[d + j] = std::max(bounds[d + j], key[j]);
  }
}

}  // namespace

// With middle (minimum + maximum) / 2 and half width (maximum - minimum) / 2 of a channel, the
// score is a product as well: sum of (q - reach |q|) / 2 * minimum + (q + reach |q|) / 2 * maximum.
void DenseBounds::Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t begin,
                        int64_t end, float* scores, int64_t stride) const {
  const int64_t d = form_.head_size;
  const char* const from = BoundsOf(bounds_, row, head, begin);
  if (spec_.by_mean()) {
    return kernels_.attention->scores(queries, PaddedRow(d), m, {from, bounds_.type, d},
                                      end - begin, d, scores + begin, stride, kStreamBytes);
  }
  const int64_t width = PaddedRow(2 * d);
  float* const halves = ThreadFloats(kPageQueries, m * width);
  std::fill(halves, halves + m * width, 0.0f);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const float q = queries[i * PaddedRow(d) + j];
      const float outwards = spec_.reach * std::fabs(q);
      halves[i * width + j] = 0.5f * (q - outwards);
      halves[i * width + d + j] = 0.5f * (q + outwards);
    }
  }
  kernels_.attention->scores(halves, width, m, {from, bounds_.type, 2 * d}, end - begin, 2 * d,
                             scores + begin, stride, kStreamBytes);
}

void WriteBounds(const Kernels& kernels, const AttentionOperands& operands, int64_t start,
                 const SelectionSpec& spec, const CacheTensor& keys, const CacheTensor& past,
                 const CacheTensor& present, int64_t row, int64_t head) {
  const AttentionKernels& pieces = *kernels.attention;
  const int64_t d = keys.dims[3];
  const int64_t old = BoundedBlocks(spec, operands.past() - start);
  const int64_t blocks = BoundedBlocks(spec, operands.total - start);
  if (past.data != present.data) {
    char* const out = BoundsOf(present, row, head, 0);
    char* const unknown = BoundsOf(present, row, head, blocks);
    if (old > 0)
      std::memcpy(out, BoundsOf(past, row, head, 0),
                  BoundsOf(past, row, head, old) - BoundsOf(past, row, head, 0));
    std::memset(unknown, 0, BoundsOf(present, row, head, present.dims[2]) - unknown);
  }
  std::vector<float> key(d), bounds(present.dims[3]);
  const int64_t first = (row * keys.dims[1] + head) * keys.dims[2] + start + spec.sinks;
  for (int64_t b = old; b < blocks; ++b) {
    Open(spec, bounds);
    for (int64_t t = 0; t < spec.block; ++t) {
      const int64_t at = (first + b * spec.block + t) * d;
      pieces.widen(keys.data + at * ElementBytes(keys.type), keys.type, d, key.data());
      Take(spec, key, bounds);
    }
    if (spec.by_mean()) {
      for (float& x : bounds) x /= static_cast<float>(spec.block);
    }
    pieces.narrow(bounds.data(), present.dims[3], present.type, BoundsOf(present, row, head, b));
  }
}

}  // namespace effc
