// The kernels behind the custom ops CodedMatMul, CodedGather and DecodeWeight.
#pragma once

#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/weight.h"
#include "ort/node_kernel.h"

namespace effc::ort {

// What the three kernels share: the weight of a node.
class WeightKernel : public NodeKernel {
 public:
  // Reads attributes and weight tensors; the weight starts at input `first`. Throws Error.
  WeightKernel(OrtApi* table, const OrtKernelInfo* info, const char* op, size_t first);

 protected:
  float* Output(OrtKernelContext* context, const std::vector<int64_t>& dims) const {
    return static_cast<float*>(NodeKernel::Output(context, 0, dims));
  }

  Spec spec_;
  const Kernels* kernels_;
  std::shared_ptr<const RuntimeWeight> weight_;
};

// y = x * transposed weight.
class MatMulKernel : public WeightKernel {
 public:
  static constexpr const char* kName = "CodedMatMul";
  MatMulKernel(OrtApi* table, const OrtKernelInfo* info) : WeightKernel(table, info, kName, 1) {}
  void Compute(OrtKernelContext* context) const;

 private:
  void Multiply(const OrtKernelContext* context, const float* x, int64_t m, float* y) const;
  int64_t Grain(int64_t m) const;  // weight rows in one task
};

// Chosen rows of the weight, widened.
class GatherKernel : public WeightKernel {
 public:
  static constexpr const char* kName = "CodedGather";
  GatherKernel(OrtApi* table, const OrtKernelInfo* info) : WeightKernel(table, info, kName, 1) {}
  void Compute(OrtKernelContext* context) const;
};

// The whole weight, widened.
class DecodeKernel : public WeightKernel {
 public:
  static constexpr const char* kName = "DecodeWeight";
  DecodeKernel(OrtApi* table, const OrtKernelInfo* info) : WeightKernel(table, info, kName, 0) {}
  void Compute(OrtKernelContext* context) const;
};

}  // namespace effc::ort
