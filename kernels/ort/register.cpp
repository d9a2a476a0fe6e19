// RegisterCustomOps: the entry point through which onnxruntime loads this library.
#include <map>
#include <mutex>

#include "ort/cached_attention.h"
#include "ort/kernel.h"
#include "ort/ort_abi.h"
#include "ort/shape_context.h"

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

// OrtCustomOp passes no function table to shape inference, so each op carries it.
struct Op : OrtCustomOp {
  OrtApi* table;
};

using InferFunction = void (*)(const ShapeContext&);

// Nothing may throw into onnxruntime, which drops the status of shape inference anyway.
template <InferFunction kInfer>
OrtStatus* Infer(const OrtCustomOp* op, OrtShapeInferContext* raw) {
  try {
    kInfer(ShapeContext(static_cast<const Op*>(op)->table, raw));
  } catch (const std::exception&) {
    return nullptr;  // making the kernel will say what is wrong
  }
  return nullptr;
}

void InferMatMul(const ShapeContext& context) {
  InferredShape shape;
  if (!context.Input(0, &shape) || shape.dims.empty()) return;
  shape.type = kFloat;
  shape.dims.back() = context.Int("rows");
  context.SetOutput(0, shape);
}

void InferGather(const ShapeContext& context) {
  InferredShape shape;
  // Rank 0 is a scalar index or an unknown shape; nothing is said about either.
  if (!context.Input(0, &shape) || shape.dims.empty()) return;
  shape.type = kFloat;
  shape.dims.push_back(context.Int("columns"));
  context.SetOutput(0, shape);
}

void InferDecode(const ShapeContext& context) {
  context.SetOutput(0, {kFloat, {context.Int("rows"), context.Int("columns")}, {}});
}

// What all ops have in common; the last input is variadic.
template <class Kernel>
Op MakeOp(OrtApi* table) {
  Op op{};
  op.table = table;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetOutputType = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i == 0 ? kFloat : kUndefined;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.KernelDestroy = Destroy<Kernel>;
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i == 0 ? kRequired : kVariadic;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = Create<Kernel>;
  op.KernelComputeV2 = Compute<Kernel>;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

// An op whose inputs are `kFirst` plain ones, the first of type `kFirstType`, then the weight.
template <class Kernel, size_t kFirst, int32_t kFirstType, InferFunction kInfer>
Op MakeWeightOp(OrtApi* table) {
  Op op = MakeOp<Kernel>(table);
  op.GetInputType = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i < kFirst ? kFirstType : int32_t{kUndefined};
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kFirst + 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i < kFirst ? kRequired : kVariadic;
  };
  op.InferOutputShapeFn = Infer<kInfer>;
  return op;
}

// query, key, value, valid, bias?, cos?, sin?, *past -> y, *present
Op MakeCachedAttentionOp(OrtApi* table) {
  constexpr size_t kFirst = CachedAttentionKernel::kFirstPast;
  Op op = MakeOp<CachedAttentionKernel>(table);
  op.GetInputType = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i == 3 ? kBool : i < kFirst ? kFloat : kUndefined;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kFirst + 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int32_t {
    return i < 4 ? kRequired : i < kFirst ? kOptional : kVariadic;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{2}; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.InferOutputShapeFn = Infer<InferCachedAttention>;
  return op;
}

// The domain of one onnxruntime in this process. Sessions may use it until the process ends.
OrtCustomOpDomain* MakeDomain(OrtApi* table) {
  const Api api(table);
  OrtCustomOpDomain* domain = nullptr;
  CheckStatus(api, api.CreateCustomOpDomain(kDomain, &domain));
  const Op ops[] = {MakeWeightOp<MatMulKernel, 1, kFloat, InferMatMul>(table),
                    MakeWeightOp<GatherKernel, 1, kUndefined, InferGather>(table),
                    MakeWeightOp<DecodeKernel, 0, kUndefined, InferDecode>(table),
                    MakeCachedAttentionOp(table)};
  for (const Op& op : ops) CheckStatus(api, api.CustomOpDomainAdd(domain, new Op(op)));
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
    effc::ort::CheckStatus(api, api.AddCustomOpDomain(options, effc::ort::Domain(table)));
  });
}
