// The kernels behind the custom ops CodedMatMul, CodedGather and DecodeWeight.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/weight.h"
#include "ort/ort_abi.h"

namespace effc::ort {

// What the three kernels share: the weight of a node, and errors that name the node.
class WeightKernel {
 public:
  // Reads attributes and weight tensors; the weight starts at input `first`. Throws Error.
  WeightKernel(OrtApi* table, const OrtKernelInfo* info, const char* op, size_t first);

  OrtStatus* Fail(int32_t code, const std::string& message) const;

 protected:
  void Check(OrtStatus* status) const { CheckStatus(api_, status); }
  static void CheckStatus(const Api& api, OrtStatus* status);
  Tensor Read(const OrtValue* value, std::vector<int64_t>* dims = nullptr) const;
  Tensor Input(const OrtKernelContext* context, size_t index, std::vector<int64_t>* dims) const;
  float* Output(OrtKernelContext* context, const std::vector<int64_t>& dims) const;
  // Calls fn(begin, end) on ranges of `grain` indices, on the session's threads.
  template <class Fn>
  void Parallel(const OrtKernelContext* context, int64_t count, int64_t grain, Fn&& fn) const;

  Api api_;
  std::string where_;
  Spec spec_;
  const Kernels* kernels_;
  std::shared_ptr<const RuntimeWeight> weight_;

 private:
  int64_t IntAttribute(const OrtKernelInfo* info, const char* name) const;
  std::string StringAttribute(const OrtKernelInfo* info, const char* name) const;
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
