// What a step of selection `topk` chose, for later steps with much the same query.
#pragma once

#include <vector>

#include "cpu/cache_storage.h"
#include "cpu/selection.h"

namespace effc {

// Tensors [B, T] of flags by slot, [B, H * D] of the query that chose, and [B, 2] of the tokens the
// row had then (0: nothing is remembered) and of the steps that have used the choice since.
enum ChoiceTensor : size_t { kFlags, kVoter, kAge, kChoiceTensors };

class ChoiceMemory {
 public:
  // `past` and `present` are the tensors from the first of the choice on.
  ChoiceMemory(const AttentionForm& form, const AttentionOperands& operands,
               const NewTokens& tokens, const SelectionSpec& spec, const CacheTensor* past,
               const CacheTensor* present)
      : form_(form),
        operands_(operands),
        tokens_(tokens),
        spec_(spec),
        past_(past),
        present_(present) {}

  static std::vector<CacheTensorForm> Tensors(const AttentionForm& form, int64_t batch);

  // Whether a step of one token may use the choice of a row again.
  bool Holds(int64_t row) const;
  // What it then reads: besides the choice, all tokens that have come since.
  std::vector<SlotRun> Runs(int64_t row) const;
  // Writes `present`: rows that held keep their choice, those of `chosen` get theirs, others none.
  void Write(const std::vector<uint8_t>& held, const ChosenSlots& chosen) const;

 private:
  uint8_t* Flags(const CacheTensor* tensors, int64_t row) const {
    return reinterpret_cast<uint8_t*>(tensors[kFlags].data) + row * tensors[kFlags].dims[1];
  }
  float* Voter(const CacheTensor* tensors, int64_t row) const {
    return reinterpret_cast<float*>(tensors[kVoter].data) + row * tensors[kVoter].dims[1];
  }
  int32_t* Age(const CacheTensor* tensors, int64_t row) const {
    return reinterpret_cast<int32_t*>(tensors[kAge].data) + 2 * row;
  }
  const float* Query(int64_t row) const {
    return operands_.query + row * form_.heads * form_.head_size;  // of a step of one token
  }
  void Remember(int64_t row, const ChosenSlots& chosen) const;

  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const SelectionSpec& spec_;
  const CacheTensor* const past_;
  const CacheTensor* const present_;
};

}  // namespace effc
