// RegisterCustomOps: the entry point through which onnxruntime loads this library.
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ort/kernel.h"
#include "ort/ort_abi.h"

namespace effc::ort {
namespace {

constexpr const char* kDomain = "effc";

// Turns every exception into a status: none may reach onnxruntime.
template <class Fn>
OrtStatus* Guard(const Api& api, int32_t code, Fn&& fn) {
  try {
    fn();
    return nullptr;
  } catch (const std::exception& error) {
    return api.CreateStatus(code, error.what());
  } catch (...) {
    return api.CreateStatus(int32_t{kFail}, "unknown failure in libeffc");
  }
}

// A kernel and the table its node was made with.
template <class Kernel>
struct Holder {
  Api api;
  Kernel kernel;
};

template <class Kernel>
OrtStatus* Create(const OrtCustomOp*, OrtApi* table, const OrtKernelInfo* info, void** out) {
  const Api api(table);
  return Guard(api, kInvalidArgument, [&] { *out = new Holder<Kernel>{api, Kernel(table, info)}; });
}

template <class Kernel>
OrtStatus* Compute(void* data, OrtKernelContext* context) {
  auto* holder = static_cast<Holder<Kernel>*>(data);
  try {
    holder->kernel.Compute(context);
    return nullptr;
  } catch (const std::exception& error) {
    return holder->kernel.Fail(kInvalidArgument, error.what());
  } catch (...) {
    return holder->kernel.Fail(kFail, "unknown failure");
  }
}

template <class Kernel>
void Destroy(void* data) {
  delete static_cast<Holder<Kernel>*>(data);
}

// Shape inference. Errors leave the shape unknown: onnxruntime drops the status.
class ShapeContext {
 public:
  ShapeContext(OrtApi* table, OrtShapeInferContext* context) : api_(table), context_(context) {}

  bool Int(const char* name, int64_t* value) const {
    const OrtOpAttr* attribute = nullptr;
    size_t size = 0;
    return Ok(api_.ShapeInferGetAttribute(context_, name, &attribute)) && attribute != nullptr &&
           Ok(api_.ReadOpAttr(attribute, int32_t{kInt}, value, sizeof(*value), &size));
  }

  // Dimensions of input 0; unknown ones are -1, with their name if they have one.
  bool InputDims(std::vector<int64_t>* dims, std::vector<std::string>* names) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t rank = 0;
    if (!Ok(api_.ShapeInferGetInputTypeShape(context_, size_t{0}, &info)) || info == nullptr ||
        !Ok(api_.GetDimensionsCount(info, &rank))) {
      return false;
    }
    dims->resize(rank);
    std::vector<const char*> symbols(rank, "");
    if (!Ok(api_.GetDimensions(info, dims->data(), rank)) ||
        !Ok(api_.GetSymbolicDimensions(info, symbols.data(), rank))) {
      return false;
    }
    names->assign(symbols.begin(), symbols.end());
    return true;
  }

  // An unknown size without a name gets one of its own: onnxruntime would take two of them for
  // equal.
  void SetOutput(const std::vector<int64_t>& dims, std::vector<std::string> names) const {
    static std::atomic<uint64_t> unnamed{0};
    for (size_t i = 0; i < dims.size(); ++i) {
      if (dims[i] < 0 && names[i].empty()) names[i] = "effc_size_" + std::to_string(unnamed++);
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (!Ok(api_.CreateTensorTypeAndShapeInfo(&info))) return;
    std::vector<const char*> symbols;
    for (const std::string& name : names) symbols.push_back(name.c_str());
    if (Ok(api_.SetTensorElementType(info, int32_t{kFloat})) &&
        Ok(api_.SetDimensions(info, dims.data(), dims.size())) &&
        Ok(api_.SetSymbolicDimensions(info, symbols.data(), symbols.size()))) {
      Ok(api_.ShapeInferSetOutputTypeShape(context_, size_t{0}, info));
    }
    api_.ReleaseTensorTypeAndShapeInfo(info);
  }

 private:
  bool Ok(OrtStatus* status) const {
    if (status == nullptr) return true;
    api_.ReleaseStatus(status);
    return false;
  }

  Api api_;
  OrtShapeInferContext* context_;
};

// OrtCustomOp passes no function table to shape inference, so each op carries it.
struct Op : OrtCustomOp {
  OrtApi* table;
};

OrtStatus* InferMatMul(const OrtCustomOp* op, OrtShapeInferContext* raw) {
  const ShapeContext context(static_cast<const Op*>(op)->table, raw);
  std::vector<int64_t> dims;
  std::vector<std::string> names;
  int64_t rows = 0;
  if (!context.InputDims(&dims, &names) || dims.empty() || !context.Int("rows", &rows)) {
    return nullptr;
  }
  dims.back() = rows;
  names.back().clear();
  context.SetOutput(dims, names);
  return nullptr;
}

OrtStatus* InferGather(const OrtCustomOp* op, OrtShapeInferContext* raw) {
  const ShapeContext context(static_cast<const Op*>(op)->table, raw);
  std::vector<int64_t> dims;
  std::vector<std::string> names;
  int64_t columns = 0;
  // Rank 0 is a scalar index or an unknown shape; nothing is said about either.
  if (!context.InputDims(&dims, &names) || dims.empty() || !context.Int("columns", &columns)) {
    return nullptr;
  }
  dims.push_back(columns);
  names.emplace_back();
  context.SetOutput(dims, names);
  return nullptr;
}

OrtStatus* InferDecode(const OrtCustomOp* op, OrtShapeInferContext* raw) {
  const ShapeContext context(static_cast<const Op*>(op)->table, raw);
  int64_t rows = 0;
  int64_t columns = 0;
  if (context.Int("rows", &rows) && context.Int("columns", &columns)) {
    context.SetOutput({rows, columns}, {"", ""});
  }
  return nullptr;
}

// An op whose inputs are `kFirst` plain ones, the first of type `kFirstType`, then the weight.
template <class Kernel, size_t kFirst, int32_t kFirstType>
Op MakeOp(OrtApi* table, OrtStatus* (*infer)(const OrtCustomOp*, OrtShapeInferContext*)) {
  Op op{};
  op.table = table;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i < kFirst ? kFirstType : int32_t{kUndefined};
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kFirst + 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int32_t { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.KernelDestroy = Destroy<Kernel>;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i < kFirst ? kRequired : kVariadic;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int32_t { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = Create<Kernel>;
  op.KernelComputeV2 = Compute<Kernel>;
  op.InferOutputShapeFn = infer;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

void Check(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

// The domain of one onnxruntime in this process. Sessions may use it until the process ends.
OrtCustomOpDomain* MakeDomain(OrtApi* table) {
  const Api api(table);
  OrtCustomOpDomain* domain = nullptr;
  Check(api, api.CreateCustomOpDomain(kDomain, &domain));
  const Op ops[] = {MakeOp<MatMulKernel, 1, kFloat>(table, InferMatMul),
                    MakeOp<GatherKernel, 1, kUndefined>(table, InferGather),
                    MakeOp<DecodeKernel, 0, kUndefined>(table, InferDecode)};
  for (const Op& op : ops) Check(api, api.CustomOpDomainAdd(domain, new Op(op)));
  return domain;
}

OrtCustomOpDomain* Domain(OrtApi* table) {
  static std::mutex mutex;
  static auto& domains = *new std::map<OrtApi*, OrtCustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& domain = domains[table];
  if (domain == nullptr) domain = MakeDomain(table);
  return domain;
}

}  // namespace
}  // namespace effc::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using effc::ort::Api;
  OrtApi* table = base->GetApi(effc::ort::kApiVersion);
  if (table == nullptr) {
    return Api(base->GetApi(1))
        .CreateStatus(int32_t{effc::ort::kFail},
                      "libeffc needs onnxruntime 1.18 or newer; upgrade onnxruntime");
  }
  const Api api(table);
  return effc::ort::Guard(api, effc::ort::kFail, [&] {
    effc::ort::Check(api, api.AddCustomOpDomain(options, effc::ort::Domain(table)));
  });
}
