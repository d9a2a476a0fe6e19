// Tokens at the start of a row that its queries read beyond their window.
#pragma once

#include "cpu/dense_step.h"
#include "cpu/selection.h"

namespace effc {

// Sinks as they are after a step: [B, K, sinks, D] and [.., E]. Keys are rotated by their own
// position, with FarPositions::kCap not at all.
class FarSinks {
 public:
  FarSinks(const AttentionForm& form, const AttentionOperands& operands, const NewTokens& tokens,
           const SelectionSpec& spec, const CacheTensor& keys, const CacheTensor& values)
      : form_(form),
        operands_(operands),
        tokens_(tokens),
        spec_(spec),
        keys_(keys),
        values_(values) {}

  // Sinks that query i of a row reads beyond its window: the first ones.
  int64_t Count(int64_t row, int64_t i) const;
  TokenRows Keys(int64_t row, int64_t head) const { return Place(keys_, row, head, 0); }
  TokenRows Values(int64_t row, int64_t head) const { return Place(values_, row, head, 0); }
  // Query rows of tokens [begin, end), PaddedRow(D) apart, as they meet the sinks.
  const float* Queries(int64_t row, int64_t head, int64_t begin, int64_t end) const;

 private:
  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const SelectionSpec& spec_;
  const CacheTensor& keys_;
  const CacheTensor& values_;
};

// Sinks of `past`, and those among the new tokens, into `present`; one row and head. A place that
// has no token keeps what it held.
void WriteSinks(const Kernels& kernels, const AttentionForm& form,
                const AttentionOperands& operands, const NewTokens& tokens,
                const SelectionSpec& spec, const CacheTensor* past, const CacheTensor* present,
                int64_t row, int64_t head);

}  // namespace effc
