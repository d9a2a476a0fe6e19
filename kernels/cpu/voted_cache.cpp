#include "cpu/voted_cache.h"

#include "cpu/dense_step.h"
#include "cpu/token_votes.h"

namespace effc {

void VotedStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                        const std::vector<CacheTensor>& past,
                        const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                        float* y) const {
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  const VotedSlots voted =
      VoteForTokens(kernels, form_, operands, tokens, store, selection_, parallel);
  Attend(kernels, form_, operands, tokens, store, voted.reads(), parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
}

}  // namespace effc
