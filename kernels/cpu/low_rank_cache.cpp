#include "cpu/low_rank_cache.h"

#include "cpu/dense_step.h"
#include "cpu/low_rank.h"

namespace effc {

void LowRankStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                          const std::vector<CacheTensor>& past,
                          const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                          float* y) const {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  CheckLowRank(form_, operands);
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore rest(operands, tokens, past[0], past[1], ring_);
  const LowRankKeys keys(kernels, form_, operands, parallel);
  const LowRankStore store(form_, operands, keys, rest);
  const ChosenSlots chosen = Choose(kernels, operands, tokens, parallel);
  Attend(kernels, form_, operands, tokens, store, {&chosen}, parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
}

// Among the chunks of the prefix; what follows them counts as recent.
ChosenSlots LowRankStorage::Choose(const Kernels& kernels, const AttentionOperands& operands,
                                   const NewTokens& tokens,
                                   const ParallelFunction& parallel) const {
  if (operands.low_rank.count == 0) return {};
  SelectionSpec spec = selection_;
  spec.recent = operands.past() - operands.low_rank.count;
  const LandmarkBounds bounds(kernels, form_, operands.low_rank);
  return ChooseSlots(kernels, form_, operands, tokens, spec, bounds, parallel);
}

}  // namespace effc
