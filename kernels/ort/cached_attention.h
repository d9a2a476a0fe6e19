// The kernel behind the custom op CachedAttention.
#pragma once

#include <memory>
#include <vector>

#include "cpu/cache_storage.h"
#include "cpu/isa.h"
#include "ort/node_kernel.h"

namespace effc::ort {

class CachedAttentionKernel : public NodeKernel {
 public:
  static constexpr const char* kName = "CachedAttention";
  static constexpr size_t kFirstPast = 7;  // inputs before the cache

  CachedAttentionKernel(OrtApi* table, const OrtKernelInfo* info);
  void Compute(OrtKernelContext* context) const;

 private:
  struct Input {
    Tensor tensor;
    std::vector<int64_t> dims;
  };

  AttentionOperands ReadOperands(const OrtKernelContext* context) const;
  void ReadBias(const OrtKernelContext* context, AttentionOperands& operands) const;
  void ReadFarAngles(const OrtKernelContext* context, AttentionOperands& operands) const;
  void ReadScores(const OrtKernelContext* context, AttentionOperands& operands) const;
  void ReadClusters(const OrtKernelContext* context, AttentionOperands& operands) const;
  void ReadLowRank(const OrtKernelContext* context, AttentionOperands& operands) const;
  void ReadAngles(const OrtKernelContext* context, AttentionOperands& operands) const;
  Input Operand(const OrtKernelContext* context, size_t index, Type type) const;
  const float* Required(const OrtKernelContext* context, size_t index,
                        const std::vector<int64_t>& wanted) const;
  CacheTensor ReadTensor(const OrtKernelContext* context, size_t index,
                         const CacheTensorForm& form) const;
  std::vector<CacheTensor> ReadPast(const OrtKernelContext* context,
                                    const AttentionOperands& operands) const;

  const Kernels* kernels_;
  AttentionForm form_;
  std::unique_ptr<CacheStorage> storage_;
};

}  // namespace effc::ort
