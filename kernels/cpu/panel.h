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

// Pointers into a page. Plain data: shared with every ISA's translation unit.
struct PanelView {
  PanelScheme scheme;
  int32_t bits;
  int64_t rows;
  int64_t lanes;
  int64_t group;   // lanes that share parameters, a multiple of 16 or all lanes
  int64_t groups;  // of a row
  const uint8_t* codes;
  int64_t row_bytes;
  float unit;
  const uint16_t* scales;   // float16, [rows][groups] or [lanes]
  const uint16_t* minima;   // the same
  const uint16_t* factors;  // bfloat16, [lanes] or [rows]
};

// The functions one translation unit provides for panels.
struct PanelKernels {
  // out[i * out_stride + lane] is set to, or with `add` grows by, the sum over rows of
  // weights[i * weight_stride + row] * value(row, lane), for m rows of weights. `scratch` holds
  // PanelScratchFloats(panel, m) floats.
  void (*product)(const PanelView& panel, const float* weights, int64_t weight_stride, int64_t m,
                  bool add, float* out, int64_t out_stride, float* scratch);
  // Rows [begin, end) widened to fp32, `stride` floats apart.
  void (*widen)(const PanelView& panel, int64_t begin, int64_t end, float* out, int64_t stride);
};

extern const PanelKernels kScalarPanels;
extern const PanelKernels kAvx2Panels;
extern const PanelKernels kAvx512Panels;
extern const PanelKernels kNeonPanels;

}  // namespace effc
