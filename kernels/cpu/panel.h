// A coded panel: rows of 16-lane words with parameters, the one operand of products with pages.
#pragma once

#include <cstdint>

namespace effc {

// How a code becomes a value.
enum class PanelScheme : int32_t {
  kPlain,       // bfloat16
  kRow,         // code * scale[row, group] + minimum[row, group]
  kLaneFactor,  // (code * scale[row] + minimum[row]) * factor[lane]
  kRowFactor,   // (code * scale[lane] + minimum[lane]) * factor[row]
};

// A panel within a page. Plain data: shared with every ISA's translation unit.
template <class Byte, class Half, class Float>
struct PanelPointers {
  PanelScheme scheme;
  int32_t bits;
  int64_t rows;
  int64_t lanes;
  int64_t group;   // lanes that share parameters: a multiple of 16, or all lanes
  int64_t groups;  // of a row
  Byte* codes;
  int64_t row_bytes;
  Float* unit;
  Half* scales;             // float16, [rows][groups] or [lanes]
  Half* minima;             // the same
  const uint16_t* factors;  // bfloat16, [lanes] or [rows]
};
using PanelView = PanelPointers<const uint8_t, const uint16_t, const float>;
using PanelTarget = PanelPointers<uint8_t, uint16_t, float>;

// Tokens to encode: rows of floats, null for the invalid ones.
struct TokenPointers {
  const float* const* rows;
  int64_t count;
  int64_t width;
};

// The functions one translation unit provides for panels.
struct PanelKernels {
  // out[i * out_stride + lane] is set to, or with `add` grows by, the sum over rows of
  // weights[i * weight_stride + row] * value(row, lane), for m rows of weights. `scratch` holds
  // PanelScratchFloats floats.
  void (*product)(const PanelView& panel, const float* weights, int64_t weight_stride, int64_t m,
                  bool add, float* out, int64_t out_stride, float* scratch);
  // Rows [begin, end) widened to fp32, `stride` floats apart.
  void (*widen)(const PanelView& panel, int64_t begin, int64_t end, float* out, int64_t stride);
  // maxima[c] grows to the largest |x| of channel c, as the bits of a float: finite values order
  // like integers, below infinities and NaNs.
  void (*maxima)(const TokenPointers& tokens, int32_t* maxima);
  // Writes codes, scales and minima; reads unit and factors. Tokens are the lanes of a panel of
  // keys and the rows of a panel of values.
  void (*encode_keys)(const PanelTarget& panel, const TokenPointers& tokens);
  void (*encode_values)(const PanelTarget& panel, const TokenPointers& tokens);
};

extern const PanelKernels kScalarPanels;
extern const PanelKernels kAvx2Panels;
extern const PanelKernels kAvx512Panels;
extern const PanelKernels kNeonPanels;

constexpr int64_t kMaxGroups = 256;   // of a row: kMaxHeadSize / 16
constexpr int64_t kFoldedRows = 256;  // rows whose weights are folded at a time
constexpr int64_t kHeldQueries = 32;  // rows of weights whose sums are held at a time
constexpr int64_t kTileQueries = 8;   // rows of weights a tile takes at most

inline int64_t PanelPaddedLanes(int64_t lanes, int64_t bits) {
  const int64_t word = bits < 16 ? 16 * 8 / bits : 16;
  return (lanes + word - 1) / word * word;
}

// Sums and constants of the queries, then parameters and folded weights of each group.
inline int64_t PanelScratchFloats(int64_t lanes, int64_t bits, int64_t groups, int64_t m) {
  const int64_t held = m < kHeldQueries ? m : kHeldQueries;
  return held * (PanelPaddedLanes(lanes, bits) + groups) +
         groups * kFoldedRows * (2 + kTileQueries);
}

}  // namespace effc
