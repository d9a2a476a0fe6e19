#include "cpu/dense_cache.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/dense_bounds.h"
#include "cpu/token_store.h"

namespace effc {
namespace {

constexpr int64_t kTaskBytes = 1 << 17;
constexpr size_t kBounds = 2;  // the tensor after keys and values

TokenRows Place(const CacheTensor& tensor, int64_t row, int64_t head, int64_t place) {
  const int64_t size = tensor.dims[3];
  const int64_t at = ((row * tensor.dims[1] + head) * tensor.dims[2] + place) * size;
  return {tensor.data + at * ElementBytes(tensor.type), tensor.type, size};
}

class DenseStore : public TokenStore {
 public:
  DenseStore(const AttentionOperands& operands, const NewTokens& tokens, const CacheTensor& keys,
             const CacheTensor& values, int64_t ring)
      : operands_(operands), tokens_(tokens), keys_(keys), values_(values), ring_(ring) {}

  int64_t BlockBegin(int64_t, int64_t slot) const override { return slot; }

  int64_t BlockEnd(int64_t, int64_t begin, int64_t end) const override {
    return std::min(end, begin + kBlockTokens);
  }

  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override {
    const int64_t past = operands_.past();
    if (slot >= past) {
      const int64_t i = slot - past;
      return {end - slot, tokens_.Keys(row, head, i), tokens_.Values(row, head, i), nullptr};
    }
    const int64_t place = ring_ > 0 ? slot % ring_ : slot;
    int64_t count = std::min(end, past) - slot;
    if (ring_ > 0) count = std::min(count, ring_ - place);
    return {count, Place(keys_, row, head, place), Place(values_, row, head, place), nullptr};
  }

 private:
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const CacheTensor& keys_;
  const CacheTensor& values_;
  const int64_t ring_;
};

// New tokens of one row and head, `rows.stride` floats apart.
void WriteNew(const Kernels& kernels, const AttentionOperands& operands, int64_t ring,
              const TokenRows& rows, const CacheTensor& present, int64_t row, int64_t head) {
  const auto* const from = static_cast<const float*>(rows.data);
  const int64_t first = ring > 0 ? std::max<int64_t>(0, operands.seq - ring) : 0;
  const int64_t size = present.dims[3];
  for (int64_t i = first; i < operands.seq; ++i) {
    const int64_t slot = operands.past() + i;
    const TokenRows to = Place(present, row, head, ring > 0 ? slot % ring : slot);
    void* const out = const_cast<void*>(to.data);
    if (kernels.attention->narrow(from + i * rows.stride, size, present.type, out)) continue;
    throw Error("a key or value of row " + std::to_string(row) + ", head " + std::to_string(head) +
                ", token " + std::to_string(i) +
                " is too large for the 16-bit type of the cache; use a float32 cache");
  }
}

void CopyOld(const CacheTensor& past, const CacheTensor& present, int64_t tokens, int64_t row,
             int64_t head) {
  const int64_t row_bytes = past.dims[3] * ElementBytes(past.type);
  char* const to = static_cast<char*>(const_cast<void*>(Place(present, row, head, 0).data));
  if (tokens > 0) std::memcpy(to, Place(past, row, head, 0).data, tokens * row_bytes);
  std::memset(to + tokens * row_bytes, 0, (present.dims[2] - tokens) * row_bytes);
}

}  // namespace

std::vector<CacheTensorForm> DenseStorage::Tensors(int64_t batch) const {
  const std::vector<Type> types = {Type::kFloat, Type::kFloat16, Type::kBfloat16};
  const int64_t capacity = ring_ > 0 ? ring_ : -1;
  std::vector<CacheTensorForm> forms = {
      {"past key", types, {batch, form_.kv_heads, capacity, form_.head_size}},
      {"past value", types, {batch, form_.kv_heads, capacity, form_.value_size}}};
  if (selection_.selects()) {
    forms.push_back({"past bounds", types, {batch, form_.kv_heads, -1, 2 * form_.head_size}});
  }
  return forms;
}

void DenseStorage::CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const {
  if (ring_ > 0) return;
  for (size_t i = 0; i < past.size(); ++i) {
    const int64_t needed = i < kBounds ? tokens : tokens / selection_.block;
    if (past[i].dims[2] >= needed) continue;
    throw Error("the past has " + std::to_string(past[i].dims[2]) +
                (i < kBounds ? " places" : " bounds") + ", but `valid` counts " +
                std::to_string(tokens) + " past tokens" +
                (i < kBounds ? "" : ", which need " + std::to_string(needed)));
  }
}

std::vector<int64_t> DenseStorage::Present(size_t index, const std::vector<int64_t>& past,
                                           int64_t total) const {
  std::vector<int64_t> dims = past;
  const int64_t tokens = index < kBounds ? 1 : selection_.block;  // of a place
  if (ring_ == 0) dims[2] = past[2] < 0 || total < 0 ? -1 : std::max(past[2], total / tokens);
  return dims;
}

void DenseStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                        const std::vector<CacheTensor>& past,
                        const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                        float* y) const {
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  ChosenSlots chosen;
  if (selection_.selects()) {
    const DenseBounds bounds(kernels, form_, past[kBounds]);
    chosen = ChooseSlots(kernels, form_, operands, tokens, selection_, bounds, parallel);
  }
  Attend(kernels, form_, operands, tokens, store, chosen, parallel, y);
  const int64_t old = ring_ > 0 ? ring_ : operands.past();
  int64_t bytes = 1;
  for (size_t i = 0; i < 2; ++i) {
    const bool copies = past[i].data != present[i].data;
    bytes += (operands.seq + (copies ? present[i].dims[2] : 0)) * present[i].dims[3] * 4;
  }
  parallel(operands.batch * form_.kv_heads, std::max<int64_t>(1, kTaskBytes / bytes),
           [&](int64_t begin, int64_t end) {
             for (int64_t at = begin; at < end; ++at) {
               const int64_t row = at / form_.kv_heads;
               const int64_t head = at % form_.kv_heads;
               for (size_t i = 0; i < 2; ++i) {
                 if (past[i].data != present[i].data) CopyOld(past[i], present[i], old, row, head);
                 if (operands.seq == 0) continue;
                 WriteNew(kernels, operands, ring_,
                          i == 0 ? tokens.Keys(row, head, 0) : tokens.Values(row, head, 0),
                          present[i], row, head);
               }
               if (!selection_.selects()) continue;
               WriteBounds(kernels, operands, tokens.Start(row), selection_, present[0],
                           past[kBounds], present[kBounds], row, head);
             }
           });
}

}  // namespace effc
