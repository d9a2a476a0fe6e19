#include "cpu/cache_storage.h"

#include <cmath>

#include "cpu/bounded_cache.h"
#include "cpu/cluster_cache.h"
#include "cpu/dense_cache.h"
#include "cpu/evict_cache.h"
#include "cpu/low_rank_cache.h"
#include "cpu/page_cache.h"
#include "cpu/retain_cache.h"
#include "cpu/sink_cache.h"
#include "cpu/stride_cache.h"
#include "cpu/voted_cache.h"

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

template <class Value>
struct Choice {
  const char* name;
  Value value;
};

template <class Value, size_t kCount>
Value OneOf(const Attributes& attributes, const char* name,
            const Choice<Value> (&choices)[kCount]) {
  const std::string given = attributes.String(name);
  std::string names;
  for (const Choice<Value>& choice : choices) {
    if (given == choice.name) return choice.value;
    if (!names.empty()) names += ", ";
    names += std::string("'") + choice.name + "'";
  }
  throw Error("attribute '" + std::string(name) + "' is '" + given + "'; it must be one of " +
              names);
}

void ReadBits(const Attributes& attributes, const char* name, int32_t (&bits)[2]) {
  const std::vector<int64_t> values = attributes.Ints(name);
  bool fits = values.size() == 2;
  for (const int64_t value : values) {
    fits = fits && (value == 2 || value == 4 || value == 8 || value == 16);
  }
  if (!fits) {
    throw Error("attribute '" + std::string(name) + "' must be two of 2, 4, 8, 16");
  }
  bits[0] = static_cast<int32_t>(values[0]);
  bits[1] = static_cast<int32_t>(values[1]);
}

PageCacheSpec ReadPages(const Attributes& attributes, const AttentionForm& form) {
  PageCacheSpec spec;
  spec.sinks = Between(attributes, "sinks", 0, kLargestSize);
  spec.recent = Between(attributes, "recent", 0, kLargestSize);
  PageSpec& page = spec.page;
  page.head_size = form.head_size;
  page.value_size = form.value_size;
  page.page = Between(attributes, "page", 1, kMaxPage);
  page.salient = Between(attributes, "salient", 0, page.page);
  page.key_group = Between(attributes, "key_group", 0, kLargestSize);
  page.value_group = Between(attributes, "value_group", 0, kLargestSize);
  page.key_scheme =
      OneOf<KeyScheme>(attributes, "key_scheme",
                       {{"channel", KeyScheme::kChannel}, {"balanced", KeyScheme::kBalanced}});
  page.value_scheme =
      OneOf<ValueScheme>(attributes, "value_scheme",
                         {{"token", ValueScheme::kToken}, {"separable", ValueScheme::kSeparable}});
  ReadBits(attributes, "key_bits", page.key_bits);
  ReadBits(attributes, "value_bits", page.value_bits);
  if (spec.two_classes()) {
    spec.importance = OneOf<Importance>(attributes, "importance",
                                        {{"normalised", Importance::kNormalised},
                                         {"causal-count", Importance::kCausalCount},
                                         {"accumulated", Importance::kAccumulated}});
  }
  return spec;
}

void ReadMemory(const Attributes& attributes, SelectionSpec& spec) {
  if (spec.block != 1) throw Error("selection 'topk' has blocks of one token");
  spec.refresh = Between(attributes, "select_refresh", 0, kLargestSize);
  spec.similarity = FiniteFloat(attributes, "select_similarity");
  if (spec.similarity >= -1 && spec.similarity <= 1) return;
  throw Error("attribute 'select_similarity' is " + std::to_string(spec.similarity) +
              "; it must be from -1 to 1");
}

SelectionSpec ReadEvict(const Attributes& attributes, SelectionSpec spec) {
  spec.sinks = Between(attributes, "select_sinks", 0, kLargestSize);
  spec.recent = Between(attributes, "select_recent", 1, kLargestSize);
  spec.block = Between(attributes, "select_block", 1, kLargestSize);
  spec.budget = Between(attributes, "select_budget", spec.sinks + spec.recent, INT32_MAX / 2);
  spec.pool = Between(attributes, "select_pool", 1, kMaxPage);
  if (spec.pool % 2 == 0) {
    throw Error("attribute 'select_pool' is " + std::to_string(spec.pool) + "; it must be odd");
  }
  return spec;
}

SelectionSpec ReadRetain(const Attributes& attributes, SelectionSpec spec) {
  spec.sinks = Between(attributes, "select_sinks", 0, kLargestSize);
  spec.recent = Between(attributes, "select_recent", 0, kLargestSize);
  spec.block = Between(attributes, "select_block", 1, kLargestSize);
  const int64_t least = std::max(spec.sinks + spec.recent + spec.block, spec.sinks + 2);
  spec.budget = Between(attributes, "select_budget", least, INT32_MAX);
  return spec;
}

SelectionSpec ReadStride(const Attributes& attributes, SelectionSpec spec) {
  spec.sinks = Between(attributes, "select_sinks", 0, kLargestSize);
  spec.block = Between(attributes, "select_block", 1, kLargestSize);
  spec.recent = Between(attributes, "select_recent", spec.block, INT32_MAX);
  spec.stride = Between(attributes, "select_stride", 1, kLargestSize);
  if (spec.recent % spec.block != 0) {
    throw Error("attribute 'select_recent' is " + std::to_string(spec.recent) +
                "; it must be a multiple of select_block, which is " + std::to_string(spec.block));
  }
  return spec;
}

SelectionSpec ReadSelection(const Attributes& attributes, const AttentionForm& form) {
  SelectionSpec spec;
  spec.kind = OneOf<SelectionKind>(attributes, "selection",
                                   {{"all", SelectionKind::kAll},
                                    {"pages", SelectionKind::kPages},
                                    {"topk", SelectionKind::kTopK},
                                    {"window", SelectionKind::kWindow},
                                    {"clusters", SelectionKind::kClusters},
                                    {"evict", SelectionKind::kEvict},
                                    {"retain", SelectionKind::kRetain},
                                    {"stride", SelectionKind::kStride},
                                    {"lowrank", SelectionKind::kLowRank}});
  if (spec.kind == SelectionKind::kAll) return spec;
  if (spec.kind == SelectionKind::kEvict) return ReadEvict(attributes, spec);
  if (spec.kind == SelectionKind::kRetain) return ReadRetain(attributes, spec);
  if (spec.kind == SelectionKind::kStride) return ReadStride(attributes, spec);
  if (spec.kind == SelectionKind::kWindow) {
    spec.sinks = Between(attributes, "select_sinks", 1, kBlockTokens);
    spec.positions = OneOf<FarPositions>(attributes, "select_positions",
                                         {{"keep", FarPositions::kKeep},
                                          {"compact", FarPositions::kCompact},
                                          {"cap", FarPositions::kCap}});
    return spec;
  }
  if (form.window > 0) throw Error("a selection takes no window");
  if (spec.kind == SelectionKind::kClusters) {
    spec.recent = Between(attributes, "select_recent", 1, kLargestSize);
    return spec;
  }
  spec.sinks = Between(attributes, "select_sinks", 0, kLargestSize);
  spec.recent = Between(attributes, "select_recent", 0, kLargestSize);
  spec.block = Between(attributes, "select_block", 1, kMaxPage);
  if (spec.kind == SelectionKind::kLowRank && spec.sinks + spec.recent > 0) {
    throw Error("selection 'lowrank' has neither select_sinks nor select_recent");
  }
  if (spec.kind == SelectionKind::kTopK) ReadMemory(attributes, spec);
  spec.reach = FiniteFloat(attributes, "select_reach");
  if (spec.reach < 0 || spec.reach > 1) {
    throw Error("attribute 'select_reach' is " + std::to_string(spec.reach) +
                "; it must be from 0 to 1");
  }
  spec.budget = Between(attributes, "select_budget", 0, INT32_MAX);
  spec.dense_below = Between(attributes, "dense_below", 0, INT32_MAX);
  spec.share = FiniteFloat(attributes, "select_share");
  if (spec.share < 0 || spec.share > 1) {
    throw Error("attribute 'select_share' is " + std::to_string(spec.share) +
                "; it must be from 0 to 1");
  }
  if (form.scale < 0) throw Error("a selection takes no negative scale");
  return spec;
}

std::unique_ptr<CacheStorage> ReadDense(const AttentionForm& form, int64_t ring,
                                        const SelectionSpec& selection) {
  if (selection.kind == SelectionKind::kEvict) {
    return std::make_unique<EvictStorage>(form, ring, selection);
  }
  if (selection.kind == SelectionKind::kRetain) {
    return std::make_unique<RetainStorage>(form, ring, selection);
  }
  if (selection.kind == SelectionKind::kStride) {
    return std::make_unique<StrideStorage>(form, ring, selection);
  }
  if (selection.kind == SelectionKind::kWindow) {
    return std::make_unique<SinkStorage>(form, ring, selection);
  }
  if (selection.kind == SelectionKind::kPages) {
    return std::make_unique<BoundedStorage>(form, selection);
  }
  if (selection.kind == SelectionKind::kTopK) {
    return std::make_unique<VotedStorage>(form, selection);
  }
  if (selection.kind == SelectionKind::kClusters) {
    return std::make_unique<ClusterStorage>(form, selection);
  }
  if (selection.kind == SelectionKind::kLowRank) {
    return std::make_unique<LowRankStorage>(form, selection);
  }
  return std::make_unique<DenseStorage>(form, ring);
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
  form.rotary = OneOf<Rotary>(
      attributes, "rotary",
      {{"none", Rotary::kNone}, {"half", Rotary::kHalf}, {"interleaved", Rotary::kInterleaved}});
  form.rotary_size = Between(attributes, "rotary_size", 0, form.head_size);
  if ((form.rotary != Rotary::kNone) != (form.rotary_size > 0) || form.rotary_size % 2 != 0) {
    throw Error("attribute 'rotary_size' is " + std::to_string(form.rotary_size) +
                "; it must be even, more than 0 with a rotary, 0 without");
  }
  return form;
}

std::unique_ptr<CacheStorage> ReadStorage(const Attributes& attributes, const AttentionForm& form) {
  const std::string storage = attributes.String("storage");
  const SelectionSpec selection = ReadSelection(attributes, form);
  if (storage == "dense") {
    const int64_t ring = Between(attributes, "ring", 0, INT32_MAX);
    const bool slots = selection.kind != SelectionKind::kEvict &&  // places belong to slots
                       selection.kind != SelectionKind::kRetain;
    if (slots && ring > 0 && (form.window == 0 || ring < form.window)) {
      throw Error("attribute 'ring' is " + std::to_string(ring) +
                  "; a ring must hold the window, which is " + std::to_string(form.window) +
                  (form.window == 0 ? " (none)" : ""));
    }
    return ReadDense(form, ring, selection);
  }
  if (storage == "pages") {
    return std::make_unique<PageStorage>(form, ReadPages(attributes, form), selection);
  }
  throw Error("attribute 'storage' is '" + storage + "'; it must be one of 'dense', 'pages'");
}

}  // namespace effc
