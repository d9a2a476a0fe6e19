// The one product algorithm of all instruction sets and layouts. Included by one translation unit
// per instruction set, which brings its vector class V and a reader of weights for each layout.
//
// A block is 4 * V::kLanes weights in four vectors; vector j, lane 4 * l + i holds weight
// 16 * l + 4 * j + i of the block. Every reader delivers this order, so all layouts of a weight
// take part in the same additions in the same order.
#pragma once

#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/unroll.h"

namespace effc {
namespace {

template <class V>
constexpr int64_t kBlock = 4 * V::kLanes;

template <class V>
constexpr int kBlocksPerTile = kTile / kBlock<V>;

// Walks one weight row: fn(offset, the vectors of a block).
template <class V, class Reader, class Fn>
EFFC_INLINE void Walk(Reader& reader, int64_t columns, Fn&& fn) {
  constexpr int64_t kB = kBlock<V>;
  const int64_t tiles = columns / kTile;
  typename V::Vec v[4];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    reader.StartTile(tile);
    Unroll<kBlocksPerTile<V>>([&](auto b) EFFC_INLINE_LAMBDA {
      reader.template Block<b>(v);
      fn(tile * kTile + b * kB, v);
    });
  }
  const int64_t rest = columns - tiles * kTile;
  if (rest == 0) return;
  reader.StartTile(tiles);
  Unroll<kBlocksPerTile<V>>([&](auto b) EFFC_INLINE_LAMBDA {
    const int64_t left = rest - b * kB;
    if (left <= 0) return;
    if (left >= kB) {
      reader.template Block<b>(v);
    } else {
      reader.template PartialBlock<b>(left, v);
    }
    fn(tiles * kTile + b * kB, v);
  });
}

// kM rows of x, four accumulators a dot.
template <class V, class Reader, int kM>
void FewRows(const WeightView& w, const float* x, int64_t x_stride, int64_t begin, int64_t end,
             float* y, int64_t y_stride) {
  for (int64_t row = begin; row < end; ++row) {
    Reader reader;
    reader.Open(w, row);
    typename V::Vec acc[kM][4];
    Unroll<kM * 4>([&](auto i) EFFC_INLINE_LAMBDA { acc[i / 4][i % 4] = V::Zero(); });
    Walk<V>(reader, w.columns, [&](int64_t k, auto& v) EFFC_INLINE_LAMBDA {
      Unroll<kM * 4>([&](auto i) EFFC_INLINE_LAMBDA {
        const typename V::Vec xv = V::Load(x + i / 4 * x_stride + k + i % 4 * V::kLanes);
        acc[i / 4][i % 4] = V::MulAdd(v[i % 4], xv, acc[i / 4][i % 4]);
      });
    });
    Unroll<kM>([&](auto m) EFFC_INLINE_LAMBDA {
      auto& a = acc[m];
      y[m * y_stride + row] = V::Sum(V::Add(V::Add(a[0], a[1]), V::Add(a[2], a[3])));
    });
  }
}

// kRows unpacked weight rows against kM rows of x, one accumulator a dot.
template <class V, int kRows, int kM>
EFFC_INLINE void DenseTile(const float* w, int64_t w_stride, const float* x, int64_t x_stride,
                           int64_t length, float* y, int64_t y_stride) {
  typename V::Vec acc[kRows][kM];
  Unroll<kRows * kM>([&](auto i) EFFC_INLINE_LAMBDA { acc[i / kM][i % kM] = V::Zero(); });
  for (int64_t k = 0; k < length; k += V::kLanes) {
    typename V::Vec xv[kM];
    Unroll<kM>([&](auto m) EFFC_INLINE_LAMBDA { xv[m] = V::Load(x + m * x_stride + k); });
    Unroll<kRows>([&](auto r) EFFC_INLINE_LAMBDA {
      const typename V::Vec wv = V::Load(w + r * w_stride + k);
      Unroll<kM>([&](auto m) EFFC_INLINE_LAMBDA { acc[r][m] = V::MulAdd(wv, xv[m], acc[r][m]); });
    });
  }
  Unroll<kRows * kM>([&](auto i) EFFC_INLINE_LAMBDA {
    y[i % kM * y_stride + i / kM] = V::Sum(acc[i / kM][i % kM]);
  });
}

// A panel of unpacked weight rows against kM rows of x.
template <class V, int kM>
EFFC_INLINE void DensePanel(const float* w, int64_t w_stride, int64_t rows, const float* x,
                            int64_t x_stride, int64_t length, float* y, int64_t y_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    DenseTile<V, 4, kM>(w + r * w_stride, w_stride, x, x_stride, length, y + r, y_stride);
  }
  for (; r < rows; ++r) {
    DenseTile<V, 1, kM>(w + r * w_stride, w_stride, x, x_stride, length, y + r, y_stride);
  }
}

template <class V, class Reader>
void UnpackRow(const WeightView& w, int64_t row, float* out) {
  Reader reader;
  reader.Open(w, row);
  Walk<V>(reader, w.columns, [&](int64_t k, auto& v) EFFC_INLINE_LAMBDA {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA { V::Store(out + k + j * V::kLanes, v[j]); });
  });
}

// Any number of rows of x: panels of the weight are unpacked once, then used by all of them. A dot
// is one accumulator along the row, so the cut into panels and tiles does not change any bit.
template <class V, class Reader>
void ManyRows(const WeightView& w, const float* x, int64_t x_stride, int64_t m, int64_t begin,
              int64_t end, float* y, int64_t y_stride, float* scratch) {
  const int64_t stride = PaddedColumns(w.columns);
  const int64_t length = (w.columns + kBlock<V> - 1) / kBlock<V> * kBlock<V>;
  const int64_t panel = PanelRows(w.columns, m);
  for (int64_t row = begin; row < end; row += panel) {
    const int64_t rows = end - row < panel ? end - row : panel;
    for (int64_t r = 0; r < rows; ++r) UnpackRow<V, Reader>(w, row + r, scratch + r * stride);
    float* const out = y + row;
    int64_t i = 0;
    for (; i + V::kTileWidth <= m; i += V::kTileWidth) {
      DensePanel<V, V::kTileWidth>(scratch, stride, rows, x + i * x_stride, x_stride, length,
                                   out + i * y_stride, y_stride);
    }
    for (; i < m; ++i) {
      DensePanel<V, 1>(scratch, stride, rows, x + i * x_stride, x_stride, length,
                       out + i * y_stride, y_stride);
    }
  }
}

template <class V, class Reader>
void ProductWith(const WeightView& w, const float* x, int64_t x_stride, int64_t m, int64_t begin,
                 int64_t end, float* y, int64_t y_stride, float* scratch) {
  switch (m) {
    case 0:
      return;
    case 1:
      return FewRows<V, Reader, 1>(w, x, x_stride, begin, end, y, y_stride);
    case 2:
      return FewRows<V, Reader, 2>(w, x, x_stride, begin, end, y, y_stride);
    case 3:
      return FewRows<V, Reader, 3>(w, x, x_stride, begin, end, y, y_stride);
    case 4:
      return FewRows<V, Reader, 4>(w, x, x_stride, begin, end, y, y_stride);
    default:
      return ManyRows<V, Reader>(w, x, x_stride, m, begin, end, y, y_stride, scratch);
  }
}

template <class V, class Reader>
void WidenWith(const WeightView& w, int64_t begin, int64_t end, float* out, int64_t stride) {
  for (int64_t row = begin; row < end; ++row, out += stride) {
    Reader reader;
    reader.Open(w, row);
    Walk<V>(reader, w.columns, [&](int64_t k, auto& v) EFFC_INLINE_LAMBDA {
      if (w.columns - k >= kBlock<V>) {
        V::StoreNatural(out + k, v);
      } else {
        float block[kBlock<V>];
        V::StoreNatural(block, v);
        std::memcpy(out + k, block, (w.columns - k) * sizeof(float));
      }
    });
  }
}

// Calls fn with the reader type of the weight.
template <template <Layout, Type> class Reader, class Fn>
EFFC_INLINE void Dispatch(const WeightView& w, Fn&& fn) {
  if (w.layout == Layout::kRank4) {
    if (w.low != nullptr) return fn(static_cast<Reader<Layout::kRank4, Type::kFloat>*>(nullptr));
    return fn(static_cast<Reader<Layout::kRank4, Type::kBfloat16>*>(nullptr));
  }
  if (w.layout == Layout::kRank3) {
    if (w.low != nullptr) return fn(static_cast<Reader<Layout::kRank3, Type::kFloat>*>(nullptr));
    return fn(static_cast<Reader<Layout::kRank3, Type::kBfloat16>*>(nullptr));
  }
  if (w.dtype == Type::kFloat) return fn(static_cast<Reader<Layout::kRaw, Type::kFloat>*>(nullptr));
  if (w.dtype == Type::kFloat16) {
    return fn(static_cast<Reader<Layout::kRaw, Type::kFloat16>*>(nullptr));
  }
  return fn(static_cast<Reader<Layout::kRaw, Type::kBfloat16>*>(nullptr));
}

template <class V, template <Layout, Type> class Reader>
void Product(const WeightView& w, const float* x, int64_t x_stride, int64_t m, int64_t begin,
             int64_t end, float* y, int64_t y_stride, float* scratch) {
  Dispatch<Reader>(w, [&](auto* reader) {
    ProductWith<V, std::remove_pointer_t<decltype(reader)>>(w, x, x_stride, m, begin, end, y,
                                                            y_stride, scratch);
  });
}

template <class V, template <Layout, Type> class Reader>
void Widen(const WeightView& w, int64_t begin, int64_t end, float* out, int64_t stride) {
  Dispatch<Reader>(w, [&](auto* reader) {
    WidenWith<V, std::remove_pointer_t<decltype(reader)>>(w, begin, end, out, stride);
  });
}

}  // namespace
}  // namespace effc
