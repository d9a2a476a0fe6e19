#include "cpu/stride_cache.h"

#include "cpu/dense_step.h"
#include "cpu/stride_pattern.h"

namespace effc {

StrideStorage::StrideStorage(const AttentionForm& form, int64_t ring,
                             const SelectionSpec& selection)
    : DenseStorage(form, ring), selection_(selection) {
  if (ring > 0) throw Error("selection 'stride' takes no ring");
  if (!form.causal) throw Error("selection 'stride' needs causal attention");
  if (form.window > 0) throw Error("a selection takes no window");
}

void StrideStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                         const std::vector<CacheTensor>& past,
                         const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                         float* y) const {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  const StridePattern pattern(form_, operands, tokens, selection_);
  Reads reads;
  ChosenSlots chosen;
  if (operands.seq == 1) {
    chosen = pattern.Chosen();
    reads.chosen = &chosen;
  } else {
    reads.pattern = &pattern;
  }
  Attend(kernels, form_, operands, tokens, store, reads, parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
}

}  // namespace effc
