// NEON: 16 weights a block, in natural order.
#include <arm_neon.h>

#include "cpu/product.h"

namespace effc {
namespace {

constexpr int64_t kAhead = 4096;  // bytes between use and prefetch of a word plane

struct Neon {
  using Vec = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kTileWidth = 4;  // rows of x in a dense tile
  static EFFC_INLINE Vec Zero() { return vdupq_n_f32(0); }
  static EFFC_INLINE Vec Load(const float* p) { return vld1q_f32(p); }
  static EFFC_INLINE void Store(float* p, Vec v) { vst1q_f32(p, v); }
  static EFFC_INLINE Vec Add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static EFFC_INLINE float Sum(Vec v) {
    const float32x2_t half = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(half, 0) + vget_lane_f32(half, 1);
  }
  static EFFC_INLINE void StoreNatural(float* p, Vec (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA { Store(p + 4 * j, v[j]); });
  }
};

EFFC_INLINE void KeepFirst(int64_t n, float32x4_t (&v)[4]) {
  const int32_t first[4] = {0, 1, 2, 3};
  const int32x4_t limit = vdupq_n_s32(static_cast<int32_t>(n));
  Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
    const uint32x4_t keep = vcltq_s32(vaddq_s32(vld1q_s32(first), vdupq_n_s32(4 * j)), limit);
    v[j] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v[j]), keep));
  });
}

EFFC_INLINE void JoinHalves(uint16x8_t high0, uint16x8_t high1, uint16x8_t low0, uint16x8_t low1,
                            float32x4_t (&v)[4]) {
  v[0] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
  v[1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
  v[2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
  v[3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
}

template <class Word, class Self>
struct RawReader {
  const Word* at;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    at = static_cast<const Word*>(w.raw) + row * w.columns - kTile;
  }
  EFFC_INLINE void StartTile(int64_t) {
    at += kTile;
    Unroll<2 * sizeof(Word)>([&](auto i) EFFC_INLINE_LAMBDA {
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead + 64 * i);
    });
  }
  template <int kB>
  EFFC_INLINE void Block(float32x4_t (&v)[4]) {
    Self::Get(at + 16 * kB, v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, float32x4_t (&v)[4]) {
    Word words[16] = {};
    std::memcpy(words, at + 16 * kB, n * sizeof(Word));
    Self::Get(words, v);
  }
};

template <Layout kLayout, Type kType>
struct Reader;

template <>
struct Reader<Layout::kRaw, Type::kBfloat16>
    : RawReader<uint16_t, Reader<Layout::kRaw, Type::kBfloat16>> {
  static EFFC_INLINE void Get(const uint16_t* p, float32x4_t (&v)[4]) {
    const uint16x8_t zero = vdupq_n_u16(0);
    JoinHalves(vld1q_u16(p), vld1q_u16(p + 8), zero, zero, v);
  }
};

template <>
struct Reader<Layout::kRaw, Type::kFloat> : RawReader<float, Reader<Layout::kRaw, Type::kFloat>> {
  static EFFC_INLINE void Get(const float* p, float32x4_t (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA { v[j] = vld1q_f32(p + 4 * j); });
  }
};

template <>
struct Reader<Layout::kRaw, Type::kFloat16>
    : RawReader<uint16_t, Reader<Layout::kRaw, Type::kFloat16>> {
  static EFFC_INLINE void Get(const uint16_t* p, float32x4_t (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      v[j] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * j)));
    });
  }
};

template <bool kLow>
struct RankPlanes {
  const uint8_t* sm;
  const uint16_t* low;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    sm = w.sign_mantissa + row * w.columns - kTile;
    if constexpr (kLow) low = w.low + row * w.columns - kTile;
  }
  EFFC_INLINE void StartTile() {
    sm += kTile;
    __builtin_prefetch(sm + kAhead);
    __builtin_prefetch(sm + kAhead + 64);
    if constexpr (kLow) {
      low += kTile;
      for (int i = 0; i < 4; ++i) __builtin_prefetch(low + kAhead / 2 + 32 * i);
    }
  }
  static EFFC_INLINE void Join(uint8x16_t e, const uint8_t* p, const uint16_t* halves,
                               float32x4_t (&v)[4]) {
    const uint8x16_t top = vdupq_n_u8(0x80);
    const uint8x16_t bytes = vld1q_u8(p);
    const uint8x16_t upper = vbslq_u8(top, bytes, vshrq_n_u8(e, 1));
    const uint8x16_t lower = vbslq_u8(top, vshlq_n_u8(e, 7), bytes);
    uint16x8_t low0 = vdupq_n_u16(0);
    uint16x8_t low1 = low0;
    if constexpr (kLow) {
      low0 = vld1q_u16(halves);
      low1 = vld1q_u16(halves + 8);
    }
    JoinHalves(vreinterpretq_u16_u8(vzip1q_u8(lower, upper)),
               vreinterpretq_u16_u8(vzip2q_u8(lower, upper)), low0, low1, v);
  }
  EFFC_INLINE void JoinBlock(int block, uint8x16_t e, float32x4_t (&v)[4]) const {
    Join(e, sm + 16 * block, kLow ? low + 16 * block : nullptr, v);
  }
  EFFC_INLINE void JoinPartial(int block, int64_t n, uint8x16_t e, float32x4_t (&v)[4]) const {
    uint8_t bytes[16] = {};
    uint16_t halves[16] = {};
    std::memcpy(bytes, sm + 16 * block, n);
    if constexpr (kLow) std::memcpy(halves, low + 16 * block, 2 * n);
    Join(e, bytes, halves, v);
    KeepFirst(n, v);
  }
};

template <Layout kLayout, Type kType>
struct RankReader {
  static constexpr bool kWide = kLayout == Layout::kRank4;
  static constexpr int64_t kTileBytes = kWide ? 64 : 48;
  RankPlanes<kType == Type::kFloat> planes;
  const uint8_t* codes;
  const uint8_t* escape;
  uint8x16_t table;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    planes.Open(w, row);
    codes = w.codes + row * w.code_stride - kTileBytes;
    escape = w.escapes + w.row_escapes[row];
    table = vld1q_u8(w.table);
  }
  EFFC_INLINE void StartTile(int64_t) {
    planes.StartTile();
    codes += kTileBytes;
    __builtin_prefetch(codes + kAhead / 2);
  }
  template <int kB>
  EFFC_INLINE uint8x16_t Codes() const {
    if constexpr (kWide) {
      const uint8x16_t pair = vld1q_u8(codes + 16 * (kB % 4));
      return kB < 4 ? vandq_u8(pair, vdupq_n_u8(15)) : vshrq_n_u8(pair, 4);
    }
    uint8_t spread[16];
    for (int i = 0; i < 16; ++i) {
      const uint8_t* p = codes + 6 * kB + i / 8 * 3;
      spread[i] = static_cast<uint8_t>((p[0] | p[1] << 8 | p[2] << 16) >> (i % 8 * 3) & 7);
    }
    return vld1q_u8(spread);
  }
  template <int kB>
  EFFC_INLINE uint8x16_t Exponents() {
    const uint8x16_t code = Codes<kB>();
    const uint8x16_t marker = vdupq_n_u8(kWide ? kRank4Escape : kRank3Escape);
    const uint8x16_t escaped = vceqq_u8(code, marker);
    uint8x16_t e = vqtbl1q_u8(table, code);
    if (__builtin_expect(vmaxvq_u8(escaped) != 0, !kWide)) {
      uint8_t bytes[16];
      uint8_t flags[16];
      vst1q_u8(bytes, e);
      vst1q_u8(flags, escaped);
      for (int i = 0; i < 16; ++i) {
        if (flags[i]) bytes[i] = *escape++;
      }
      e = vld1q_u8(bytes);
    }
    return e;
  }
  template <int kB>
  EFFC_INLINE void Block(float32x4_t (&v)[4]) {
    planes.JoinBlock(kB, Exponents<kB>(), v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, float32x4_t (&v)[4]) {
    planes.JoinPartial(kB, n, Exponents<kB>(), v);
  }
};

template <Type kType>
struct Reader<Layout::kRank4, kType> : RankReader<Layout::kRank4, kType> {};

template <Type kType>
struct Reader<Layout::kRank3, kType> : RankReader<Layout::kRank3, kType> {};

}  // namespace

const Kernels kNeonKernels = {
    "neon",          Neon::kLanes, Product<Neon, Reader>, Widen<Neon, Reader>,
    &kNeonAttention, &kNeonPanels};

}  // namespace effc
