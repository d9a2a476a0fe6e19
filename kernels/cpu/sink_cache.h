// Storage `dense` as a ring, with the first tokens of a row beside it, for selection `window`.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class SinkStorage : public DenseStorage {
 public:
  // Throws Error for a form that has no far sinks.
  SinkStorage(const AttentionForm& form, int64_t ring, const SelectionSpec& selection);

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  int64_t far_positions() const override {
    return selection_.positions != FarPositions::kKeep ? 1 : 0;
  }
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  SelectionSpec selection_;
};

}  // namespace effc
