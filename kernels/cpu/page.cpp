#include "cpu/page.h"

#include <algorithm>
#include <array>
#include <bitset>

#include "cpu/isa.h"
#include "cpu/page_view.h"

namespace effc {
namespace {

int64_t Aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

void CheckRange(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw Error(std::string(name) + " is " + std::to_string(value) + " — give " +
              std::to_string(low) + " to " + std::to_string(high));
}

void CheckBits(const char* name, const int32_t (&bits)[2]) {
  for (const int32_t b : bits) {
    if (b == 2 || b == 4 || b == 8 || b == 16) continue;
    throw Error(std::string(name) + " has a class of " + std::to_string(b) +
                " bits — give 2, 4, 8 or 16");
  }
}

void CheckGroup(const char* name, int64_t group, bool one_group, const char* scheme) {
  if (group < 0 || group % 16 != 0) {
    throw Error(std::string(name) + " is " + std::to_string(group) +
                " — give 0 (all) or a multiple of 16");
  }
  if (group != 0 && one_group) {
    throw Error(std::string(name) + " is " + std::to_string(group) + ", but " + scheme +
                " have one group — give 0");
  }
}

void Check(const PageSpec& spec) {
  CheckRange("head_size", spec.head_size, 1, kMaxHeadSize);
  CheckRange("value_size", spec.value_size, 1, kMaxHeadSize);
  CheckRange("page", spec.page, 1, kMaxPage);
  CheckRange("salient", spec.salient, 0, spec.page);
  if (spec.salient % 16 != 0) {
    throw Error("salient is " + std::to_string(spec.salient) + " — give a multiple of 16");
  }
  CheckBits("key_bits", spec.key_bits);
  CheckBits("value_bits", spec.value_bits);
  CheckRange("key_scheme", static_cast<int64_t>(spec.key_scheme), 0, 1);
  CheckRange("value_scheme", static_cast<int64_t>(spec.value_scheme), 0, 1);
  CheckGroup("key_group", spec.key_group, spec.key_scheme == KeyScheme::kBalanced, "balanced keys");
  CheckGroup("value_group", spec.value_group, spec.value_scheme == ValueScheme::kSeparable,
             "separable values");
}

// A panel at offset `at`, which moves past it.
PanelLayout PlacePanel(int64_t rows, int64_t lanes, int32_t bits, PanelScheme scheme, int64_t group,
                       int64_t& at) {
  PanelLayout panel;
  panel.rows = rows;
  panel.lanes = lanes;
  panel.bits = bits;
  panel.scheme = bits == 16 ? PanelScheme::kPlain : scheme;
  panel.group = group == 0 || group > lanes || bits == 16 ? lanes : group;
  panel.groups = (lanes + panel.group - 1) / panel.group;
  panel.row_bytes = PanelPaddedLanes(lanes, bits) * bits / 8;
  if (bits < 16) {
    panel.parameters = scheme == PanelScheme::kRowFactor ? lanes : rows * panel.groups;
    panel.unit = at;
    at += Aligned(static_cast<int64_t>(sizeof(float)) + 4 * panel.parameters);
  }
  panel.codes = at;
  at += Aligned(rows * panel.row_bytes);
  return panel;
}

}  // namespace

PageLayout::PageLayout(const PageSpec& s)
    : spec(s), tokens{s.salient, s.page - s.salient}, first{0, s.salient} {
  Check(spec);
  const bool separable = spec.value_scheme == ValueScheme::kSeparable;
  const bool balanced = spec.key_scheme == KeyScheme::kBalanced;
  if (tokens[0] > 0 && tokens[1] > 0) marks = Reserve((spec.page + 7) / 8);
  if (separable) value_factor = Reserve(2 * spec.value_size);
  if (balanced) key_factor = Reserve(2 * spec.head_size);
  for (int c = 0; c < 2; ++c) {
    if (tokens[c] == 0) continue;
    keys[c] =
        PlacePanel(spec.head_size, tokens[c], spec.key_bits[c],
                   balanced ? PanelScheme::kRowFactor : PanelScheme::kRow, spec.key_group, bytes);
    values[c] = PlacePanel(tokens[c], spec.value_size, spec.value_bits[c],
                           separable ? PanelScheme::kLaneFactor : PanelScheme::kRow,
                           spec.value_group, bytes);
  }
}

int64_t PageLayout::Reserve(int64_t size) {
  const int64_t at = bytes;
  bytes += Aligned(size);
  return at;
}

int64_t PageScratchFloats(const PageLayout& layout, int64_t g) {
  int64_t most = 0;
  for (int c = 0; c < 2; ++c) {
    if (layout.tokens[c] == 0) continue;
    for (const PanelLayout* p : {&layout.keys[c], &layout.values[c]}) {
      most = std::max(most, PanelScratchFloats(p->lanes, p->bits, p->groups, g));
    }
  }
  return most;
}

void PageScores(const Kernels& kernels, const PageLayout& layout, const uint8_t* page,
                const float* queries, int64_t g, float* scores, int64_t stride, float* scratch) {
  for (int c = 0; c < 2; ++c) {
    if (layout.tokens[c] == 0) continue;
    kernels.panels->product(ViewPanel(layout.keys[c], page, layout.key_factor), queries,
                            layout.spec.head_size, g, false, scores + layout.first[c], stride,
                            scratch);
  }
}

void PageValues(const Kernels& kernels, const PageLayout& layout, const uint8_t* page,
                const float* probabilities, int64_t stride, int64_t g, float* out, float* scratch) {
  for (int c = 0; c < 2; ++c) {
    if (layout.tokens[c] == 0) continue;
    kernels.panels->product(ViewPanel(layout.values[c], page, layout.value_factor),
                            probabilities + layout.first[c], stride, g, true, out,
                            layout.spec.value_size, scratch);
  }
}

namespace {

// Channels of keys become rows of tokens, a few channels at a time.
void DecodeKeys(const Kernels& kernels, const PanelView& panel, float* keys) {
  constexpr int64_t kChannels = 16;
  float block[kChannels][kMaxPage];
  for (int64_t begin = 0; begin < panel.rows; begin += kChannels) {
    const int64_t end = std::min(begin + kChannels, panel.rows);
    kernels.panels->widen(panel, begin, end, block[0], kMaxPage);
    for (int64_t t = 0; t < panel.lanes; ++t) {
      float* const out = keys + t * panel.rows;
      for (int64_t c = begin; c < end; ++c) out[c] = block[c - begin][t];
    }
  }
}

}  // namespace

void DecodePage(const Kernels& kernels, const PageLayout& layout, const uint8_t* page, float* keys,
                float* values) {
  const int64_t width = layout.spec.value_size;
  for (int c = 0; c < 2; ++c) {
    if (layout.tokens[c] == 0) continue;
    if (keys != nullptr) {
      DecodeKeys(kernels, ViewPanel(layout.keys[c], page, layout.key_factor),
                 keys + layout.first[c] * layout.spec.head_size);
    }
    if (values != nullptr) {
      kernels.panels->widen(ViewPanel(layout.values[c], page, layout.value_factor), 0,
                            layout.tokens[c], values + layout.first[c] * width, width);
    }
  }
}

StoredOrder PageOrder(const PageLayout& layout, const uint8_t* page) {
  StoredOrder order;
  int64_t next[2] = {layout.first[0], layout.first[1]};
  for (int64_t i = 0; i < layout.spec.page; ++i) {
    const bool in_0 = !layout.two_classes() || (page[layout.marks + i / 8] >> (i % 8) & 1);
    order[next[in_0 ? 0 : 1]++] = static_cast<uint8_t>(i);
  }
  return order;
}

int64_t StoredPlace(const PageLayout& layout, const uint8_t* page, int64_t place) {
  if (!layout.two_classes()) return place;
  const uint8_t* const marks = page + layout.marks;
  int64_t before = 0;  // tokens of class 0
  for (int64_t i = 0; i < place / 8; ++i) before += std::bitset<8>(marks[i]).count();
  const unsigned last = marks[place / 8];
  before += std::bitset<8>(last & ((1U << (place % 8)) - 1)).count();
  const bool in_0 = last >> (place % 8) & 1;
  return in_0 ? before : layout.first[1] + place - before;
}

void DecodeValue(const Kernels& kernels, const PageLayout& layout, const uint8_t* page,
                 int64_t stored, float* value) {
  const int c = stored < layout.first[1] ? 0 : 1;
  const int64_t row = stored - layout.first[c];
  kernels.panels->widen(ViewPanel(layout.values[c], page, layout.value_factor), row, row + 1, value,
                        layout.spec.value_size);
}

void PrefetchValue(const PageLayout& layout, const uint8_t* page, int64_t stored) {
  constexpr int64_t kLineBytes = 64;
  const int c = stored < layout.first[1] ? 0 : 1;
  const PanelLayout& panel = layout.values[c];
  const PanelView view = ViewPanel(panel, page, layout.value_factor);
  const int64_t row = stored - layout.first[c];
  const uint8_t* const codes = view.codes + row * panel.row_bytes;
  for (int64_t i = 0; i < panel.row_bytes; i += kLineBytes) __builtin_prefetch(codes + i);
  __builtin_prefetch(codes + panel.row_bytes - 1);  // rows need not begin with a line
  if (panel.bits == 16) return;
  __builtin_prefetch(view.scales + row * panel.groups);
  __builtin_prefetch(view.minima + row * panel.groups);
}

}  // namespace effc
