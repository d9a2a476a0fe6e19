// Choice of the instruction set at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/panel.h"
#include "cpu/weight.h"

namespace effc {

// The functions one translation unit provides. x is permuted by PermuteX for `lanes`.
struct Kernels {
  const char* name;
  int lanes;
  // y[i * y_stride + row] = dot(x row i, weight row) for `m` rows of x and rows [begin, end).
  // `scratch` holds ScratchFloats(columns, m) floats.
  void (*product)(const WeightView& weight, const float* x, int64_t x_stride, int64_t m,
                  int64_t begin, int64_t end, float* y, int64_t y_stride, float* scratch);
  // Rows [begin, end) widened to fp32, in natural order, `stride` floats apart.
  void (*widen)(const WeightView& weight, int64_t begin, int64_t end, float* out, int64_t stride);
  const AttentionKernels* attention;
  const PanelKernels* panels;
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

// Instruction sets this machine can run, best first.
const std::vector<const Kernels*>& AvailableKernels();

// The active set: the best one, or what EFFC_ISA or SelectIsa asked for. Throws Error when
// EFFC_ISA names one that this machine lacks.
const Kernels& ActiveKernels();
void SelectIsa(const std::string& name);

inline int64_t PaddedColumns(int64_t columns) { return (columns + kTile - 1) / kTile * kTile; }

// Rows of x up to which a product accumulates in four registers a dot.
constexpr int64_t kFewRows = 4;

// Weight rows unpacked at a time for `m` rows of x: the panel stays in the first-level cache while
// few rows of x use it, and in the second-level cache otherwise.
inline int64_t PanelRows(int64_t columns, int64_t m) {
  const int64_t floats = int64_t{1} << (m <= 32 ? 12 : 17);
  const int64_t fitting = floats / PaddedColumns(columns) / 4 * 4;
  return fitting < 4 ? 4 : fitting > 64 ? 64 : fitting;
}

inline int64_t ScratchFloats(int64_t columns, int64_t m) {
  return m > kFewRows ? PanelRows(columns, m) * PaddedColumns(columns) : 0;
}

// Copies rows of x into the element order of the kernels, zero-padded to PaddedColumns.
void PermuteX(const float* x, int64_t m, int64_t columns, int lanes, float* out);

}  // namespace effc
