#include "cpu/far_sinks.h"

#include <algorithm>
#include <cstring>

namespace effc {

int64_t FarSinks::Count(int64_t row, int64_t i) const {
  const int64_t start = tokens_.Start(row);
  const int64_t before = operands_.past() + i - form_.window + 1 - start;
  return std::clamp<int64_t>(before, 0, spec_.sinks);
}

const float* FarSinks::Queries(int64_t row, int64_t head, int64_t begin, int64_t end) const {
  if (spec_.positions == FarPositions::kKeep) return tokens_.Query(row, head, begin);
  const int64_t d = form_.head_size;
  const int64_t padded = PaddedRow(d);
  const int64_t group = form_.group();
  const int64_t at = (operands_.far_batch == 1 ? 0 : row) * form_.rotary_size / 2;
  float* const out = ThreadFloats(kFarQueries, (end - begin) * group * padded);
  float* q = out;
  for (int64_t i = begin; i < end; ++i) {
    const float* const token = operands_.query + (row * operands_.seq + i) * form_.heads * d;
    for (int64_t g = 0; g < group; ++g, q += padded) {
      std::memcpy(q, token + (head * group + g) * d, d * sizeof(float));
      RotateRow(form_, operands_.far_cosine + at, operands_.far_sine + at, q);
      std::fill(q + d, q + padded, 0.0f);
    }
  }
  return out;
}

void WriteSinks(const Kernels& kernels, const AttentionForm& form,
                const AttentionOperands& operands, const NewTokens& tokens,
                const SelectionSpec& spec, const CacheTensor* past, const CacheTensor* present,
                int64_t row, int64_t head) {
  const int64_t start = tokens.Start(row);
  const int64_t old = std::clamp<int64_t>(operands.past() - start, 0, spec.sinks);
  const int64_t now = std::clamp<int64_t>(operands.total - start, 0, spec.sinks);
  for (size_t i = 0; i < 2; ++i) {
    if (past[i].data != present[i].data) {
      const int64_t bytes = past[i].dims[3] * ElementBytes(past[i].type);
      char* const to = static_cast<char*>(const_cast<void*>(Place(present[i], row, head, 0).data));
      std::memcpy(to, Place(past[i], row, head, 0).data, spec.sinks * bytes);
    }
    for (int64_t t = old; t < now; ++t) {
      const int64_t token = start + t - operands.past();
      const float* from = static_cast<const float*>(tokens.Values(row, head, token).data);
      if (i == 0 && spec.positions == FarPositions::kCap) {
        from =
            operands.key + ((row * operands.seq + token) * form.kv_heads + head) * form.head_size;
      } else if (i == 0) {
        from = static_cast<const float*>(tokens.Keys(row, head, token).data);
      }
      StoreToken(kernels, from, present[i], row, head, t, token);
    }
  }
}

}  // namespace effc
