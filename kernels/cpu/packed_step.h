// One step of a cache that keeps some tokens of a row, at the first of its places.
//
// Attention runs over packed slots: the tokens that a row has kept, ending where those of the row
// with the most end, then the new tokens.
#pragma once

#include <vector>

#include "cpu/dense_step.h"
#include "cpu/selection.h"

namespace effc {

// One row. Its tokens are counted from its first valid slot.
struct PackedRow {
  int64_t start;               // slot of token 0
  int64_t old_tokens;          // before the step
  int64_t tokens;              // after it, those that left the cache included
  int64_t kept;                // places that attention reads, of every head
  std::vector<int32_t> fresh;  // new tokens that are valid, as indices of the step

  int64_t candidates() const { return kept + static_cast<int64_t>(fresh.size()); }
};

class PackedStep {
 public:
  PackedStep(const PackedStep&) = delete;

  // The operands over packed slots.
  const AttentionOperands& packed() const { return packed_; }
  const PackedRow& Row(int64_t row) const { return rows_[row]; }
  // The packed slot of place 0.
  int64_t First(int64_t row) const { return packed_.past() - rows_[row].kept; }
  // Number of the row's token that a new token is; negative for padding.
  int64_t Token(int64_t row, int64_t i) const { return operands.past() + i - rows_[row].start; }

  const AttentionForm& form;
  const SelectionSpec& spec;
  const AttentionOperands& operands;
  const std::vector<CacheTensor>& past;

 protected:
  // Rows have kept nothing yet.
  PackedStep(const AttentionForm& form, const SelectionSpec& spec,
             const AttentionOperands& operands, const std::vector<CacheTensor>& past);
  ~PackedStep() = default;
  // Places in use, by `numbers`: 1 + the token at each, 0 for none. Throws Error where a row that
  // has tokens has none.
  int64_t CountPlaces(int64_t row, const int32_t* numbers, int64_t places) const;
  // Once it is known what rows have kept.
  void Pack();

  std::vector<PackedRow> rows_;
  AttentionOperands packed_;

 private:
  std::vector<uint8_t> valid_;  // of packed slots
};

// The packed slots, over tensors of keys and values by place.
class PackedStore : public TokenStore {
 public:
  PackedStore(const PackedStep& step, const NewTokens& tokens, const CacheTensor& keys,
              const CacheTensor& values)
      : step_(step), tokens_(tokens), keys_(keys), values_(values) {}

  int64_t BlockBegin(int64_t row, int64_t slot) const override;
  int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const override;
  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override;

 private:
  const PackedStep& step_;
  const NewTokens& tokens_;
  const CacheTensor& keys_;
  const CacheTensor& values_;
};

}  // namespace effc
