// One step of selection `evict`: what there is to keep, and what is written.
#pragma once

#include <vector>

#include "cpu/packed_step.h"

namespace effc {

// Tensors of the cache.
enum EvictTensor : size_t { kKeptKey, kKeptValue, kKeptToken, kLastQuery };

class EvictStep : public PackedStep {
 public:
  // Throws Error when a cache without tokens is to hold some.
  EvictStep(const AttentionForm& form, const SelectionSpec& spec, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past);

  bool Overflows(int64_t row) const { return rows_[row].candidates() > spec.places(); }
  // By place: 1 + the number of the token there, 0 for none.
  int32_t* Tokens(const CacheTensor& tensor, int64_t row, int64_t head) const {
    return reinterpret_cast<int32_t*>(tensor.data) + (row * form.kv_heads + head) * spec.places();
  }
  // Number of candidate c: the tokens of a head by place, then the fresh ones.
  int64_t Candidate(int64_t row, int64_t head, int64_t c) const {
    const PackedRow& r = rows_[row];
    if (c < r.kept) return Tokens(past[kKeptToken], row, head)[c] - 1;
    return Token(row, r.fresh[c - r.kept]);
  }

  // Adds to the log of reads, which counts tokens of the text.
  void LogReads() const;
};

class EvictVotes;

// The cache after a step: all candidates or, in a row that overflows, those that the votes choose.
void WriteKept(const Kernels& kernels, const EvictStep& step, const NewTokens& tokens,
               const EvictVotes& votes, const std::vector<CacheTensor>& present,
               const ParallelFunction& parallel);

}  // namespace effc
