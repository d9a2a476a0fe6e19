#include "cpu/sink_cache.h"

#include "cpu/dense_step.h"
#include "cpu/far_sinks.h"

namespace effc {
namespace {

constexpr size_t kSinks = 2;  // the tensors after keys and values

}  // namespace

SinkStorage::SinkStorage(const AttentionForm& form, int64_t ring, const SelectionSpec& selection)
    : DenseStorage(form, ring), selection_(selection) {
  if (ring == 0) throw Error("selection 'window' needs a ring");
  if (!form.causal) throw Error("selection 'window' needs causal attention");
  if (far_positions() > 0 && form.rotary == Rotary::kNone) {
    throw Error("sinks are moved by rotation only; give rotary, or select_positions 'keep'");
  }
}

std::vector<CacheTensorForm> SinkStorage::Tensors(int64_t batch) const {
  std::vector<CacheTensorForm> forms = DenseStorage::Tensors(batch);
  const std::vector<Type> types = forms[0].types;
  const int64_t sinks = selection_.sinks;
  forms.push_back({"past sink_key", types, {batch, form_.kv_heads, sinks, form_.head_size}});
  forms.push_back({"past sink_value", types, {batch, form_.kv_heads, sinks, form_.value_size}});
  return forms;
}

void SinkStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                       const std::vector<CacheTensor>& past,
                       const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                       float* y) const {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  const NewTokens tokens(form_, operands, parallel);
  for (int64_t at = 0; at < operands.batch * form_.kv_heads; ++at) {
    WriteSinks(kernels, form_, operands, tokens, selection_, &past[kSinks], &present[kSinks],
               at / form_.kv_heads, at % form_.kv_heads);
  }
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  const FarSinks sinks(form_, operands, tokens, selection_, present[kSinks], present[kSinks + 1]);
  Attend(kernels, form_, operands, tokens, store, {nullptr, &sinks}, parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
}

}  // namespace effc
