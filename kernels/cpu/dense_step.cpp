#include "cpu/dense_step.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace effc {
namespace {

constexpr int64_t kTaskBytes = 1 << 17;

// New tokens of one row and head, `rows.stride` floats apart.
void WriteNew(const Kernels& kernels, const AttentionOperands& operands, int64_t ring,
              const TokenRows& rows, const CacheTensor& present, int64_t row, int64_t head) {
  const auto* const from = static_cast<const float*>(rows.data);
  const int64_t first = ring > 0 ? std::max<int64_t>(0, operands.seq - ring) : 0;
  for (int64_t i = first; i < operands.seq; ++i) {
    const int64_t slot = operands.past() + i;
    StoreToken(kernels, from + i * rows.stride, present, row, head, ring > 0 ? slot % ring : slot,
               i);
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

TokenRows Place(const CacheTensor& tensor, int64_t row, int64_t head, int64_t place) {
  const int64_t size = tensor.dims[3];
  const int64_t at = ((row * tensor.dims[1] + head) * tensor.dims[2] + place) * size;
  return {tensor.data + at * ElementBytes(tensor.type), tensor.type, size};
}

void StoreToken(const Kernels& kernels, const float* from, const CacheTensor& tensor, int64_t row,
                int64_t head, int64_t place, int64_t token) {
  void* const out = const_cast<void*>(Place(tensor, row, head, place).data);
  if (kernels.attention->narrow(from, tensor.dims[3], tensor.type, out)) return;
  throw Error("a key or value of row " + std::to_string(row) + ", head " + std::to_string(head) +
              ", token " + std::to_string(token) +
              " is too large for the 16-bit type of the cache; use a float32 cache");
}

int64_t DenseStore::BlockBegin(int64_t, int64_t slot) const { return slot; }

int64_t DenseStore::BlockEnd(int64_t, int64_t begin, int64_t end) const {
  return std::min(end, begin + kBlockTokens);
}

TokenSpan DenseStore::Run(int64_t row, int64_t head, int64_t slot, int64_t end) const {
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

void WriteDense(const Kernels& kernels, const AttentionForm& form,
                const AttentionOperands& operands, const NewTokens& tokens, int64_t ring,
                const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
                const ParallelFunction& parallel) {
  const int64_t old = ring > 0 ? ring : operands.past();
  int64_t bytes = 1;
  for (size_t i = 0; i < 2; ++i) {
    const bool copies = past[i].data != present[i].data;
    bytes += (operands.seq + (copies ? present[i].dims[2] : 0)) * present[i].dims[3] * 4;
  }
  parallel(operands.batch * form.kv_heads, std::max<int64_t>(1, kTaskBytes / bytes),
           [&](int64_t begin, int64_t end) {
             for (int64_t at = begin; at < end; ++at) {
               const int64_t row = at / form.kv_heads;
               const int64_t head = at % form.kv_heads;
               for (size_t i = 0; i < 2; ++i) {
                 if (past[i].data != present[i].data) CopyOld(past[i], present[i], old, row, head);
                 if (operands.seq == 0) continue;
                 WriteNew(kernels, operands, ring,
                          i == 0 ? tokens.Keys(row, head, 0) : tokens.Values(row, head, 0),
                          present[i], row, head);
               }
             }
           });
}

}  // namespace effc
