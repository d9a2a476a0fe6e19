#include "cpu/evict_cache.h"

#include <string>

#include "cpu/evict_step.h"
#include "cpu/evict_votes.h"

namespace effc {

EvictStorage::EvictStorage(const AttentionForm& form, int64_t places,
                           const SelectionSpec& selection)
    : DenseStorage(form, places), selection_(selection) {
  if (places != selection.places()) {
    throw Error("selection 'evict' needs a ring of select_budget + select_block places, which is " +
                std::to_string(selection.places()) + "; it is " + std::to_string(places));
  }
  if (!form.causal) throw Error("selection 'evict' needs causal attention");
  if (form.window > 0) throw Error("a selection takes no window");
  if (form.scale < 0) throw Error("a selection takes no negative scale");
}

std::vector<CacheTensorForm> EvictStorage::Tensors(int64_t batch) const {
  std::vector<CacheTensorForm> forms = DenseStorage::Tensors(batch);
  forms.push_back({"past token", {Type::kInt32}, {batch, form_.kv_heads, ring_}});
  const int64_t queries = form_.group() * form_.head_size;
  forms.push_back(
      {"past query", {Type::kFloat}, {batch, form_.kv_heads, selection_.recent, queries}});
  return forms;
}

void EvictStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                        const std::vector<CacheTensor>& past,
                        const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                        float* y) const {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  const EvictStep step(form_, selection_, operands, past);
  const NewTokens tokens(form_, step.packed(), parallel);
  const PackedStore store(step, tokens, past[kKeptKey], past[kKeptValue]);
  Reads reads;
  reads.packed = true;
  step.LogReads();
  Attend(kernels, form_, step.packed(), tokens, store, reads, parallel, y);
  const EvictVotes votes(kernels, step, tokens, store);
  WriteKept(kernels, step, tokens, votes, present, parallel);
}

}  // namespace effc
