// Plain C++: 16 weights a block.
#include <bit>

#include "cpu/product.h"

namespace effc {
namespace {

struct Scalar {
  struct Vec {
    float f[4];
  };
  static constexpr int kLanes = 4;
  static constexpr int kTileWidth = 2;  // rows of x in a dense tile
  static EFFC_INLINE Vec Zero() { return {}; }
  static EFFC_INLINE Vec Load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static EFFC_INLINE void Store(float* p, Vec v) { std::memcpy(p, v.f, sizeof(v.f)); }
  static EFFC_INLINE Vec Add(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.f[i] += b.f[i];
    return a;
  }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) {
    for (int i = 0; i < 4; ++i) c.f[i] += a.f[i] * b.f[i];
    return c;
  }
  static EFFC_INLINE float Sum(Vec v) { return (v.f[0] + v.f[2]) + (v.f[1] + v.f[3]); }
  static EFFC_INLINE void StoreNatural(float* p, Vec (&v)[4]) {
    for (int j = 0; j < 4; ++j) Store(p + 4 * j, v[j]);
  }
};

EFFC_INLINE float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }

// IEEE half to single; NaNs become quiet, as the hardware conversions make them.
EFFC_INLINE float FromHalf(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 0x3FFu;
  if (exponent == 31) {
    return FromBits(sign | 0x7F800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
  }
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return FromBits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Reads weights one by one; Self::Weight gives the bits of weight `k` of the row.
template <class Self>
struct OneByOne {
  int64_t tile = 0;

  EFFC_INLINE void StartTile(int64_t t) { tile = t; }
  template <int kB>
  EFFC_INLINE void Block(Scalar::Vec (&v)[4]) {
    PartialBlock<kB>(16, v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, Scalar::Vec (&v)[4]) {
    for (int64_t i = 0; i < 16; ++i) {
      v[i / 4].f[i % 4] = i < n ? static_cast<Self*>(this)->Weight(tile * kTile + kB * 16 + i) : 0;
    }
  }
};

template <Layout kLayout, Type kType>
struct Reader : OneByOne<Reader<kLayout, kType>> {
  static constexpr bool kWide = kLayout == Layout::kRank4;
  const WeightView* w;
  int64_t row;
  const uint8_t* codes;
  const uint8_t* escape;

  EFFC_INLINE void Open(const WeightView& weight, int64_t r) {
    w = &weight;
    row = r;
    codes = w->codes + r * w->code_stride;
    escape = w->escapes + w->row_escapes[r];
  }
  EFFC_INLINE int Code(int64_t k) const {
    if constexpr (kWide) {
      const uint8_t pair = codes[k / kTile * 64 + k % 64];
      return k % kTile < 64 ? pair & 15 : pair >> 4;
    }
    const uint8_t* p = codes + k / 8 * 3;
    return (p[0] | p[1] << 8 | p[2] << 16) >> (k % 8 * 3) & 7;
  }
  EFFC_INLINE float Weight(int64_t k) {
    const int code = Code(k);
    const uint32_t exponent =
        code == (kWide ? kRank4Escape : kRank3Escape) ? *escape++ : w->table[code];
    const int64_t at = row * w->columns + k;
    const uint32_t sm = w->sign_mantissa[at];
    uint32_t bits = (sm & 0x80) << 24 | exponent << 23 | (sm & 0x7F) << 16;
    if constexpr (kType == Type::kFloat) bits |= w->low[at];
    return FromBits(bits);
  }
};

template <Type kType>
struct Reader<Layout::kRaw, kType> : OneByOne<Reader<Layout::kRaw, kType>> {
  const void* words;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    words = static_cast<const char*>(w.raw) + row * w.columns * (kType == Type::kFloat ? 4 : 2);
  }
  EFFC_INLINE float Weight(int64_t k) const {
    if constexpr (kType == Type::kFloat) return static_cast<const float*>(words)[k];
    const uint16_t word = static_cast<const uint16_t*>(words)[k];
    return kType == Type::kFloat16 ? FromHalf(word) : FromBits(uint32_t{word} << 16);
  }
};

}  // namespace

const Kernels kScalarKernels = {
    "scalar",          Scalar::kLanes, Product<Scalar, Reader>, Widen<Scalar, Reader>,
    &kScalarAttention, &kScalarPanels};

}  // namespace effc
