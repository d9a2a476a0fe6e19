#include "ort/kernel.h"

#include <algorithm>
#include <cstring>

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

}  // namespace

WeightKernel::WeightKernel(OrtApi* table, const OrtKernelInfo* info, const char* op, size_t first)
    : NodeKernel(table, info, op) {
  try {
    kernels_ = &ActiveKernels();
    const NodeAttributes attributes(api_, info);
    spec_.dtype = static_cast<Type>(attributes.Int("dtype"));
    spec_.rows = attributes.Int("rows");
    spec_.columns = attributes.Int("columns");
    const Layout layout = ParseLayout(attributes.String("layout"));
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
