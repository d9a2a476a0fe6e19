// Which clusters of a prefix a step reads. docs/cached-attention.md, section "Selection".
#pragma once

#include <vector>

#include "cpu/cached_attention.h"
#include "cpu/selection.h"

namespace effc {

// Throws Error for ends that are no runs of the cached tokens, or a row that hides a token of them.
void CheckClusters(const AttentionForm& form, const AttentionOperands& operands);

// Chooses for a step of one new token; a step of several, or without clusters, reads everything.
ChosenSlots ChooseClusters(const Kernels& kernels, const AttentionForm& form,
                           const AttentionOperands& operands, const NewTokens& tokens,
                           const ParallelFunction& parallel);

}  // namespace effc
