#include "cpu/dense_cache.h"

#include <algorithm>
#include <string>

#include "cpu/dense_step.h"

namespace effc {

std::vector<CacheTensorForm> DenseStorage::Tensors(int64_t batch) const {
  const std::vector<Type> types = {Type::kFloat, Type::kFloat16, Type::kBfloat16};
  const int64_t capacity = ring_ > 0 ? ring_ : -1;
  return {{"past key", types, {batch, form_.kv_heads, capacity, form_.head_size}},
          {"past value", types, {batch, form_.kv_heads, capacity, form_.value_size}}};
}

void DenseStorage::CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const {
  if (ring_ > 0) return;
  for (size_t i = 0; i < 2; ++i) {
    if (past[i].dims[2] >= tokens) continue;
    throw Error("the past has " + std::to_string(past[i].dims[2]) + " places, but `valid` counts " +
                std::to_string(tokens) + " past tokens");
  }
}

std::vector<int64_t> DenseStorage::Present(size_t, const std::vector<int64_t>& past,
                                           int64_t total) const {
  std::vector<int64_t> dims = past;
  if (ring_ == 0) dims[2] = past[2] < 0 || total < 0 ? -1 : std::max(past[2], total);
  return dims;
}

void DenseStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                        const std::vector<CacheTensor>& past,
                        const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                        float* y) const {
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  Attend(kernels, form_, operands, tokens, store, {}, parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
}

}  // namespace effc
