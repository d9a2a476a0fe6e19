// Weights of custom-op nodes, one copy for all nodes that read the same initializers.
#pragma once

#include <memory>
#include <vector>

#include "cpu/weight.h"

namespace effc::ort {

// Checks the tensors and returns the weight in a layout that the kernels run: huffman is
// transcoded, the others are used where they lie. The tensors must outlive the result, which
// another caller with the same tensors shares while it is alive.
std::shared_ptr<const RuntimeWeight> SharedWeight(const Spec& spec, Layout layout,
                                                  const std::vector<Tensor>& tensors);

// Weights that kernels of open sessions hold now.
int64_t LiveWeights();

}  // namespace effc::ort
