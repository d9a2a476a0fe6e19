#include "cpu/low_rank.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace effc {
namespace {

int64_t PaddedPanel(int64_t elements) {
  return (elements + kPanelLanes - 1) / kPanelLanes * kPanelLanes;
}

// Chunks of a head that keep their keys, ascending.
std::span<const int32_t> Outliers(const LowRankTokens& prefix, int64_t head) {
  return {prefix.outliers + head * prefix.outlier_count, static_cast<size_t>(prefix.outlier_count)};
}

void CheckOutliers(const LowRankTokens& prefix, int64_t head) {
  int64_t least = 0;
  for (const int32_t chunk : Outliers(prefix, head)) {
    if (chunk < least || chunk >= prefix.chunks) {
      throw Error("outlier " + std::to_string(chunk) + " of head " + std::to_string(head) +
                  " must be from " + std::to_string(least) + " to " +
                  std::to_string(prefix.chunks - 1) + "; is it of another prefix?");
    }
    least = chunk + 1;
  }
}

}  // namespace

void CheckLowRank(const AttentionForm& form, const AttentionOperands& operands) {
  const LowRankTokens& prefix = operands.low_rank;
  if (prefix.count > operands.past()) {
    throw Error("the prefix has " + std::to_string(prefix.count) + " tokens, but `valid` counts " +
                std::to_string(operands.past()) + " past tokens");
  }
  if (prefix.count != prefix.chunks * prefix.chunk) {
    throw Error("the prefix has " + std::to_string(prefix.count) + " tokens, but " +
                std::to_string(prefix.chunks) + " chunks of " + std::to_string(prefix.chunk));
  }
  if (form.rotary != Rotary::kNone && prefix.count > operands.far_positions) {
    throw Error("the prefix has " + std::to_string(prefix.count) +
                " tokens, but there are angles of " + std::to_string(operands.far_positions) +
                " positions");
  }
  for (int64_t head = 0; head < form.kv_heads; ++head) CheckOutliers(prefix, head);
  for (int64_t row = 0; row < operands.batch && prefix.count > 0; ++row) {
    if (std::memchr(operands.valid + row * operands.total, 0, prefix.count) == nullptr) continue;
    throw Error("row " + std::to_string(row) +
                " hides a token of the prefix, which takes no padding");
  }
}

LowRankKeys::LowRankKeys(const Kernels& kernels, const AttentionForm& form,
                         const AttentionOperands& operands, const ParallelFunction& parallel)
    : pieces_(*kernels.attention),
      form_(form),
      operands_(operands),
      stride_(PaddedPanel(form.head_size)),
      head_floats_(stride_ * operands.low_rank.rank) {
  const LowRankTokens& prefix = operands.low_rank;
  const int64_t d = form.head_size;
  if (prefix.count == 0) return;
  panels_ = ThreadFloats(kBases, form.kv_heads * head_floats_);
  parallel(form.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const char* const basis = prefix.basis + head * d * prefix.rank * ElementBytes(prefix.type);
      pieces_.transpose({basis, prefix.type, prefix.rank}, d, prefix.rank, 0,
                        panels_ + head * head_floats_);
    }
  });
}

TokenRows LowRankKeys::Rebuild(int64_t head, int64_t begin, int64_t count) const {
  const int64_t rank = operands_.low_rank.rank;
  float* const rows = ThreadFloats(kRebuiltKeys, kBlockTokens * stride_);
  pieces_.panel_scores(Coefficients(begin, count), PaddedRow(rank), count,
                       panels_ + head * head_floats_, form_.head_size, rank, rows, stride_);
  return Rotate(rows, begin, count);
}

// Rows of the first matrix, PaddedRow(rank) apart and zero-padded.
const float* LowRankKeys::Coefficients(int64_t begin, int64_t count) const {
  const LowRankTokens& prefix = operands_.low_rank;
  const int64_t rank = prefix.rank;
  const int64_t width = PaddedRow(rank);
  float* const out = ThreadFloats(kCoefficients, kBlockTokens * width);
  const char* const from = prefix.tokens + begin * rank * ElementBytes(prefix.type);
  if (rank == width) {
    pieces_.widen(from, prefix.type, count * rank, out);
    return out;
  }
  std::fill(out, out + count * width, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    pieces_.widen(from + t * rank * ElementBytes(prefix.type), prefix.type, rank, out + t * width);
  }
  return out;
}

TokenRows LowRankKeys::Rotate(float* rows, int64_t begin, int64_t count) const {
  if (form_.rotary == Rotary::kNone) return {rows, Type::kFloat, stride_};
  const int64_t half = form_.rotary_size / 2;
  const float* const cosines = operands_.far_cosine + begin * half;
  const float* const sines = operands_.far_sine + begin * half;
  if (form_.rotary == Rotary::kHalf && stride_ == form_.head_size) {
    float* const turned = ThreadFloats(kTurnedKeys, kBlockTokens * stride_);
    pieces_.turn_halves({rows, Type::kFloat, stride_}, count, stride_, cosines, sines, half,
                        turned);
    return {turned, Type::kFloat, stride_};
  }
  for (int64_t t = 0; t < count; ++t) {
    RotateRow(form_, cosines + t * half, sines + t * half, rows + t * stride_);
  }
  return {rows, Type::kFloat, stride_};
}

int64_t LowRankStore::BlockBegin(int64_t row, int64_t slot) const {
  return slot < prefix_.count ? slot : rest_.BlockBegin(row, slot);
}

int64_t LowRankStore::BlockEnd(int64_t row, int64_t begin, int64_t end) const {
  if (begin >= prefix_.count) return rest_.BlockEnd(row, begin, end);
  return std::min({end, prefix_.count, begin + kBlockTokens});
}

TokenSpan LowRankStore::Run(int64_t row, int64_t head, int64_t slot, int64_t end) const {
  if (slot >= prefix_.count) return rest_.Run(row, head, slot, end);
  const int64_t bytes = ElementBytes(prefix_.type);
  const int64_t d = form_.head_size;
  const int64_t e = form_.value_size;
  const char* const values = prefix_.values + (head * prefix_.count + slot) * e * bytes;
  const std::span<const int32_t> outliers = Outliers(prefix_, head);
  const int64_t chunk = slot / prefix_.chunk;
  const auto next = std::lower_bound(outliers.begin(), outliers.end(), chunk);
  const char* keys = nullptr;  // rebuilt when they are asked for
  int64_t last = prefix_.count;
  if (next != outliers.end()) last = *next * prefix_.chunk;
  if (next != outliers.end() && *next == chunk) {
    last += prefix_.chunk;
    const int64_t at = head * prefix_.outlier_count + (next - outliers.begin());
    keys = prefix_.outlier_keys + (at * prefix_.chunk + slot % prefix_.chunk) * d * bytes;
  }
  return {std::min(end, last) - slot, {keys, prefix_.type, d}, {values, prefix_.type, e}, nullptr};
}

TokenRows LowRankStore::Keys(int64_t row, int64_t head, int64_t slot, const TokenSpan& run) const {
  if (slot >= prefix_.count) return rest_.Keys(row, head, slot, run);
  return run.keys.data != nullptr ? run.keys : keys_.Rebuild(head, slot, run.count);
}

void LandmarkBounds::Score(int64_t, int64_t head, const float* queries, int64_t m, int64_t begin,
                           int64_t end, float* scores, int64_t stride) const {
  const int64_t d = form_.head_size;
  const char* const rows =
      prefix_.landmarks + (head * prefix_.chunks + begin) * d * ElementBytes(prefix_.type);
  pieces_.scores(queries, PaddedRow(d), m, {rows, prefix_.type, d}, end - begin, d, scores + begin,
                 stride, 0);
}

std::span<const int32_t> LandmarkBounds::Always(int64_t head) const {
  return Outliers(prefix_, head);
}

}  // namespace effc
