// Attention in plain C++.
#include <cmath>
#include <utility>

#include "cpu/attention_block.h"

namespace effc {
namespace {

struct Scalar {
  struct Vec {
    float f[4];
  };
  static constexpr int kLanes = 4;
  static constexpr int kDots = 8;
  static constexpr int kPanelRows = 2;
  static constexpr int kPanelVectors = 2;

  template <class Fn>
  static EFFC_INLINE Vec Each(Fn&& fn) {
    return {{fn(0), fn(1), fn(2), fn(3)}};
  }

  static EFFC_INLINE Vec Set(float x) { return {{x, x, x, x}}; }
  static EFFC_INLINE void Store(float* p, Vec v) { std::memcpy(p, v.f, sizeof(v.f)); }
  template <class Element>
  static EFFC_INLINE Vec Load(const Element* p) {
    return Each([&](int i) { return ToFloat(p[i]); });
  }
  template <class Element>
  static EFFC_INLINE Vec LoadFirst(const Element* p, int64_t n) {
    return Each([&](int i) { return i < n ? ToFloat(p[i]) : 0; });
  }
  static EFFC_INLINE float ToFloat(float x) { return x; }
  static EFFC_INLINE float ToFloat(Bfloat16 x) {
    return std::bit_cast<float>(uint32_t{x.bits} << 16);
  }
  static EFFC_INLINE float ToFloat(Half x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
    const uint32_t exponent = x.bits >> 10 & 31;
    const uint32_t mantissa = x.bits & 0x3FFu;
    uint32_t bits = (exponent + 112) << 23 | mantissa << 13;
    if (exponent == 0) bits = std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f);
    if (exponent == 31) bits = 0x7F800000 | mantissa << 13;
    return std::bit_cast<float>(sign | bits);
  }

  static EFFC_INLINE Vec Add(Vec a, Vec b) {
    return Each([&](int i) { return a.f[i] + b.f[i]; });
  }
  static EFFC_INLINE Vec Sub(Vec a, Vec b) {
    return Each([&](int i) { return a.f[i] - b.f[i]; });
  }
  static EFFC_INLINE Vec Mul(Vec a, Vec b) {
    return Each([&](int i) { return a.f[i] * b.f[i]; });
  }
  static EFFC_INLINE Vec Div(Vec a, Vec b) {
    return Each([&](int i) { return a.f[i] / b.f[i]; });
  }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) {
    return Each([&](int i) { return c.f[i] + a.f[i] * b.f[i]; });
  }
  // b where one of them is NaN.
  static EFFC_INLINE Vec Min(Vec a, Vec b) {
    return Each([&](int i) { return a.f[i] < b.f[i] ? a.f[i] : b.f[i]; });
  }
  static EFFC_INLINE Vec Max(Vec a, Vec b) {
    return Each([&](int i) { return a.f[i] > b.f[i] ? a.f[i] : b.f[i]; });
  }
  static EFFC_INLINE Vec Abs(Vec a) {
    return Each([&](int i) { return std::fabs(a.f[i]); });
  }
  static EFFC_INLINE Vec CopySign(Vec a, Vec sign) {
    return Each([&](int i) { return std::copysign(a.f[i], sign.f[i]); });
  }
  // x < limit ? yes : no
  static EFFC_INLINE Vec SelectBelow(Vec x, float limit, Vec yes, Vec no) {
    return Each([&](int i) { return x.f[i] < limit ? yes.f[i] : no.f[i]; });
  }
  // 2^n, where x = n + 1.5 * 2^23.
  static EFFC_INLINE Vec PowerOf2(Vec x) {
    return Each([&](int i) {
      return std::bit_cast<float>((std::bit_cast<uint32_t>(x.f[i]) << 23) + 0x3F800000);
    });
  }
  static EFFC_INLINE float Sum(Vec v) { return (v.f[0] + v.f[2]) + (v.f[1] + v.f[3]); }
  static EFFC_INLINE Vec SumEach(const Vec (&v)[4]) {
    return Each([&](int i) { return Sum(v[i]); });
  }
  static EFFC_INLINE void Transpose(Vec (&v)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) std::swap(v[i].f[j], v[j].f[i]);
    }
  }
};

}  // namespace

const AttentionKernels kScalarAttention = MakeAttention<Scalar>();

}  // namespace effc
