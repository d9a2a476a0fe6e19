#include "cpu/retain_cache.h"

#include <string>

#include "cpu/retain_step.h"

namespace effc {

RetainStorage::RetainStorage(const AttentionForm& form, int64_t places,
                             const SelectionSpec& selection)
    : DenseStorage(form, places), selection_(selection) {
  if (places != selection.budget) {
    throw Error("selection 'retain' needs a ring of select_budget places, which is " +
                std::to_string(selection.budget) + "; it is " + std::to_string(places));
  }
  if (!form.causal) throw Error("selection 'retain' needs causal attention");
  if (form.window > 0) throw Error("a selection takes no window");
  if (form.rotary == Rotary::kNone) {
    throw Error("selection 'retain' turns keys to their places; give rotary");
  }
}

std::vector<CacheTensorForm> RetainStorage::Tensors(int64_t batch) const {
  std::vector<CacheTensorForm> forms = DenseStorage::Tensors(batch);
  forms.push_back({"past token", {Type::kInt32}, {batch, ring_}});
  return forms;
}

void RetainStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                         const std::vector<CacheTensor>& past,
                         const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                         float* y) const {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  const RetainStep step(form_, selection_, operands, past);
  MakeRoom(step, present, parallel);
  const NewTokens tokens(form_, step.packed(), parallel);
  const PlaceStore store(kernels, step, tokens, present);
  Reads reads;
  reads.packed = true;
  step.LogReads();
  Attend(kernels, form_, step.packed(), tokens, store, reads, parallel, y);
  AppendTokens(kernels, step, tokens, present, parallel);
}

}  // namespace effc
