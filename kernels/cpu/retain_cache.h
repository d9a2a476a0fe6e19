// Storage `dense` with a constant number of places, for selection `retain`: the tokens that
// surprised the model most, keys turned to their place whenever they are read.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class RetainStorage : public DenseStorage {
 public:
  // Throws Error for a form, or a number of places, that the selection has not.
  RetainStorage(const AttentionForm& form, int64_t places, const SelectionSpec& selection);

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  int64_t far_positions() const override { return ring_; }
  bool turns_by_place() const override { return true; }
  bool reads_scores() const override { return true; }
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  SelectionSpec selection_;
};

}  // namespace effc
