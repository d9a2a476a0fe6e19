// The fixed pattern of LongGen (Ge et al. 2024, arXiv 2410.01485): a query reads the first tokens
// of its row, the blocks near it, and of those before every s-th one, another one for every key
// head.
#pragma once

#include "cpu/cached_attention.h"
#include "cpu/selection.h"

namespace effc {

// Slots up to `end`: all queries after them read them, or near ones only.
struct PatternRun {
  int64_t end;
  bool fixed;
};

class StridePattern {
 public:
  StridePattern(const AttentionForm& form, const AttentionOperands& operands,
                const NewTokens& tokens, const SelectionSpec& spec)
      : form_(form), operands_(operands), tokens_(tokens), spec_(spec) {}

  // Whether some query of the step may not read everything before it.
  bool Selects(int64_t row) const;
  // The run of alike slots that `slot` is in, up to `end`.
  PatternRun Run(int64_t row, int64_t head, int64_t slot, int64_t end) const;
  // The first slot of the blocks that are near query i.
  int64_t Near(int64_t row, int64_t i) const;
  // What a step of one token reads.
  ChosenSlots Chosen() const;

 private:
  bool Fixed(int64_t head, int64_t token) const;

  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const SelectionSpec& spec_;
};

}  // namespace effc
