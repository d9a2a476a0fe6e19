// The part of onnxruntime's stable C interface that a custom-op library needs. The function table
// is append-only; every slot used here exists since API version 18 or earlier.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtOpAttr;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

using OrtApi = const void* const;  // a table of function pointers

struct OrtApiBase {
  OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int32_t (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int32_t (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int32_t (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int32_t (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int32_t (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*));
}

namespace effc::ort {

constexpr uint32_t kApiVersion = 18;

enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6 };
enum ElementType : int32_t { kUndefined = 0, kFloat = 1, kInt32 = 6, kInt64 = 7, kBool = 9 };
enum Characteristic : int32_t { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum OpAttrType : int32_t { kInt = 1, kInts = 2, kFloatAttribute = 3, kString = 5 };

// Typed access to the slots in use.
class Api {
 public:
  explicit Api(OrtApi* table) : table_(table) {}

#define EFFC_ORT_SLOT(index, name, result, ...)                                                   \
  template <class... Args>                                                                        \
  result name(Args... args) const {                                                               \
    return reinterpret_cast<result (*)(__VA_ARGS__)>(reinterpret_cast<uintptr_t>(table_[index]))( \
        args...);                                                                                 \
  }
  using Info = OrtTensorTypeAndShapeInfo;
  EFFC_ORT_SLOT(0, CreateStatus, OrtStatus*, int32_t, const char*)
  EFFC_ORT_SLOT(2, GetErrorMessage, const char*, const OrtStatus*)
  EFFC_ORT_SLOT(26, CreateCustomOpDomain, OrtStatus*, const char*, OrtCustomOpDomain**)
  EFFC_ORT_SLOT(27, CustomOpDomainAdd, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*)
  EFFC_ORT_SLOT(28, AddCustomOpDomain, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)
  EFFC_ORT_SLOT(51, GetTensorMutableData, OrtStatus*, OrtValue*, void**)
  EFFC_ORT_SLOT(57, CreateTensorTypeAndShapeInfo, OrtStatus*, Info**)
  EFFC_ORT_SLOT(58, SetTensorElementType, OrtStatus*, Info*, int32_t)
  EFFC_ORT_SLOT(59, SetDimensions, OrtStatus*, Info*, const int64_t*, size_t)
  EFFC_ORT_SLOT(60, GetTensorElementType, OrtStatus*, const Info*, int32_t*)
  EFFC_ORT_SLOT(61, GetDimensionsCount, OrtStatus*, const Info*, size_t*)
  EFFC_ORT_SLOT(62, GetDimensions, OrtStatus*, const Info*, int64_t*, size_t)
  EFFC_ORT_SLOT(63, GetSymbolicDimensions, OrtStatus*, const Info*, const char**, size_t)
  EFFC_ORT_SLOT(65, GetTensorTypeAndShape, OrtStatus*, const OrtValue*, Info**)
  EFFC_ORT_SLOT(85, KernelInfoGetAttributeFloat, OrtStatus*, const OrtKernelInfo*, const char*,
                float*)
  EFFC_ORT_SLOT(86, KernelInfoGetAttributeInt, OrtStatus*, const OrtKernelInfo*, const char*,
                int64_t*)
  EFFC_ORT_SLOT(87, KernelInfoGetAttributeString, OrtStatus*, const OrtKernelInfo*, const char*,
                char*, size_t*)
  EFFC_ORT_SLOT(90, KernelContextGetInput, OrtStatus*, const OrtKernelContext*, size_t,
                const OrtValue**)
  EFFC_ORT_SLOT(91, KernelContextGetOutput, OrtStatus*, OrtKernelContext*, size_t, const int64_t*,
                size_t, OrtValue**)
  EFFC_ORT_SLOT(93, ReleaseStatus, void, OrtStatus*)
  EFFC_ORT_SLOT(99, ReleaseTensorTypeAndShapeInfo, void, Info*)
  EFFC_ORT_SLOT(163, KernelInfoGetAttributeInts, OrtStatus*, const OrtKernelInfo*, const char*,
                int64_t*, size_t*)
  EFFC_ORT_SLOT(230, KernelInfoGetInputCount, OrtStatus*, const OrtKernelInfo*, size_t*)
  EFFC_ORT_SLOT(244, KernelInfoGetNodeName, OrtStatus*, const OrtKernelInfo*, char*, size_t*)
  EFFC_ORT_SLOT(249, KernelInfoGetConstantInputTensor, OrtStatus*, const OrtKernelInfo*, size_t,
                int*, const OrtValue**)
  EFFC_ORT_SLOT(267, ShapeInferGetInputCount, OrtStatus*, const OrtShapeInferContext*, size_t*)
  EFFC_ORT_SLOT(268, ShapeInferGetInputTypeShape, OrtStatus*, const OrtShapeInferContext*, size_t,
                Info**)
  EFFC_ORT_SLOT(269, ShapeInferGetAttribute, OrtStatus*, const OrtShapeInferContext*, const char*,
                const OrtOpAttr**)
  EFFC_ORT_SLOT(270, ShapeInferSetOutputTypeShape, OrtStatus*, const OrtShapeInferContext*, size_t,
                const Info*)
  EFFC_ORT_SLOT(271, SetSymbolicDimensions, OrtStatus*, Info*, const char**, size_t)
  EFFC_ORT_SLOT(272, ReadOpAttr, OrtStatus*, const OrtOpAttr*, int32_t, void*, size_t, size_t*)
  EFFC_ORT_SLOT(274, KernelContextParallelFor, OrtStatus*, const OrtKernelContext*,
                void (*)(void*, size_t), size_t, size_t, void*)
#undef EFFC_ORT_SLOT

 private:
  OrtApi* table_;
};

}  // namespace effc::ort
