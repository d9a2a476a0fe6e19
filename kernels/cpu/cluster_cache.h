// Storage `dense` with the last queries beside it, for selection `clusters`.
#pragma once

#include "cpu/dense_cache.h"
#include "cpu/selection.h"

namespace effc {

class ClusterStorage : public DenseStorage {
 public:
  ClusterStorage(const AttentionForm& form, const SelectionSpec& selection)
      : DenseStorage(form, 0), selection_(selection) {}

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  std::vector<int64_t> Present(size_t index, const std::vector<int64_t>& past,
                               int64_t total) const override;
  bool has_clusters() const override { return true; }
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  void WriteQueries(const AttentionOperands& operands, const NewTokens& tokens,
                    const CacheTensor& past, const CacheTensor& present, int64_t row,
                    int64_t head) const;

  SelectionSpec selection_;
};

}  // namespace effc
