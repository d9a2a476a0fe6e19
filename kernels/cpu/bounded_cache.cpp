#include "cpu/bounded_cache.h"

#include <algorithm>
#include <string>

#include "cpu/dense_bounds.h"
#include "cpu/dense_step.h"

namespace effc {
namespace {

constexpr size_t kBounds = 2;  // the tensor after keys and values

}  // namespace

std::vector<CacheTensorForm> BoundedStorage::Tensors(int64_t batch) const {
  std::vector<CacheTensorForm> forms = DenseStorage::Tensors(batch);
  const int64_t width = selection_.by_mean() ? form_.head_size : 2 * form_.head_size;
  forms.push_back({selection_.by_mean() ? "past means" : "past bounds",
                   forms[0].types,
                   {batch, form_.kv_heads, -1, width}});
  return forms;
}

void BoundedStorage::CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const {
  DenseStorage::CheckPast(past, tokens);
  const int64_t needed = tokens / selection_.block;
  if (past[kBounds].dims[2] >= needed) return;
  throw Error("the past has " + std::to_string(past[kBounds].dims[2]) +
              " blocks, but `valid` counts " + std::to_string(tokens) +
              " past tokens, which need " + std::to_string(needed));
}

std::vector<int64_t> BoundedStorage::Present(size_t index, const std::vector<int64_t>& past,
                                             int64_t total) const {
  if (index < kBounds) return DenseStorage::Present(index, past, total);
  std::vector<int64_t> dims = past;
  dims[2] = past[2] < 0 || total < 0 ? -1 : std::max(past[2], total / selection_.block);
  return dims;
}

void BoundedStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                          const std::vector<CacheTensor>& past,
                          const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                          float* y) const {
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  const DenseBounds bounds(kernels, form_, selection_, past[kBounds]);
  const ChosenSlots chosen =
      ChooseSlots(kernels, form_, operands, tokens, selection_, bounds, parallel);
  Attend(kernels, form_, operands, tokens, store, {&chosen}, parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
  bool writes = past[kBounds].data != present[kBounds].data;
  for (int64_t row = 0; row < operands.batch; ++row) {
    const int64_t start = tokens.Start(row);
    writes = writes || BoundedBlocks(selection_, operands.total - start) >
                           BoundedBlocks(selection_, operands.past() - start);
  }
  if (!writes) return;  // most steps of one token complete no block
  parallel(operands.batch * form_.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / form_.kv_heads;
      WriteBounds(kernels, operands, tokens.Start(row), selection_, present[0], past[kBounds],
                  present[kBounds], row, at % form_.kv_heads);
    }
  });
}

}  // namespace effc
