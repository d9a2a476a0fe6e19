#include "cpu/page_bounds.h"

#include <cmath>
#include <limits>

namespace effc {

bool HasBounds(const PageSpec& spec) {
  const bool first = spec.salient == 0 || spec.key_bits[0] < 16;
  const bool second = spec.salient == spec.page || spec.key_bits[1] < 16;
  return spec.key_scheme == KeyScheme::kChannel && first && second;
}

void PageBounds::Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t begin,
                       int64_t end, float* scores, int64_t stride) const {
  for (int64_t i = 0; i < m; ++i) {
    std::fill(scores + i * stride + begin, scores + i * stride + end,
              -std::numeric_limits<float>::infinity());
  }
  const uint8_t* const pages = step_.Page(step_.past[kPages], row, head, begin);
  for (int c = 0; c < 2; ++c) {
    if (step_.layout.tokens[c] == 0) continue;
    RaisePanel(step_.layout.keys[c], pages, queries, m, end - begin, scores + begin, stride);
  }
}

// Keys of a channel are from minimum to minimum + scale * levels, so the score of a group is the
// product of the parameters, which follow each other, with (q + reach |q|) / 2 * levels and q.
void PageBounds::RaisePanel(const PanelLayout& panel, const uint8_t* pages, const float* queries,
                            int64_t m, int64_t count, float* scores, int64_t stride) const {
  const int64_t d = panel.rows;
  const int64_t groups = panel.groups;
  const int64_t width = 2 * panel.parameters;
  const int64_t padded = PaddedRow(width);
  const auto levels = static_cast<float>((1 << panel.bits) - 1);
  float* const folded = ThreadFloats(kPageQueries, m * padded);
  float* const products = ThreadFloats(kPageRows, m * count);
  const int64_t bytes = step_.layout.bytes;
  const TokenRows rows{pages + panel.unit + sizeof(float), Type::kFloat16,
                       bytes / static_cast<int64_t>(sizeof(uint16_t))};
  for (int64_t group = 0; group < groups; ++group) {
    std::fill(folded, folded + m * padded, 0.0f);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < d; ++j) {
        const float q = queries[i * PaddedRow(d) + j];
        folded[i * padded + j * groups + group] = 0.5f * (q + spec_.reach * std::fabs(q)) * levels;
        folded[i * padded + panel.parameters + j * groups + group] = q;
      }
    }
    kernels_.attention->scores(folded, padded, m, rows, count, width, products, count, 0);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t p = 0; p < count; ++p) {
        const float unit = *reinterpret_cast<const float*>(pages + p * bytes + panel.unit);
        float& score = scores[i * stride + p];
        score = std::max(score, products[i * count + p] * unit);
      }
    }
  }
}

}  // namespace effc
