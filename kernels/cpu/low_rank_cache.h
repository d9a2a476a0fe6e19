// Storage `dense` behind a prefix of low rank, for selection `lowrank`.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

// The places of the prefix are never touched.
class LowRankStorage : public DenseStorage {
 public:
  LowRankStorage(const AttentionForm& form, const SelectionSpec& selection)
      : DenseStorage(form, 0), selection_(selection) {}

  int64_t far_positions() const override { return form_.rotary == Rotary::kNone ? 0 : -1; }
  int64_t low_rank_chunk() const override { return selection_.block; }
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  ChosenSlots Choose(const Kernels& kernels, const AttentionOperands& operands,
                     const NewTokens& tokens, const ParallelFunction& parallel) const;

  SelectionSpec selection_;
};

}  // namespace effc
