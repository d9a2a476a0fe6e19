// Products with coded panels, for all instruction sets and codes. Included by one translation unit
// per instruction set, which brings its unit of 16 floats V::Unit.
//
// Parameters stay outside of the inner loop: a row's scale is folded into its weight, minima into
// one constant per group, factors and parameters of lanes are applied to the sums. The inner loop
// only adds weight * code. Every sum runs over the rows in order, whatever the tile.
#pragma once

#include <cstring>

#include "cpu/panel.h"
#include "cpu/panel_float.h"
#include "cpu/unroll.h"

namespace effc {
namespace {

typedef uint16_t EightHalves __attribute__((vector_size(16)));

template <int kBits>
constexpr int kFields = kBits < 16 ? 8 / kBits : 1;  // units of 16 lanes in a word

template <int kBits>
constexpr int kWordBytes = kBits < 16 ? 16 : 32;

// Floats of the folded weights of a group: [query][row].
template <int kQueries>
constexpr int64_t kGroupWeights = kQueries * kFoldedRows;

struct TileInput {
  const uint8_t* codes;  // of the first row, lane 0
  int64_t row_bytes;
  int64_t rows;
  const uint8_t* ahead;  // what the next product will read
  const float* weights;
  int64_t group;  // lanes
  int64_t groups;
  float* sums;
  int64_t stride;  // of sums
};

// Adds to the sums of kQueries queries and kUnits units from `unit` on; kField is unit % kFields
// where a tile is narrower than a word.
template <class V, int kBits, int kQueries, int kUnits, int kField, bool kGrouped>
void Tile(const TileInput& in, int64_t unit) {
  constexpr int kF = kFields<kBits>;
  constexpr int kWords = kUnits < kF ? 1 : kUnits / kF;
  typename V::Unit acc[kQueries][kUnits];
  float* const sums = in.sums + unit * 16;
  Unroll<kQueries * kUnits>([&](auto i) EFFC_INLINE_LAMBDA {
    acc[i / kUnits][i % kUnits] = V::Load(sums + i / kUnits * in.stride + i % kUnits * 16);
  });
  const float* weights[kGrouped ? kUnits : 1] = {in.weights};
  if constexpr (kGrouped) {
    for (int u = 0; u < kUnits; ++u) {
      const int64_t at = (unit + u) * 16 / in.group;
      const int64_t group = at < in.groups ? at : in.groups - 1;
      weights[u] = in.weights + group * kGroupWeights<kQueries>;
    }
  }
  // While its columns are used, as many bytes of the next panel are fetched.
  constexpr int64_t kAhead = kUnits * kWordBytes<kBits> / kF;
  const uint8_t* ahead = in.ahead + unit * in.rows * kWordBytes<kBits> / kF;
  const uint8_t* codes = in.codes + unit / kF * kWordBytes<kBits>;
  for (int64_t row = 0; row < in.rows; ++row, codes += in.row_bytes, ahead += kAhead) {
    for (int64_t line = 0; line < kAhead; line += 64) V::Prefetch(ahead + line);
    Unroll<kWords>([&](auto w) EFFC_INLINE_LAMBDA {
      const auto word = V::template LoadWord<kBits>(codes + w * kWordBytes<kBits>);
      Unroll<kUnits / kWords>([&](auto f) EFFC_INLINE_LAMBDA {
        constexpr int kUnit = w * (kUnits / kWords) + f;
        const typename V::Unit x = V::template Field<kBits, kField + f>(word);
        Unroll<kQueries>([&](auto q) EFFC_INLINE_LAMBDA {
          const float* const weight = weights[kGrouped ? kUnit : 0] + row + q * kFoldedRows;
          acc[q][kUnit] = V::MulAdd(x, V::Broadcast(weight), acc[q][kUnit]);
        });
      });
    });
  }
  Unroll<kQueries * kUnits>([&](auto i) EFFC_INLINE_LAMBDA {
    V::Store(sums + i / kUnits * in.stride + i % kUnits * 16, acc[i / kUnits][i % kUnits]);
  });
}

// Tiles of whole words: as many of kUnits units as fit, then narrower ones.
template <class V, int kBits, int kQueries, int kUnits, bool kGrouped>
EFFC_INLINE void WideTiles(const TileInput& in, int64_t unit, int64_t units) {
  for (; unit + kUnits <= units; unit += kUnits) {
    Tile<V, kBits, kQueries, kUnits, 0, kGrouped>(in, unit);
  }
  if constexpr (kUnits / 2 >= kFields<kBits>) {
    WideTiles<V, kBits, kQueries, kUnits / 2, kGrouped>(in, unit, units);
  }
}

// All units of 16 lanes.
template <class V, int kBits, int kQueries, bool kGrouped>
void Tiles(const TileInput& in, int64_t lanes) {
  constexpr int kF = kFields<kBits>;
  constexpr int kUnits = V::TileUnits(kQueries);
  const int64_t units = (lanes + 15) / 16;
  if constexpr (kUnits >= kF) {
    WideTiles<V, kBits, kQueries, kUnits, kGrouped>(in, 0, (units + kF - 1) / kF * kF);
  } else {
    for (int64_t unit = 0; unit < units; unit += kF) {
      Unroll<kF / kUnits>([&](auto part) EFFC_INLINE_LAMBDA {
        constexpr int kField = part * kUnits;
        if (unit + kField >= units) return;
        Tile<V, kBits, kQueries, kUnits, kField, kGrouped>(in, unit + kField);
      });
    }
  }
}

template <class V>
EFFC_INLINE typename V::Unit LoadFirst(const float* p, int64_t count) {
  if (count >= 16) return V::Load(p);
  float padded[16] = {};
  std::memcpy(padded, p, count * sizeof(float));
  return V::Load(padded);
}

template <class V>
EFFC_INLINE typename V::Unit WidenFirst(const uint16_t* p, int64_t count, bool half) {
  uint16_t padded[16] = {};
  if (count < 16) std::memcpy(padded, p, count * sizeof(uint16_t));
  const uint16_t* const from = count < 16 ? padded : p;
  return half ? V::WidenHalf(from) : V::WidenBfloat16(from);
}

// Memory of a product: sums of up to kHeldQueries queries, and what is needed to make them.
struct ProductMemory {
  int64_t stride;    // of sums
  float* sums;       // [queries][stride]
  float* constants;  // [queries][groups]
  float* scales;     // [groups][kFoldedRows]: what the weight of a row is multiplied by
  float* minima;     // [groups][kFoldedRows]: what it adds to the constant
  float* folded;     // [groups][queries of a tile][kFoldedRows]
};

// Parameters of 16 rows, [16][groups], as floats at out[group * kFoldedRows + row].
template <class V>
EFFC_INLINE void SplitAnyGroups(const uint16_t* halves, typename V::Unit unit, int64_t groups,
                                float* out) {
  float wide[16 * kMaxGroups];
  for (int64_t i = 0; i < 16 * groups; i += 16) {
    V::Store(wide + i, V::Mul(V::WidenHalf(halves + i), unit));
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < 16; ++r) out[g * kFoldedRows + r] = wide[r * groups + g];
  }
}

// The elements of even and of odd index of kCount vectors, the even ones first.
template <int kCount>
EFFC_INLINE void PartPairs(EightHalves* v) {
  EightHalves parted[kCount];
  Unroll<kCount / 2>([&](auto i) EFFC_INLINE_LAMBDA {
    const EightHalves a = v[2 * i], b = v[2 * i + 1];
    parted[i] = __builtin_shuffle(a, b, EightHalves{0, 2, 4, 6, 8, 10, 12, 14});
    parted[i + kCount / 2] = __builtin_shuffle(a, b, EightHalves{1, 3, 5, 7, 9, 11, 13, 15});
  });
  Unroll<kCount>([&](auto i) EFFC_INLINE_LAMBDA { v[i] = parted[i]; });
}

// Parts kGroups interleaved groups of two vectors each; group g of the first is g * step + first.
template <class V, int kGroups>
EFFC_INLINE void StoreParts(EightHalves* v, typename V::Unit unit, int first, int step,
                            float* out) {
  if constexpr (kGroups == 1) {
    V::Store(out + first * kFoldedRows, V::Mul(V::WidenHalves(v[0], v[1]), unit));
  } else {
    PartPairs<2 * kGroups>(v);
    StoreParts<V, kGroups / 2>(v, unit, first, 2 * step, out);
    StoreParts<V, kGroups / 2>(v + kGroups, unit, first + step, 2 * step, out);
  }
}

// The same for a power of two of groups, in registers.
template <class V, int kGroups>
EFFC_INLINE void SplitGroups(const uint16_t* halves, typename V::Unit unit, float* out) {
  EightHalves v[2 * kGroups];
  Unroll<2 * kGroups>([&](auto i) EFFC_INLINE_LAMBDA { std::memcpy(&v[i], halves + 8 * i, 16); });
  StoreParts<V, kGroups>(v, unit, 0, 1, out);
}

// Bytes from a panel to the next one of the same kind, parameters included: what is read now is
// fetched that far ahead.
EFFC_INLINE int64_t PanelBytes(const PanelView& panel) {
  const int64_t parameters = panel.scheme == PanelScheme::kPlain       ? 0
                             : panel.scheme == PanelScheme::kRowFactor ? panel.lanes
                                                                       : panel.rows * panel.groups;
  return panel.rows * panel.row_bytes + 4 * parameters;
}

// One kind of parameters of `rows` rows as floats, group by group, padded with zeros to 16 rows.
template <class V>
void WidenParameters(const uint16_t* halves, float unit, int64_t groups, int64_t rows, float* out) {
  const typename V::Unit units = V::Broadcast(&unit);
  for (int64_t r = 0; r < rows; r += 16, halves += 16 * groups, out += 16) {
    uint16_t padded[16 * kMaxGroups];
    const uint16_t* from = halves;
    if (rows - r < 16) {
      std::memset(padded, 0, 16 * groups * sizeof(uint16_t));
      std::memcpy(padded, halves, (rows - r) * groups * sizeof(uint16_t));
      from = padded;
    }
    switch (groups) {
      case 1:
        V::Store(out, V::Mul(V::WidenHalf(from), units));
        break;
      case 2:
        SplitGroups<V, 2>(from, units, out);
        break;
      case 4:
        SplitGroups<V, 4>(from, units, out);
        break;
      case 8:
        SplitGroups<V, 8>(from, units, out);
        break;
      default:
        SplitAnyGroups<V>(from, units, groups, out);
    }
  }
}

template <class V>
void LoadParameters(const PanelView& panel, int64_t begin, int64_t rows, ProductMemory& memory) {
  if (panel.scheme == PanelScheme::kPlain) return;
  const auto* const next = reinterpret_cast<const uint8_t*>(panel.scales) + PanelBytes(panel);
  for (int64_t byte = 0; byte < 4 * rows * panel.groups; byte += 64) V::Prefetch(next + byte);
  if (panel.scheme == PanelScheme::kRowFactor) {
    for (int64_t r = 0; r < rows; r += 16) {
      V::Store(memory.scales + r, WidenFirst<V>(panel.factors + begin + r, rows - r, false));
    }
    std::memcpy(memory.minima, memory.scales, (rows + 15) / 16 * 16 * sizeof(float));
    return;
  }
  const int64_t at = begin * panel.groups;
  WidenParameters<V>(panel.scales + at, *panel.unit, panel.groups, rows, memory.scales);
  WidenParameters<V>(panel.minima + at, *panel.unit, panel.groups, rows, memory.minima);
}

// Folds the parameters of a group into the weights of one query, and returns its constant.
template <class V>
__attribute__((noinline)) float Fold(const float* weights, int64_t rows, const float* scales,
                                     const float* minima, float* folded) {
  typename V::Unit sum = V::Zero();
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16) {
    const typename V::Unit weight = V::Load(weights + r);
    V::Store(folded + r, V::Mul(weight, V::Load(scales + r)));
    sum = V::MulAdd(weight, V::Load(minima + r), sum);
  }
  if (r < rows) {
    const typename V::Unit weight = LoadFirst<V>(weights + r, rows - r);
    V::Store(folded + r, V::Mul(weight, V::Load(scales + r)));
    sum = V::MulAdd(weight, V::Load(minima + r), sum);
  }
  return V::Sum(sum);
}

// Adds to sums and constants what kQueries queries give for the rows at hand.
template <class V, int kBits, int kQueries>
void AddRows(const PanelView& panel, const float* weights, int64_t weight_stride, int64_t begin,
             int64_t rows, int64_t query, ProductMemory& memory) {
  for (int64_t g = 0; g < panel.groups; ++g) {
    for (int64_t q = 0; q < kQueries; ++q) {
      const float* const from = weights + q * weight_stride + begin;
      float* const to = memory.folded + (g * kQueries + q) * kFoldedRows;
      if constexpr (kBits == 16) {
        std::memcpy(to, from, rows * sizeof(float));
      } else {
        memory.constants[(query + q) * panel.groups + g] += Fold<V>(
            from, rows, memory.scales + g * kFoldedRows, memory.minima + g * kFoldedRows, to);
      }
    }
  }
  const TileInput input = {panel.codes + begin * panel.row_bytes,
                           panel.row_bytes,
                           rows,
                           panel.codes + PanelBytes(panel),
                           memory.folded,
                           panel.group,
                           panel.groups,
                           memory.sums + query * memory.stride,
                           memory.stride};
  if (panel.groups > 1) {
    Tiles<V, kBits, kQueries, true>(input, panel.lanes);
  } else {
    Tiles<V, kBits, kQueries, false>(input, panel.lanes);
  }
}

// Cuts `count` queries into tiles of sizes that have a kernel.
template <class V, int kBits>
void AddQueries(const PanelView& panel, const float* weights, int64_t stride, int64_t count,
                int64_t begin, int64_t rows, ProductMemory& memory) {
  for (int64_t q = 0; q < count;) {
    const float* const from = weights + q * stride;
    const int64_t left = count - q;
    const auto add = [&](auto queries) EFFC_INLINE_LAMBDA {
      AddRows<V, kBits, queries>(panel, from, stride, begin, rows, q, memory);
      q += queries;
    };
    using std::integral_constant;
    if (V::kMaxQueries >= 8 && left >= 8) {
      add(integral_constant<int, V::kMaxQueries >= 8 ? 8 : 1>{});
    } else if (V::kMaxQueries >= 6 && left >= 6 && left != 7) {
      add(integral_constant<int, V::kMaxQueries >= 6 ? 6 : 1>{});
    } else if (left >= 4 && left != 5) {
      add(integral_constant<int, 4>{});
    } else if (left >= 3) {
      add(integral_constant<int, 3>{});
    } else if (left == 2) {
      add(integral_constant<int, 2>{});
    } else {
      add(integral_constant<int, 1>{});
    }
  }
}

// The finished sums of lanes [begin, end) of one query, of which `constant` is that of the group.
template <class V>
EFFC_INLINE void Finish(const PanelView& panel, const float* sums, float constant, int64_t begin,
                        int64_t end, bool add, float* out) {
  const typename V::Unit constants = V::Broadcast(&constant);
  for (int64_t lane = begin; lane < end; lane += 16) {
    const int64_t count = end - lane;
    typename V::Unit x = V::Load(sums + lane);
    if (panel.scheme == PanelScheme::kRowFactor) {
      const typename V::Unit unit = V::Broadcast(panel.unit);
      const auto scale = V::Mul(WidenFirst<V>(panel.scales + lane, count, true), unit);
      const auto minimum = V::Mul(WidenFirst<V>(panel.minima + lane, count, true), unit);
      x = V::MulAdd(x, scale, V::Mul(minimum, constants));
    } else if (panel.scheme != PanelScheme::kPlain) {
      x = V::Add(x, constants);
    }
    if (panel.scheme == PanelScheme::kLaneFactor) {
      x = V::Mul(x, WidenFirst<V>(panel.factors + lane, count, false));
    }
    if (add) x = V::Add(x, LoadFirst<V>(out + lane, count));
    if (count >= 16) {
      V::Store(out + lane, x);
    } else {
      float last[16];
      V::Store(last, x);
      std::memcpy(out + lane, last, count * sizeof(float));
    }
  }
}

template <class V>
void FinishQuery(const PanelView& panel, const float* sums, const float* constants, bool add,
                 float* out) {
  for (int64_t g = 0; g < panel.groups; ++g) {
    const int64_t begin = g * panel.group;
    const int64_t end = begin + panel.group < panel.lanes ? begin + panel.group : panel.lanes;
    Finish<V>(panel, sums, constants[g], begin, end, add, out);
  }
}

template <class V, int kBits>
void ProductOf(const PanelView& panel, const float* weights, int64_t weight_stride, int64_t m,
               bool add, float* out, int64_t out_stride, float* scratch) {
  ProductMemory memory;
  memory.stride = PanelPaddedLanes(panel.lanes, kBits);
  const int64_t held = m < kHeldQueries ? m : kHeldQueries;
  memory.sums = scratch;
  memory.constants = memory.sums + held * memory.stride;
  memory.scales = memory.constants + held * panel.groups;
  memory.minima = memory.scales + panel.groups * kFoldedRows;
  memory.folded = memory.minima + panel.groups * kFoldedRows;
  for (int64_t q = 0; q < m; q += kHeldQueries) {
    const int64_t count = m - q < kHeldQueries ? m - q : kHeldQueries;
    std::memset(scratch, 0, held * (memory.stride + panel.groups) * sizeof(float));
    for (int64_t begin = 0; begin < panel.rows; begin += kFoldedRows) {
      const int64_t rows = panel.rows - begin < kFoldedRows ? panel.rows - begin : kFoldedRows;
      LoadParameters<V>(panel, begin, rows, memory);
      AddQueries<V, kBits>(panel, weights + q * weight_stride, weight_stride, count, begin, rows,
                           memory);
    }
    for (int64_t i = 0; i < count; ++i) {
      FinishQuery<V>(panel, memory.sums + i * memory.stride, memory.constants + i * panel.groups,
                     add, out + (q + i) * out_stride);
    }
  }
}

template <class V>
void PanelProduct(const PanelView& panel, const float* weights, int64_t weight_stride, int64_t m,
                  bool add, float* out, int64_t out_stride, float* scratch) {
  switch (panel.bits) {
    case 2:
      return ProductOf<V, 2>(panel, weights, weight_stride, m, add, out, out_stride, scratch);
    case 4:
      return ProductOf<V, 4>(panel, weights, weight_stride, m, add, out, out_stride, scratch);
    case 8:
      return ProductOf<V, 8>(panel, weights, weight_stride, m, add, out, out_stride, scratch);
    default:
      return ProductOf<V, 16>(panel, weights, weight_stride, m, add, out, out_stride, scratch);
  }
}

// Decodes a row, 16 lanes at a time from the first on; those past the last lane have no meaning.
template <class V>
class RowDecoder {
 public:
  RowDecoder(const PanelView& panel, int64_t row) : panel_(panel), row_(row) {
    if (panel.scheme != PanelScheme::kPlain) unit_ = *panel.unit;
  }

  EFFC_INLINE typename V::Unit Next(int64_t lane, typename V::Unit code) {
    if (panel_.scheme == PanelScheme::kPlain) return code;
    const int64_t left = panel_.lanes - lane;
    if (panel_.scheme == PanelScheme::kRowFactor) {
      const auto unit = V::Broadcast(&unit_);
      const float factor = Bfloat16ToFloat(panel_.factors[row_]);
      const auto scale = V::Mul(WidenFirst<V>(panel_.scales + lane, left, true), unit);
      const auto minimum = V::Mul(WidenFirst<V>(panel_.minima + lane, left, true), unit);
      return V::Mul(V::Add(V::Mul(code, scale), minimum), V::Broadcast(&factor));
    }
    if (lane >= group_end_) OpenGroup();
    const auto x = V::Add(V::Mul(code, V::Broadcast(&scale_)), V::Broadcast(&minimum_));
    if (panel_.scheme == PanelScheme::kRow) return x;
    return V::Mul(x, WidenFirst<V>(panel_.factors + lane, left, false));
  }

 private:
  EFFC_INLINE void OpenGroup() {
    const int64_t at = row_ * panel_.groups + group_++;
    scale_ = HalfToFloat(panel_.scales[at]) * unit_;
    minimum_ = HalfToFloat(panel_.minima[at]) * unit_;
    group_end_ += panel_.group;
  }

  const PanelView& panel_;
  const int64_t row_;
  float unit_ = 1;
  float scale_ = 0;
  float minimum_ = 0;
  int64_t group_ = 0;
  int64_t group_end_ = 0;  // lane
};

template <class V, int kBits>
void WidenRow(const PanelView& panel, int64_t row, float* out) {
  constexpr int kF = kFields<kBits>;
  RowDecoder<V> decoder(panel, row);
  const uint8_t* codes = panel.codes + row * panel.row_bytes;
  for (int64_t lane = 0; lane < panel.lanes; lane += 16 * kF, codes += kWordBytes<kBits>) {
    const auto word = V::template LoadWord<kBits>(codes);
    Unroll<kF>([&](auto f) EFFC_INLINE_LAMBDA {
      const int64_t at = lane + 16 * f;
      const int64_t left = panel.lanes - at;
      if (left <= 0) return;
      const auto x = decoder.Next(at, V::template Field<kBits, f>(word));
      if (left >= 16) return V::Store(out + at, x);
      float last[16];
      V::Store(last, x);
      std::memcpy(out + at, last, left * sizeof(float));
    });
  }
}

template <class V>
void PanelWiden(const PanelView& panel, int64_t begin, int64_t end, float* out, int64_t stride) {
  for (int64_t row = begin; row < end; ++row, out += stride) {
    switch (panel.bits) {
      case 2:
        WidenRow<V, 2>(panel, row, out);
        break;
      case 4:
        WidenRow<V, 4>(panel, row, out);
        break;
      case 8:
        WidenRow<V, 8>(panel, row, out);
        break;
      default:
        WidenRow<V, 16>(panel, row, out);
    }
  }
}

}  // namespace
}  // namespace effc
