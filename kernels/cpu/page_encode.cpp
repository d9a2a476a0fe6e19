#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/page.h"
#include "cpu/page_view.h"
#include "cpu/panel_float.h"

namespace effc {
namespace {

constexpr float kMaxBalance = 64;
constexpr int32_t kInfiniteBits = 0x7F800000;

using Maxima = std::array<int32_t, kMaxHeadSize>;  // of |x| per channel, as bits of floats

// The tokens of a page in stored order, null where nobody sees them.
struct StoredTokens {
  const float* keys[kMaxPage];
  const float* values[kMaxPage];
};

// Marks the most important valid tokens as class 0.
void MarkSalient(const PageLayout& layout, const uint8_t* valid, const float* importance,
                 uint8_t* marks) {
  const int64_t page = layout.spec.page;
  std::array<uint8_t, kMaxPage> ranked;
  for (int64_t i = 0; i < page; ++i) ranked[i] = static_cast<uint8_t>(i);
  const auto rank = [&](uint8_t i) {  // NaN would have no place in an order
    if (!valid[i]) return -HUGE_VAL;
    return std::isnan(importance[i]) ? -double{FLT_MAX} : double{importance[i]};
  };
  std::stable_sort(ranked.begin(), ranked.begin() + page,
                   [&](uint8_t a, uint8_t b) { return rank(a) > rank(b); });
  for (int64_t i = 0; i < layout.spec.salient; ++i) {
    marks[ranked[i] / 8] |= static_cast<uint8_t>(1 << ranked[i] % 8);
  }
}

// 2^(e - 15) with 2^e > max >= 2^(e - 1); at least the smallest normal float.
float UnitOf(float max) {
  if (max == 0) return 0x1p-15f;
  int exponent;
  std::frexp(max, &exponent);
  return std::ldexp(1.0f, std::max(exponent - 15, -126));
}

float FloatOf(int32_t bits) { return std::bit_cast<float>(bits); }

void StoreValueFactors(const Maxima& maxima, int64_t width, uint16_t* out) {
  for (int64_t c = 0; c < width; ++c) {
    out[c] = Bfloat16Above(maxima[c] == 0 ? 1.0f : std::sqrt(FloatOf(maxima[c])));
  }
}

void StoreKeyFactors(const Maxima& maxima, const float* query_max, int64_t width, uint16_t* out) {
  for (int64_t c = 0; c < width; ++c) {
    const float key = FloatOf(maxima[c]);
    float balance = 1;
    if (key != 0 && query_max[c] != 0) {
      balance = std::clamp(std::sqrt(query_max[c] / key), 1 / kMaxBalance, kMaxBalance);
    }
    out[c] = Bfloat16Nearest(1 / balance);
  }
}

// The largest |x| of a panel, after its division by the factors.
float LargestOf(const Maxima& maxima, int64_t width, const uint16_t* factors) {
  float largest = 0;
  for (int64_t c = 0; c < width; ++c) {
    const float max = FloatOf(maxima[c]);
    largest = std::max(largest, factors == nullptr ? max : max / Bfloat16ToFloat(factors[c]));
  }
  return largest;
}

bool AllFinite(const float* row, int64_t width) {
  return std::all_of(row, row + width, [](float x) { return std::isfinite(x); });
}

// Maxima of each class, and of both.
struct PageMaxima {
  Maxima of_class[2];
  Maxima all;

  void Measure(const Kernels& kernels, const PageLayout& layout, const float* const* rows,
               int64_t width) {
    std::fill_n(all.begin(), width, 0);
    for (int c = 0; c < 2; ++c) {
      std::fill_n(of_class[c].begin(), width, 0);
      kernels.panels->maxima({rows + layout.first[c], layout.tokens[c], width}, of_class[c].data());
      for (int64_t i = 0; i < width; ++i) all[i] = std::max(all[i], of_class[c][i]);
    }
  }

  bool finite(int64_t width) const {
    return std::all_of(all.begin(), all.begin() + width,
                       [](int32_t bits) { return bits < kInfiniteBits; });
  }
};

void EncodePanel(const Kernels& kernels, const PanelLayout& layout, const Maxima& maxima,
                 const TokenPointers& tokens, bool keys, int64_t factor, uint8_t* page) {
  const PanelTarget panel = OpenPanel(layout, page, factor);
  if (panel.scheme != PanelScheme::kPlain) {
    *panel.unit = UnitOf(LargestOf(maxima, tokens.width, panel.factors));
  }
  (keys ? kernels.panels->encode_keys : kernels.panels->encode_values)(panel, tokens);
}

int64_t FirstNotFinite(const PageLayout& layout, const float* const* keys,
                       const float* const* values, const uint8_t* valid) {
  for (int64_t i = 0; i < layout.spec.page; ++i) {
    if (!valid[i]) continue;
    if (!AllFinite(keys[i], layout.spec.head_size)) return i;
    if (!AllFinite(values[i], layout.spec.value_size)) return i;
  }
  return -1;
}

}  // namespace

int64_t EncodePage(const Kernels& kernels, const PageLayout& layout, const float* const* keys,
                   const float* const* values, const uint8_t* valid, const float* importance,
                   const float* query_max, uint8_t* page) {
  const int64_t head_size = layout.spec.head_size;
  const int64_t value_size = layout.spec.value_size;
  std::memset(page, 0, layout.bytes);
  if (layout.two_classes()) MarkSalient(layout, valid, importance, page + layout.marks);
  const StoredOrder order = PageOrder(layout, page);
  StoredTokens stored;
  for (int64_t i = 0; i < layout.spec.page; ++i) {
    stored.keys[i] = valid[order[i]] ? keys[order[i]] : nullptr;
    stored.values[i] = valid[order[i]] ? values[order[i]] : nullptr;
  }
  PageMaxima key_maxima;
  PageMaxima value_maxima;
  key_maxima.Measure(kernels, layout, stored.keys, head_size);
  value_maxima.Measure(kernels, layout, stored.values, value_size);
  if (!key_maxima.finite(head_size) || !value_maxima.finite(value_size)) {
    return FirstNotFinite(layout, keys, values, valid);
  }
  if (layout.value_factor >= 0) {
    StoreValueFactors(value_maxima.all, value_size,
                      reinterpret_cast<uint16_t*>(page + layout.value_factor));
  }
  if (layout.key_factor >= 0) {
    StoreKeyFactors(key_maxima.all, query_max, head_size,
                    reinterpret_cast<uint16_t*>(page + layout.key_factor));
  }
  for (int c = 0; c < 2; ++c) {
    const int64_t first = layout.first[c];
    const int64_t count = layout.tokens[c];
    if (count == 0) continue;
    EncodePanel(kernels, layout.keys[c], key_maxima.of_class[c],
                {stored.keys + first, count, head_size}, true, layout.key_factor, page);
    EncodePanel(kernels, layout.values[c], value_maxima.of_class[c],
                {stored.values + first, count, value_size}, false, layout.value_factor, page);
  }
  return -1;
}

}  // namespace effc
