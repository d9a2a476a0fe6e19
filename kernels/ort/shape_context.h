// What shape inference of a custom op sees and sets.
#pragma once

#include <string>
#include <vector>

#include "cpu/cache_storage.h"
#include "ort/ort_abi.h"

namespace effc::ort {

// Sizes of a tensor; unknown ones are -1, with their name if they have one.
struct InferredShape {
  int32_t type = kUndefined;
  std::vector<int64_t> dims;
  std::vector<std::string> names;
};

// Attributes throw Error when missing; everything else leaves the shape unknown: onnxruntime drops
// errors of shape inference.
class ShapeContext : public Attributes {
 public:
  ShapeContext(OrtApi* table, OrtShapeInferContext* context) : api_(table), context_(context) {}

  int64_t Int(const char* name) const override;
  float Float(const char* name) const override;
  std::string String(const char* name) const override;
  std::vector<int64_t> Ints(const char* name) const override;

  size_t InputCount() const;
  // False without a known rank.
  bool Input(size_t index, InferredShape* shape) const;
  // An unknown size without a name gets one of its own: onnxruntime would take two of them for
  // equal.
  void SetOutput(size_t index, InferredShape shape) const;

 private:
  bool Ok(OrtStatus* status) const;
  void ReadAttribute(const char* name, OpAttrType type, void* data, size_t bytes,
                     size_t* needed) const;

  Api api_;
  OrtShapeInferContext* context_;
};

// The shapes of CachedAttention.
void InferCachedAttention(const ShapeContext& context);

}  // namespace effc::ort
