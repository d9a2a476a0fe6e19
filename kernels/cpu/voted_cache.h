// Storage `dense` with selection `topk`.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class VotedStorage : public DenseStorage {
 public:
  VotedStorage(const AttentionForm& form, const SelectionSpec& selection)
      : DenseStorage(form, 0), selection_(selection) {}

  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  SelectionSpec selection_;
};

}  // namespace effc
