// Storage `dense` of which every query reads a fixed pattern, for selection `stride`.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class StrideStorage : public DenseStorage {
 public:
  // Throws Error for a form that the selection has not.
  StrideStorage(const AttentionForm& form, int64_t ring, const SelectionSpec& selection);

  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  SelectionSpec selection_;
};

}  // namespace effc
