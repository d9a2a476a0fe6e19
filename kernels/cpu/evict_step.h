// One step of a cache that keeps some of its tokens: where they lie, and what is written.
//
// Attention runs over packed slots: the tokens that a row has kept, ending where those of the row
// with the most end, then the new tokens.
#pragma once

#include <vector>

#include "cpu/dense_step.h"
#include "cpu/selection.h"

namespace effc {

// Tensors of the cache.
enum EvictTensor : size_t { kKeptKey, kKeptValue, kKeptToken, kLastQuery };

// One row before and after a step. Its tokens are counted from its first valid slot.
struct EvictRow {
  int64_t start;               // slot of token 0
  int64_t old_tokens;          // before the step
  int64_t tokens;              // after it, evicted ones included
  int64_t kept;                // places in use before the step, of every head
  std::vector<int32_t> fresh;  // new tokens that are valid, as indices of the step

  int64_t candidates() const { return kept + static_cast<int64_t>(fresh.size()); }
};

class EvictStep {
 public:
  // Throws Error when a cache without tokens is to hold some.
  EvictStep(const AttentionForm& form, const SelectionSpec& spec, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past);
  EvictStep(const EvictStep&) = delete;

  // The operands over packed slots.
  const AttentionOperands& packed() const { return packed_; }
  const EvictRow& Row(int64_t row) const { return rows_[row]; }
  // The packed slot of place 0.
  int64_t First(int64_t row) const { return packed_.past() - rows_[row].kept; }
  bool Overflows(int64_t row) const { return rows_[row].candidates() > spec.places(); }
  // Number of the row's token that a new token is; negative for padding.
  int64_t Token(int64_t row, int64_t i) const { return operands.past() + i - rows_[row].start; }
  // By place: 1 + the number of the token there, 0 for none.
  int32_t* Tokens(const CacheTensor& tensor, int64_t row, int64_t head) const {
    return reinterpret_cast<int32_t*>(tensor.data) + (row * form.kv_heads + head) * spec.places();
  }
  // Number of candidate c: the tokens of a head by place, then the fresh ones.
  int64_t Candidate(int64_t row, int64_t head, int64_t c) const {
    const EvictRow& r = rows_[row];
    if (c < r.kept) return Tokens(past[kKeptToken], row, head)[c] - 1;
    return Token(row, r.fresh[c - r.kept]);
  }

  // Adds to the log of reads, which counts tokens of the text.
  void LogReads() const;

  const AttentionForm& form;
  const SelectionSpec& spec;
  const AttentionOperands& operands;
  const std::vector<CacheTensor>& past;

 private:
  EvictRow ReadRow(int64_t row) const;

  std::vector<EvictRow> rows_;
  std::vector<uint8_t> valid_;  // of packed slots
  AttentionOperands packed_;
};

// The packed slots.
class KeptStore : public TokenStore {
 public:
  KeptStore(const EvictStep& step, const NewTokens& tokens) : step_(step), tokens_(tokens) {}

  int64_t BlockBegin(int64_t row, int64_t slot) const override;
  int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const override;
  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override;

 private:
  const EvictStep& step_;
  const NewTokens& tokens_;
};

class EvictVotes;

// The cache after a step: all candidates or, in a row that overflows, those that the votes choose.
void WriteKept(const Kernels& kernels, const EvictStep& step, const NewTokens& tokens,
               const EvictVotes& votes, const std::vector<CacheTensor>& present,
               const ParallelFunction& parallel);

}  // namespace effc
