#include "cpu/cache_storage.h"

#include <cmath>

#include "cpu/dense_cache.h"

namespace effc {
namespace {

constexpr int64_t kLargestSize = int64_t{1} << 20;

int64_t Between(const Attributes& attributes, const char* name, int64_t least, int64_t most) {
  const int64_t value = attributes.Int(name);
  if (value >= least && value <= most) return value;
  throw Error("attribute '" + std::string(name) + "' is " + std::to_string(value) +
              "; it must be from " + std::to_string(least) + " to " + std::to_string(most));
}

float FiniteFloat(const Attributes& attributes, const char* name) {
  const float value = attributes.Float(name);
  if (std::isfinite(value)) return value;
  throw Error("attribute '" + std::string(name) + "' is " + std::to_string(value) +
              "; it must be finite");
}

Rotary ReadRotary(const Attributes& attributes) {
  const std::string name = attributes.String("rotary");
  if (name == "none") return Rotary::kNone;
  if (name == "half") return Rotary::kHalf;
  if (name == "interleaved") return Rotary::kInterleaved;
  throw Error("attribute 'rotary' is '" + name +
              "'; it must be one of 'none', 'half', 'interleaved'");
}

}  // namespace

AttentionForm ReadForm(const Attributes& attributes) {
  AttentionForm form;
  form.heads = Between(attributes, "heads", 1, kLargestSize);
  form.kv_heads = Between(attributes, "kv_heads", 1, kLargestSize);
  form.head_size = Between(attributes, "head_size", 1, kMaxHeadSize);
  form.value_size = Between(attributes, "value_size", 1, kMaxHeadSize);
  if (form.heads % form.kv_heads != 0) {
    throw Error("attribute 'heads' is " + std::to_string(form.heads) +
                "; it must be a multiple of kv_heads, which is " + std::to_string(form.kv_heads));
  }
  form.scale = FiniteFloat(attributes, "scale");
  form.softcap = FiniteFloat(attributes, "softcap");
  if (form.softcap < 0) throw Error("attribute 'softcap' is negative; 0 means none");
  form.causal = Between(attributes, "causal", 0, 1) != 0;
  form.window = Between(attributes, "window", 0, INT32_MAX);
  form.rotary = ReadRotary(attributes);
  form.rotary_size = Between(attributes, "rotary_size", 0, form.head_size);
  if ((form.rotary != Rotary::kNone) != (form.rotary_size > 0) || form.rotary_size % 2 != 0) {
    throw Error("attribute 'rotary_size' is " + std::to_string(form.rotary_size) +
                "; it must be even, more than 0 with a rotary, 0 without");
  }
  return form;
}

std::unique_ptr<CacheStorage> ReadStorage(const Attributes& attributes, const AttentionForm& form) {
  const std::string storage = attributes.String("storage");
  if (storage == "dense") {
    const int64_t ring = Between(attributes, "ring", 0, INT32_MAX);
    if (ring > 0 && (form.window == 0 || ring < form.window)) {
      throw Error("attribute 'ring' is " + std::to_string(ring) +
                  "; a ring must hold the window, which is " + std::to_string(form.window) +
                  (form.window == 0 ? " (none)" : ""));
    }
    return std::make_unique<DenseStorage>(form, ring);
  }
  throw Error("attribute 'storage' is '" + storage + "'; it must be one of 'dense', 'pages'");
}

}  // namespace effc
