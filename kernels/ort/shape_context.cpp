#include "ort/shape_context.h"

#include <atomic>

#include "ort/cached_attention.h"

namespace effc::ort {

bool ShapeContext::Ok(OrtStatus* status) const {
  if (status == nullptr) return true;
  api_.ReleaseStatus(status);
  return false;
}

void ShapeContext::ReadAttribute(const char* name, OpAttrType type, void* data, size_t bytes,
                                 size_t* needed) const {
  const OrtOpAttr* attribute = nullptr;
  *needed = 0;
  const bool found =
      Ok(api_.ShapeInferGetAttribute(context_, name, &attribute)) && attribute != nullptr;
  if (found && Ok(api_.ReadOpAttr(attribute, int32_t{type}, data, bytes, needed))) return;
  if (found && *needed > bytes) return;
  throw Error(std::string("attribute '") + name + "' is missing or of another type");
}

int64_t ShapeContext::Int(const char* name) const {
  int64_t value = 0;
  size_t needed = 0;
  ReadAttribute(name, kInt, &value, sizeof(value), &needed);
  return value;
}

float ShapeContext::Float(const char* name) const {
  float value = 0;
  size_t needed = 0;
  ReadAttribute(name, kFloatAttribute, &value, sizeof(value), &needed);
  return value;
}

std::string ShapeContext::String(const char* name) const {
  char value[256] = {};
  size_t needed = 0;
  ReadAttribute(name, kString, value, sizeof(value), &needed);
  return std::string(value, needed < sizeof(value) ? needed : sizeof(value)).c_str();
}

std::vector<int64_t> ShapeContext::Ints(const char* name) const {
  int64_t values[16] = {};
  size_t needed = 0;
  ReadAttribute(name, kInts, values, sizeof(values), &needed);
  const size_t count = needed < sizeof(values) ? needed / sizeof(int64_t) : size_t{16};
  return {values, values + count};
}

size_t ShapeContext::InputCount() const {
  size_t count = 0;
  return Ok(api_.ShapeInferGetInputCount(context_, &count)) ? count : 0;
}

bool ShapeContext::Input(size_t index, InferredShape* shape) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t rank = 0;
  if (!Ok(api_.ShapeInferGetInputTypeShape(context_, index, &info)) || info == nullptr ||
      !Ok(api_.GetTensorElementType(info, &shape->type)) ||
      !Ok(api_.GetDimensionsCount(info, &rank))) {
    return false;
  }
  shape->dims.resize(rank);
  std::vector<const char*> symbols(rank, "");
  if (!Ok(api_.GetDimensions(info, shape->dims.data(), rank)) ||
      !Ok(api_.GetSymbolicDimensions(info, symbols.data(), rank))) {
    return false;
  }
  shape->names.assign(symbols.begin(), symbols.end());
  return true;
}

void ShapeContext::SetOutput(size_t index, InferredShape shape) const {
  static std::atomic<uint64_t> unnamed{0};
  shape.names.resize(shape.dims.size());
  for (size_t i = 0; i < shape.dims.size(); ++i) {
    if (shape.dims[i] >= 0) shape.names[i].clear();
    if (shape.dims[i] < 0 && shape.names[i].empty()) {
      shape.names[i] = "effc_size_" + std::to_string(unnamed++);
    }
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (!Ok(api_.CreateTensorTypeAndShapeInfo(&info))) return;
  std::vector<const char*> symbols;
  for (const std::string& name : shape.names) symbols.push_back(name.c_str());
  if (Ok(api_.SetTensorElementType(info, shape.type)) &&
      Ok(api_.SetDimensions(info, shape.dims.data(), shape.dims.size())) &&
      Ok(api_.SetSymbolicDimensions(info, symbols.data(), symbols.size()))) {
    Ok(api_.ShapeInferSetOutputTypeShape(context_, index, info));
  }
  api_.ReleaseTensorTypeAndShapeInfo(info);
}

void InferCachedAttention(const ShapeContext& context) {
  const AttentionForm form = ReadForm(context);
  const std::unique_ptr<CacheStorage> storage = ReadStorage(context, form);
  InferredShape query;
  if (context.Input(0, &query) && query.dims.size() == 3) {
    query.dims[2] = form.heads * form.value_size;
    query.type = kFloat;
    context.SetOutput(0, query);
  }
  InferredShape valid;
  const bool counted = context.Input(3, &valid) && valid.dims.size() == 2;
  const int64_t total = counted ? valid.dims[1] : -1;
  const std::vector<CacheTensorForm> forms = storage->Tensors(-1);
  for (size_t i = 0; i < forms.size(); ++i) {
    InferredShape past;
    if (!context.Input(CachedAttentionKernel::kFirstPast + i, &past)) continue;
    if (past.dims.size() != forms[i].dims.size()) continue;
    for (size_t j = 0; j < past.dims.size(); ++j) {
      if (forms[i].dims[j] >= 0) past.dims[j] = forms[i].dims[j];
    }
    InferredShape present = past;
    present.dims = storage->Present(i, past.dims, total);
    for (size_t j = 1; j < present.dims.size(); ++j) {
      if (present.dims[j] < 0) present.names[j].clear();  // may be larger than that of the past
    }
    context.SetOutput(i + 1, present);
  }
}

}  // namespace effc::ort
