// Storage `dense` with a constant number of places, for selection `evict`: any place holds any
// token.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class EvictStorage : public DenseStorage {
 public:
  // Throws Error for a form, or a number of places, that the selection has not.
  EvictStorage(const AttentionForm& form, int64_t places, const SelectionSpec& selection);

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  SelectionSpec selection_;
};

}  // namespace effc
