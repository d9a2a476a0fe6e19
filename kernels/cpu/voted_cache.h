// Storage `dense` with selection `topk`, and what it remembers of its choice.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class VotedStorage : public DenseStorage {
 public:
  VotedStorage(const AttentionForm& form, const SelectionSpec& selection)
      : DenseStorage(form, 0), selection_(selection) {}

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  void CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const override;
  std::vector<int64_t> Present(size_t index, const std::vector<int64_t>& past,
                               int64_t total) const override;
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  SelectionSpec selection_;
};

}  // namespace effc
