// Storage `dense`: rows of keys and values, slot j at place j or, in a ring, at j mod r.
#pragma once

#include "cpu/cache_storage.h"

namespace effc {

class DenseStorage : public CacheStorage {
 public:
  DenseStorage(const AttentionForm& form, int64_t ring) : form_(form), ring_(ring) {}

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  void CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const override;
  std::vector<int64_t> Present(size_t index, const std::vector<int64_t>& past,
                               int64_t total) const override;
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 protected:
  AttentionForm form_;
  int64_t ring_;
};

}  // namespace effc
