// The pieces of attention for all instruction sets. Included by one translation unit per
// instruction set, which brings its vector class V.
//
// V has: Vec, kLanes, kDots (accumulators of a tile of dots, a multiple of kLanes and of 4),
// kPanelRows and kPanelVectors (the tile of a panel product); Load and LoadFirst from float,
// Half and Bfloat16; arithmetic; SumEach, the sums of kLanes vectors, all in one fixed order.
#pragma once

#include <bit>
#include <cstring>
#include <limits>

#include "cpu/attention.h"
#include "cpu/unroll.h"

namespace effc {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// Calls fn with a null pointer of the element type.
template <class Fn>
EFFC_INLINE void WithElement(Type type, Fn&& fn) {
  if (type == Type::kFloat) return fn(static_cast<const float*>(nullptr));
  if (type == Type::kFloat16) return fn(static_cast<const Half*>(nullptr));
  return fn(static_cast<const Bfloat16*>(nullptr));
}

// exp(x) for x <= 88, with a relative error of 1e-7; 0 below -87.3, where results are subnormal.
template <class V>
EFFC_INLINE typename V::Vec Exp(typename V::Vec x) {
  using Vec = typename V::Vec;
  const Vec magic = V::Set(0x1.8p23f);  // rounds to an integer in the low bits
  const Vec clamped = V::Max(V::Set(-88.0f), x);
  const Vec shifted = V::MulAdd(clamped, V::Set(0x1.715476p0f), magic);
  const Vec n = V::Sub(shifted, magic);
  Vec r = V::MulAdd(n, V::Set(-0.693359375f), clamped);  // ln 2 in two parts, the first exact
  r = V::MulAdd(n, V::Set(2.12194440e-4f), r);
  Vec p = V::Set(0x1.9f0770p-13f);  // (exp(r) - 1 - r) / r^2, weighted least maximum on |r| < 0.35
  p = V::MulAdd(p, r, V::Set(0x1.6d8e6ep-10f));
  p = V::MulAdd(p, r, V::Set(0x1.111274p-7f));
  p = V::MulAdd(p, r, V::Set(0x1.55548cp-5f));
  p = V::MulAdd(p, r, V::Set(0x1.555554p-3f));
  p = V::MulAdd(p, r, V::Set(0.5f));
  p = V::Add(V::Set(1.0f), V::MulAdd(V::Mul(r, r), p, r));
  return V::SelectBelow(x, -87.3f, V::Set(0), V::Mul(p, V::PowerOf2(shifted)));
}

template <class V>
EFFC_INLINE typename V::Vec Tanh(typename V::Vec x) {
  using Vec = typename V::Vec;
  const Vec a = V::Abs(x);
  const Vec z = V::Mul(a, a);
  Vec p = V::Set(0.0020646628f);  // (tanh(a) - a) / a^3, weighted least maximum on a < 0.65
  p = V::MulAdd(p, z, V::Set(-0.008091966f));
  p = V::MulAdd(p, z, V::Set(0.021666346f));
  p = V::MulAdd(p, z, V::Set(-0.053940564f));
  p = V::MulAdd(p, z, V::Set(0.13333158f));
  p = V::MulAdd(p, z, V::Set(-0.33333328f));
  const Vec small = V::MulAdd(V::Mul(z, a), p, a);
  const Vec e = Exp<V>(V::Min(V::Set(40.0f), V::Add(a, a)));
  const Vec large = V::Sub(V::Set(1), V::Div(V::Set(2), V::Add(e, V::Set(1))));
  return V::CopySign(V::SelectBelow(a, 0.625f, small, large), x);
}

// kM queries against kT tokens at `keys`, one accumulator a dot.
template <class V, class T, int kM, int kT>
EFFC_INLINE void DotTile(const float* q, int64_t q_stride, const T* const (&keys)[kT], int64_t d,
                         int64_t ahead, float* sums) {
  using Vec = typename V::Vec;
  constexpr int64_t kL = V::kLanes;
  Vec acc[kM * kT];
  Unroll<kM * kT>([&](auto i) EFFC_INLINE_LAMBDA { acc[i] = V::Set(0); });
  const auto step = [&](int64_t c, const Vec(&k)[kT]) EFFC_INLINE_LAMBDA {
    Unroll<kM>([&](auto m) EFFC_INLINE_LAMBDA {
      const Vec x = V::Load(q + m * q_stride + c);
      Unroll<kT>([&](auto t)
                     EFFC_INLINE_LAMBDA { acc[m * kT + t] = V::MulAdd(x, k[t], acc[m * kT + t]); });
    });
  };
  Vec k[kT];
  int64_t c = 0;
  for (; c + kL <= d; c += kL) {
    Unroll<kT>([&](auto t) EFFC_INLINE_LAMBDA {
      __builtin_prefetch(reinterpret_cast<const char*>(keys[t] + c) + ahead);
      k[t] = V::Load(keys[t] + c);
    });
    step(c, k);
  }
  if (c < d) {
    Unroll<kT>([&](auto t) EFFC_INLINE_LAMBDA { k[t] = V::LoadFirst(keys[t] + c, d - c); });
    step(c, k);
  }
  Unroll<kM * kT / kL>([&](auto i) EFFC_INLINE_LAMBDA {
    V::Store(sums + i * kL, V::SumEach(*reinterpret_cast<Vec(*)[kL]>(&acc[i * kL])));
  });
}

// kM queries against n tokens.
template <class V, class T, int kM>
EFFC_INLINE void DotRows(const float* q, int64_t q_stride, const T* keys, int64_t stride, int64_t n,
                         int64_t d, int64_t ahead, float* scores, int64_t score_stride) {
  constexpr int kT = V::kDots / kM;
  float sums[V::kDots];
  for (int64_t t = 0; t < n; t += kT) {
    const T* rows[kT];
    for (int64_t i = 0; i < kT; ++i) rows[i] = keys + (t + i < n ? t + i : n - 1) * stride;
    DotTile<V, T, kM, kT>(q, q_stride, rows, d, ahead, sums);
    const int64_t wanted = n - t < kT ? n - t : kT;
    for (int m = 0; m < kM; ++m) {
      if (wanted == kT) {
        std::memcpy(scores + m * score_stride + t, sums + m * kT, kT * sizeof(float));
      } else {
        std::memcpy(scores + m * score_stride + t, sums + m * kT, wanted * sizeof(float));
      }
    }
  }
}

template <class V, class T>
void ScoresOf(const float* q, int64_t q_stride, int64_t m, const T* keys, int64_t stride, int64_t n,
              int64_t d, float* scores, int64_t score_stride, int64_t ahead) {
  constexpr int64_t kChunk = 16;  // tokens that stay in the first-level cache for all queries
  for (int64_t t = 0; t < n; t += kChunk, keys += kChunk * stride) {
    const int64_t count = n - t < kChunk ? n - t : kChunk;
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
      DotRows<V, T, 4>(q + i * q_stride, q_stride, keys, stride, count, d, i == 0 ? ahead : 0,
                       scores + i * score_stride + t, score_stride);
    }
    for (; i + 2 <= m; i += 2) {
      DotRows<V, T, 2>(q + i * q_stride, q_stride, keys, stride, count, d, i == 0 ? ahead : 0,
                       scores + i * score_stride + t, score_stride);
    }
    for (; i < m; ++i) {
      DotRows<V, T, 1>(q + i * q_stride, q_stride, keys, stride, count, d, i == 0 ? ahead : 0,
                       scores + i * score_stride + t, score_stride);
    }
  }
}

// A tile of out (+)= weights * panel: kM rows, kC vectors of lanes; the last has `last` lanes.
template <class V, class T, int kM, int kC, bool kAdd, bool kPartial>
EFFC_INLINE void PanelTile(const float* w, int64_t w_stride, const T* panel, int64_t stride,
                           int64_t rows, int64_t last, float* out, int64_t out_stride,
                           int64_t ahead) {
  using Vec = typename V::Vec;
  constexpr int64_t kL = V::kLanes;
  Vec acc[kM][kC];
  Unroll<kM * kC>([&](auto i) EFFC_INLINE_LAMBDA {
    float* const at = out + i / kC * out_stride + i % kC * kL;
    acc[i / kC][i % kC] = kAdd ? V::Load(at) : V::Set(0);
  });
  for (int64_t r = 0; r < rows; ++r, panel += stride) {
    Vec p[kC];
    Unroll<kC>([&](auto c) EFFC_INLINE_LAMBDA {
      const T* const at = panel + c * kL;
      if constexpr (kPartial) {
        p[c] = V::LoadFirst(at, last);
      } else {
        p[c] = V::Load(at);
      }
    });
    if (ahead != 0) {
      Unroll<kC>([&](auto c) EFFC_INLINE_LAMBDA {
        __builtin_prefetch(reinterpret_cast<const char*>(panel + c * kL) + ahead);
      });
    }
    Unroll<kM>([&](auto m) EFFC_INLINE_LAMBDA {
      const Vec x = V::Set(w[m * w_stride + r]);
      Unroll<kC>([&](auto c) EFFC_INLINE_LAMBDA { acc[m][c] = V::MulAdd(x, p[c], acc[m][c]); });
    });
  }
  Unroll<kM * kC>([&](auto i) EFFC_INLINE_LAMBDA {
    V::Store(out + i / kC * out_stride + i % kC * kL, acc[i / kC][i % kC]);
  });
}

// kM rows of weights, all lanes. Rows of `out` have room for whole vectors.
template <class V, class T, int kM, bool kAdd>
void PanelRowsOf(const float* w, int64_t w_stride, const T* panel, int64_t stride, int64_t rows,
                 int64_t lanes, float* out, int64_t out_stride, int64_t ahead) {
  constexpr int64_t kL = V::kLanes;
  constexpr int kC = V::kPanelVectors;
  int64_t at = 0;
  for (; at + kC * kL <= lanes; at += kC * kL) {
    PanelTile<V, T, kM, kC, kAdd, false>(w, w_stride, panel + at, stride, rows, kL, out + at,
                                         out_stride, ahead);
  }
  for (; at + kL <= lanes; at += kL) {
    PanelTile<V, T, kM, 1, kAdd, false>(w, w_stride, panel + at, stride, rows, kL, out + at,
                                        out_stride, ahead);
  }
  if (at < lanes) {
    PanelTile<V, T, kM, 1, kAdd, true>(w, w_stride, panel + at, stride, rows, lanes - at, out + at,
                                       out_stride, ahead);
  }
}

template <class V, class T, bool kAdd>
void PanelProduct(const float* w, int64_t w_stride, int64_t m, const T* panel, int64_t stride,
                  int64_t rows, int64_t lanes, float* out, int64_t out_stride, int64_t ahead) {
  constexpr int kM = V::kPanelRows;
  int64_t i = 0;
  for (; i + kM <= m; i += kM) {
    PanelRowsOf<V, T, kM, kAdd>(w + i * w_stride, w_stride, panel, stride, rows, lanes,
                                out + i * out_stride, out_stride, i == 0 ? ahead : 0);
  }
  Unroll<kM - 1>([&](auto k) {
    if (m - i != k + 1) return;
    PanelRowsOf<V, T, k + 1, kAdd>(w + i * w_stride, w_stride, panel, stride, rows, lanes,
                                   out + i * out_stride, out_stride, i == 0 ? ahead : 0);
    i = m;
  });
}

template <class V>
void Scores(const float* queries, int64_t query_stride, int64_t m, const TokenRows& keys, int64_t n,
            int64_t d, float* scores, int64_t score_stride, int64_t ahead) {
  WithElement(keys.type, [&](auto* type) {
    ScoresOf<V>(queries, query_stride, m, static_cast<decltype(type)>(keys.data), keys.stride, n, d,
                scores, score_stride, ahead);
  });
}

template <class V>
void Values(const float* weights, int64_t weight_stride, int64_t m, const TokenRows& values,
            int64_t n, int64_t e, float* sums, int64_t sum_stride, int64_t ahead) {
  WithElement(values.type, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    PanelProduct<V, T, true>(weights, weight_stride, m, static_cast<const T*>(values.data),
                             values.stride, n, e, sums, sum_stride, ahead);
  });
}

template <class V, class T>
void TransposeOf(const T* keys, int64_t stride, int64_t n, int64_t d, int64_t at, float* panels) {
  constexpr int64_t kL = V::kLanes;
  for (int64_t t = 0; t < n;) {
    const int64_t token = at + t;
    float* const panel = panels + token / kPanelLanes * kPanelLanes * d + token % kPanelLanes;
    const bool whole = token % kL == 0 && t + kL <= n;
    int64_t c = 0;
    if (whole) {
      for (; c + kL <= d; c += kL) {
        typename V::Vec v[kL];
        Unroll<kL>([&](auto i) EFFC_INLINE_LAMBDA { v[i] = V::Load(keys + (t + i) * stride + c); });
        V::Transpose(v);
        Unroll<kL>([&](auto i)
                       EFFC_INLINE_LAMBDA { V::Store(panel + (c + i) * kPanelLanes, v[i]); });
      }
    }
    const int64_t count = whole ? kL : 1;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = c; j < d; ++j) {
        panel[j * kPanelLanes + i] = V::ToFloat(keys[(t + i) * stride + j]);
      }
    }
    t += count;
  }
}

template <class V>
void Transpose(const TokenRows& keys, int64_t n, int64_t d, int64_t at, float* panels) {
  WithElement(keys.type, [&](auto* type) {
    TransposeOf<V>(static_cast<decltype(type)>(keys.data), keys.stride, n, d, at, panels);
  });
}

template <class V>
void PanelScores(const float* queries, int64_t query_stride, int64_t m, const float* panels,
                 int64_t n, int64_t d, float* scores, int64_t score_stride) {
  for (int64_t t = 0; t < n; t += kPanelLanes) {
    PanelProduct<V, float, false>(queries, query_stride, m, panels + t * d, kPanelLanes, d,
                                  kPanelLanes, scores + t, score_stride, 0);
  }
}

// Scores with everything but masks: finite where the inputs are, so that only a bias can hide.
template <class V>
EFFC_INLINE void ShapeScores(float* s, const SlotBlock& block, const float* bias) {
  using Vec = typename V::Vec;
  constexpr int64_t kL = V::kLanes;
  const int64_t n = block.count;
  for (int64_t t = 0; t < n; t += kL) {
    Vec x = V::Mul(V::Load(s + t), V::Set(block.scale));
    x = V::Max(V::Set(-kLargest), V::Min(V::Set(kLargest), x));
    if (block.softcap > 0) {
      x = V::Mul(V::Set(block.softcap), Tanh<V>(V::Div(x, V::Set(block.softcap))));
    }
    if (bias != nullptr) {
      x = V::Add(x, t + kL <= n ? V::Load(bias + t) : V::LoadFirst(bias + t, n - t));
    }
    V::Store(s + t, x);
  }
}

inline void Hide(float* s, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) s[t] = -kInfinity;
}

template <class V>
EFFC_INLINE void Mask(float* s, const QueryRow& row, const SlotBlock& block, int64_t padded) {
  const int64_t first = row.begin - block.begin;
  const int64_t last = row.end - block.begin;
  if (first > 0) Hide(s, 0, first < padded ? first : padded);
  if (last < padded) Hide(s, last < 0 ? 0 : last < block.count ? last : block.count, padded);
  if (block.count < padded) Hide(s, block.count, padded);
  if (block.valid == nullptr) return;
  for (int64_t t = 0; t < block.count; ++t) {
    if (!block.valid[t]) s[t] = -kInfinity;
  }
}

template <class V>
EFFC_INLINE float MaxOf(const float* s, int64_t n) {
  typename V::Vec m = V::Load(s);
  for (int64_t t = V::kLanes; t < n; t += V::kLanes) m = V::Max(m, V::Load(s + t));
  float lanes[V::kLanes];
  V::Store(lanes, m);
  float best = lanes[0];
  for (int i = 1; i < V::kLanes; ++i) best = best < lanes[i] ? lanes[i] : best;
  return best;
}

template <class V>
float ExpOf(float x) {
  float lanes[V::kLanes];
  V::Store(lanes, Exp<V>(V::Set(x)));
  return lanes[0];
}

template <class V>
void Scale(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += V::kLanes) {
    V::Store(row + i, V::Mul(V::Load(row + i), V::Set(factor)));
  }
}

template <class V>
void Absorb(QueryRow* rows, int64_t m, const SlotBlock& block, float* scores, int64_t score_stride,
            float* sums, int64_t sum_stride, int64_t e) {
  constexpr int64_t kL = V::kLanes;
  const int64_t padded = (block.count + kL - 1) / kL * kL;
  for (int64_t i = 0; i < m; ++i) {
    QueryRow& row = rows[i];
    float* const s = scores + i * score_stride;
    const float* const bias = row.bias == nullptr ? nullptr : row.bias + block.begin;
    ShapeScores<V>(s, block, bias);
    Mask<V>(s, row, block, padded);
    const float seen = MaxOf<V>(s, padded);
    const float max = row.max < seen ? seen : row.max;
    const float base = max == -kInfinity ? 0 : max;
    if (max != row.max) {
      const float factor = ExpOf<V>(row.max - base);
      row.sum *= factor;
      Scale<V>(sums + i * sum_stride, e, factor);
    }
    typename V::Vec sum = V::Set(0);
    for (int64_t t = 0; t < padded; t += kL) {
      const typename V::Vec p = Exp<V>(V::Sub(V::Load(s + t), V::Set(base)));
      V::Store(s + t, p);
      sum = V::Add(sum, p);
    }
    row.max = max;
    row.sum += V::Sum(sum);
  }
}

// to[i] (+)= from[i] * factor
template <class V, bool kAdd>
EFFC_INLINE void AddScaled(const float* from, int64_t n, float factor, float* to) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    const auto x = V::Mul(V::Load(from + i), V::Set(factor));
    V::Store(to + i, kAdd ? V::Add(V::Load(to + i), x) : x);
  }
  for (; i < n; ++i) to[i] = kAdd ? to[i] + from[i] * factor : from[i] * factor;
}

// The largest |x| as bits, which NaN and infinity exceed.
EFFC_INLINE uint32_t LargestMagnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFF;
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest;
}

template <class V>
bool Finish(QueryRow* rows, int64_t row_stride, const float* sums, int64_t sum_stride,
            int64_t count, int64_t e, float* out) {
  float max = -kInfinity;
  for (int64_t p = 0; p < count; ++p) {
    const float next = rows[p * row_stride].max;
    max = max < next ? next : max;
  }
  const float base = max == -kInfinity ? 0 : max;
  float total = 0;
  for (int64_t p = 0; p < count; ++p) {
    const QueryRow& row = rows[p * row_stride];
    total += count == 1 ? row.sum : row.sum * ExpOf<V>(row.max - base);
  }
  const float scale = total == 0 ? 1 : 1 / total;
  for (int64_t p = 0; p < count; ++p) {
    const float part = count == 1 ? 1 : ExpOf<V>(rows[p * row_stride].max - base);
    const float* const from = sums + p * sum_stride;
    if (p == 0) {
      AddScaled<V, false>(from, e, part * scale, out);
    } else {
      AddScaled<V, true>(from, e, part * scale, out);
    }
  }
  rows[0].max = max;
  rows[0].sum = total;
  return total - total == 0 && LargestMagnitude(out, e) < 0x7F800000;
}

template <class V>
void WidenRow(const void* from, Type type, int64_t n, float* to) {
  WithElement(type, [&](auto* element) {
    const auto* p = static_cast<decltype(element)>(from);
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) V::Store(to + i, V::Load(p + i));
    for (; i < n; ++i) to[i] = V::ToFloat(p[i]);
  });
}

template <class V>
void TurnHalves(const TokenRows& rows, int64_t n, int64_t d, const float* cosines,
                const float* sines, int64_t half, float* out) {
  WithElement(rows.type, [&](auto* element) {
    const auto* p = static_cast<decltype(element)>(rows.data);
    for (int64_t t = 0; t < n; ++t, p += rows.stride, cosines += half, sines += half, out += d) {
      int64_t j = 0;
      for (; j + V::kLanes <= half; j += V::kLanes) {
        const typename V::Vec a = V::Load(p + j);
        const typename V::Vec b = V::Load(p + half + j);
        const typename V::Vec c = V::Load(cosines + j);
        const typename V::Vec s = V::Load(sines + j);
        V::Store(out + j, V::Sub(V::Mul(a, c), V::Mul(b, s)));
        V::Store(out + half + j, V::Add(V::Mul(b, c), V::Mul(a, s)));
      }
      for (; j < half; ++j) {
        const float a = V::ToFloat(p[j]);
        const float b = V::ToFloat(p[half + j]);
        out[j] = a * cosines[j] - b * sines[j];
        out[half + j] = b * cosines[j] + a * sines[j];
      }
      for (j = 2 * half; j < d; ++j) out[j] = V::ToFloat(p[j]);
    }
  });
}

// IEEE half, nearest even; larger numbers become infinity.
EFFC_INLINE uint16_t HalfOf(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t a = bits & 0x7FFFFFFF;
  // Adding 1/2 leaves a subnormal half, rounded, in the low bits.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3F000000;
  const uint32_t normal = (a + 0xFFF + (a >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t finite = a < 0x38800000 ? subnormal : normal;
  return static_cast<uint16_t>(sign | (a >= 0x477FF000 ? 0x7C00 : finite));
}

EFFC_INLINE uint16_t Bfloat16Of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <class V>
bool NarrowRow(const float* from, int64_t n, Type type, void* to) {
  const uint32_t largest = LargestMagnitude(from, n);
  auto* const words = static_cast<uint16_t*>(to);
  if (type == Type::kFloat) {
    std::memcpy(to, from, n * sizeof(float));
    return largest < 0x7F800000;
  }
  if (type == Type::kFloat16) {
    for (int64_t i = 0; i < n; ++i) words[i] = HalfOf(from[i]);
    return largest < 0x477FF000;
  }
  for (int64_t i = 0; i < n; ++i) words[i] = Bfloat16Of(from[i]);
  return largest < 0x7F7F8000;
}

template <class V>
constexpr AttentionKernels MakeAttention() {
  return {Scores<V>, Values<V>,     Transpose<V>, PanelScores<V>, Absorb<V>,
          Finish<V>, TurnHalves<V>, WidenRow<V>,  NarrowRow<V>};
}

}  // namespace
}  // namespace effc
