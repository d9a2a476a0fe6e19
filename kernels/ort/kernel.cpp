#include "ort/kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "ort/shared_weight.h"

namespace effc::ort {
namespace {

// Weights in one task of a direct product: some ten microseconds.
constexpr int64_t kTaskWeights = 1 << 17;

// Larger copies of x are freed after the product.
constexpr int64_t kKeptFloats = 1 << 20;

float* PermuteScratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
  return scratch.data();
}

float* ThreadScratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
  return scratch.data();
}

std::string NodeName(const Api& api, const OrtKernelInfo* info) {
  size_t size = 0;
  if (OrtStatus* status = api.KernelInfoGetNodeName(info, static_cast<char*>(nullptr), &size)) {
    api.ReleaseStatus(status);
  }
  std::string name(size, '\0');
  if (OrtStatus* status = api.KernelInfoGetNodeName(info, name.data(), &size)) {
    api.ReleaseStatus(status);
    return "?";
  }
  return name.c_str();
}

std::string ShapeText(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

}  // namespace

WeightKernel::WeightKernel(OrtApi* table, const OrtKernelInfo* info, const char* op, size_t first)
    : api_(table), where_(std::string("effc::") + op + " node '" + NodeName(api_, info) + "': ") {
  try {
    kernels_ = &ActiveKernels();
    spec_.dtype = static_cast<Type>(IntAttribute(info, "dtype"));
    spec_.rows = IntAttribute(info, "rows");
    spec_.columns = IntAttribute(info, "columns");
    const Layout layout = ParseLayout(StringAttribute(info, "layout"));
    size_t count = 0;
    Check(api_.KernelInfoGetInputCount(info, &count));
    std::vector<Tensor> tensors;
    for (size_t i = first; i < count; ++i) {
      int constant = 0;
      const OrtValue* value = nullptr;
      Check(api_.KernelInfoGetConstantInputTensor(info, i, &constant, &value));
      if (!constant || value == nullptr) {
        throw Error("input " + std::to_string(i) +
                    " is part of the weight and must be an initializer");
      }
      tensors.push_back(Read(value));
    }
    weight_ = SharedWeight(spec_, layout, tensors);
  } catch (const Error& error) {
    throw Error(where_ + error.what());
  }
}

OrtStatus* WeightKernel::Fail(int32_t code, const std::string& message) const {
  return api_.CreateStatus(code, (where_ + message).c_str());
}

void WeightKernel::CheckStatus(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

int64_t WeightKernel::IntAttribute(const OrtKernelInfo* info, const char* name) const {
  int64_t value = 0;
  if (OrtStatus* status = api_.KernelInfoGetAttributeInt(info, name, &value)) {
    api_.ReleaseStatus(status);
    throw Error(std::string("attribute '") + name + "' is missing or not an int");
  }
  return value;
}

std::string WeightKernel::StringAttribute(const OrtKernelInfo* info, const char* name) const {
  size_t size = 0;
  std::string value;
  OrtStatus* status =
      api_.KernelInfoGetAttributeString(info, name, static_cast<char*>(nullptr), &size);
  if (status == nullptr) {
    value.resize(size);
    status = api_.KernelInfoGetAttributeString(info, name, value.data(), &size);
  }
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    throw Error(std::string("attribute '") + name + "' is missing or not a string");
  }
  return value.c_str();
}

Tensor WeightKernel::Read(const OrtValue* value, std::vector<int64_t>* dims) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api_.GetTensorTypeAndShape(value, &info));
  int32_t type = 0;
  size_t rank = 0;
  std::vector<int64_t> shape;
  OrtStatus* status = api_.GetTensorElementType(info, &type);
  if (status == nullptr) status = api_.GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    shape.resize(rank);
    status = api_.GetDimensions(info, shape.data(), rank);
  }
  api_.ReleaseTensorTypeAndShapeInfo(info);
  Check(status);
  Tensor tensor;
  tensor.type = static_cast<Type>(type);
  void* data = nullptr;
  Check(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  tensor.rank = static_cast<int32_t>(rank);
  if (dims != nullptr) {
    *dims = std::move(shape);
  } else if (rank > 4) {
    throw Error("a tensor of a weight has more than two dimensions");
  } else {
    std::copy(shape.begin(), shape.end(), tensor.dims);
  }
  return tensor;
}

Tensor WeightKernel::Input(const OrtKernelContext* context, size_t index,
                           std::vector<int64_t>* dims) const {
  const OrtValue* value = nullptr;
  Check(api_.KernelContextGetInput(context, index, &value));
  if (value == nullptr) throw Error("input " + std::to_string(index) + " is missing");
  return Read(value, dims);
}

float* WeightKernel::Output(OrtKernelContext* context, const std::vector<int64_t>& dims) const {
  OrtValue* value = nullptr;
  Check(api_.KernelContextGetOutput(context, size_t{0}, dims.data(), dims.size(), &value));
  void* data = nullptr;
  Check(api_.GetTensorMutableData(value, &data));
  return static_cast<float*>(data);
}

template <class Fn>
void WeightKernel::Parallel(const OrtKernelContext* context, int64_t count, int64_t grain,
                            Fn&& fn) const {
  if (count <= grain) return fn(int64_t{0}, count);
  struct Shared {
    Fn& fn;
    int64_t count;
    int64_t grain;
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string message;
  } shared{fn, count, grain, {}, {}, {}};
  auto task = [](void* data, size_t index) {
    Shared& s = *static_cast<Shared*>(data);
    if (s.failed) return;
    const int64_t begin = static_cast<int64_t>(index) * s.grain;
    try {
      s.fn(begin, std::min(s.count, begin + s.grain));
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(s.mutex);
      if (!s.failed.exchange(true)) s.message = error.what();
    }
  };
  const size_t tasks = static_cast<size_t>((count + grain - 1) / grain);
  Check(api_.KernelContextParallelFor(context, +task, tasks, size_t{0}, &shared));
  if (shared.failed) throw Error(shared.message);
}

void MatMulKernel::Compute(OrtKernelContext* context) const {
  std::vector<int64_t> dims;
  const Tensor x = Input(context, 0, &dims);
  if (dims.empty() || dims.back() != spec_.columns) {
    throw Error("x has shape " + ShapeText(dims) + ", but its last dimension must be " +
                std::to_string(spec_.columns) + ", the columns of the weight");
  }
  dims.back() = spec_.rows;
  int64_t m = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) m *= dims[i];
  float* y = Output(context, dims);
  if (m == 0 || spec_.rows == 0) return;
  if (spec_.columns == 0) {
    std::memset(y, 0, static_cast<size_t>(m * spec_.rows) * sizeof(float));
  } else {
    Multiply(context, x.as<float>(), m, y);
  }
}

void MatMulKernel::Multiply(const OrtKernelContext* context, const float* x, int64_t m,
                            float* y) const {
  const int64_t stride = PaddedColumns(spec_.columns);
  std::vector<float> large;
  float* const permuted = m * stride <= kKeptFloats ? PermuteScratch(m * stride)
                                                    : (large.resize(m * stride), large.data());
  const int64_t x_grain = std::max<int64_t>(1, kTaskWeights / stride);
  Parallel(context, m, x_grain, [&](int64_t begin, int64_t end) {
    PermuteX(x + begin * spec_.columns, end - begin, spec_.columns, kernels_->lanes,
             permuted + begin * stride);
  });
  Parallel(context, spec_.rows, Grain(m), [&](int64_t begin, int64_t end) {
    kernels_->product(weight_->view, permuted, stride, m, begin, end, y, spec_.rows,
                      ThreadScratch(ScratchFloats(spec_.columns, m)));
  });
}

int64_t MatMulKernel::Grain(int64_t m) const {
  if (m <= kFewRows) {
    return std::max({int64_t{1}, kTaskWeights / spec_.columns, spec_.rows / 256});
  }
  const int64_t panel = PanelRows(spec_.columns, m);
  const int64_t panels = kTaskWeights / (spec_.columns * (1 + m / 8)) / panel;
  return panel * std::max({int64_t{1}, panels, spec_.rows / panel / 512});
}

void GatherKernel::Compute(OrtKernelContext* context) const {
  std::vector<int64_t> dims;
  const Tensor indices = Input(context, 0, &dims);
  if (indices.type != Type::kInt64 && indices.type != Type::kInt32) {
    throw Error("indices must be int32 or int64");
  }
  int64_t count = 1;
  for (const int64_t dim : dims) count *= dim;
  dims.push_back(spec_.columns);
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index =
        indices.type == Type::kInt64 ? indices.as<int64_t>()[i] : indices.as<int32_t>()[i];
    if (index < -spec_.rows || index >= spec_.rows) {
      throw Error("index " + std::to_string(index) + " at position " + std::to_string(i) +
                  " is outside the " + std::to_string(spec_.rows) + " rows of the weight");
    }
    rows[i] = index < 0 ? index + spec_.rows : index;
  }
  float* out = Output(context, dims);
  if (count == 0 || spec_.columns == 0) return;
  const int64_t grain = std::max<int64_t>(1, kTaskWeights / spec_.columns);
  Parallel(context, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels_->widen(weight_->view, rows[i], rows[i] + 1, out + i * spec_.columns, spec_.columns);
    }
  });
}

void DecodeKernel::Compute(OrtKernelContext* context) const {
  float* out = Output(context, {spec_.rows, spec_.columns});
  if (spec_.count() == 0) return;
  const int64_t grain = std::max<int64_t>(1, kTaskWeights / spec_.columns);
  Parallel(context, spec_.rows, grain, [&](int64_t begin, int64_t end) {
    kernels_->widen(weight_->view, begin, end, out + begin * spec_.columns, spec_.columns);
  });
}

}  // namespace effc::ort
