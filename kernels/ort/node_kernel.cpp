#include "ort/node_kernel.h"

namespace effc::ort {
namespace {

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

}  // namespace

void CheckStatus(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

std::string ShapeText(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i > 0) text += ",";
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

void NodeAttributes::Require(OrtStatus* status, const char* name, const char* type) const {
  if (status == nullptr) return;
  api_.ReleaseStatus(status);
  throw Error(std::string("attribute '") + name + "' is missing or not " + type);
}

int64_t NodeAttributes::Int(const char* name) const {
  int64_t value = 0;
  Require(api_.KernelInfoGetAttributeInt(info_, name, &value), name, "an int");
  return value;
}

float NodeAttributes::Float(const char* name) const {
  float value = 0;
  Require(api_.KernelInfoGetAttributeFloat(info_, name, &value), name, "a float");
  return value;
}

std::string NodeAttributes::String(const char* name) const {
  size_t size = 0;
  Require(api_.KernelInfoGetAttributeString(info_, name, static_cast<char*>(nullptr), &size), name,
          "a string");
  std::string value(size, '\0');
  Require(api_.KernelInfoGetAttributeString(info_, name, value.data(), &size), name, "a string");
  return value.c_str();
}

std::vector<int64_t> NodeAttributes::Ints(const char* name) const {
  size_t size = 0;
  Require(api_.KernelInfoGetAttributeInts(info_, name, static_cast<int64_t*>(nullptr), &size), name,
          "a list of ints");
  std::vector<int64_t> values(size);
  if (size == 0) return values;
  Require(api_.KernelInfoGetAttributeInts(info_, name, values.data(), &size), name,
          "a list of ints");
  return values;
}

NodeKernel::NodeKernel(OrtApi* table, const OrtKernelInfo* info, const char* op)
    : api_(table),
      name_(NodeName(api_, info)),
      where_(std::string("effc::") + op + " node '" + name_ + "': ") {}

OrtStatus* NodeKernel::Fail(int32_t code, const std::string& message) const {
  return api_.CreateStatus(code, (where_ + message).c_str());
}

Tensor NodeKernel::Read(const OrtValue* value, std::vector<int64_t>* dims) const {
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

Tensor NodeKernel::Input(const OrtKernelContext* context, size_t index,
                         std::vector<int64_t>* dims) const {
  const OrtValue* value = nullptr;
  Check(api_.KernelContextGetInput(context, index, &value));
  if (value == nullptr) throw Error("input " + std::to_string(index) + " is missing");
  return Read(value, dims);
}

Tensor NodeKernel::OptionalInput(const OrtKernelContext* context, size_t index,
                                 std::vector<int64_t>* dims) const {
  const OrtValue* value = nullptr;
  Check(api_.KernelContextGetInput(context, index, &value));
  return value == nullptr ? Tensor{} : Read(value, dims);
}

void* NodeKernel::Output(OrtKernelContext* context, size_t index,
                         const std::vector<int64_t>& dims) const {
  OrtValue* value = nullptr;
  Check(api_.KernelContextGetOutput(context, index, dims.data(), dims.size(), &value));
  if (value == nullptr) throw Error("output " + std::to_string(index) + " is not connected");
  void* data = nullptr;
  Check(api_.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace effc::ort
