// AVX-512 (F, BW, VL, DQ, VBMI, VBMI2): 64 weights a block.
#include <immintrin.h>

#include "cpu/product.h"

namespace effc {
namespace {

constexpr int64_t kAhead = 8192;  // bytes between use and prefetch of a word plane

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileWidth = 4;  // rows of x in a dense tile
  static EFFC_INLINE Vec Zero() { return _mm512_setzero_ps(); }
  static EFFC_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
  static EFFC_INLINE void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static EFFC_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static EFFC_INLINE float Sum(Vec v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }

  // A 4 x 4 transpose of 128-bit lanes; its own inverse.
  static EFFC_INLINE void TransposeLanes(Vec (&v)[4]) {
    const Vec a = _mm512_shuffle_f32x4(v[0], v[1], 0x44);
    const Vec b = _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
    const Vec c = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
    const Vec d = _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_f32x4(a, c, 0xDD);
    v[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }

  static EFFC_INLINE void StoreNatural(float* p, Vec (&v)[4]) {
    Vec t[4] = {v[0], v[1], v[2], v[3]};
    TransposeLanes(t);
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA { Store(p + 16 * j, t[j]); });
  }
};

EFFC_INLINE __mmask64 FirstBits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

EFFC_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// 64 u16 as two vectors whose lanes meet the byte interleave of the rank readers:
// lane l of the first holds elements 16l..16l+7, of the second 16l+8..16l+15.
template <bool kPartial>
EFFC_INLINE void LoadHalves(const uint16_t* p, __mmask64 mask, __m512i (&out)[2]) {
  const __m512i a =
      kPartial ? _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), p) : _mm512_loadu_si512(p);
  const __m512i b = kPartial ? _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), p + 32)
                             : _mm512_loadu_si512(p + 32);
  out[0] = _mm512_shuffle_i64x2(a, b, 0x88);
  out[1] = _mm512_shuffle_i64x2(a, b, 0xDD);
}

// Floats of 64 weights from their upper and lower halves.
EFFC_INLINE void JoinHalves(const __m512i (&high)[2], const __m512i (&low)[2], __m512 (&v)[4]) {
  v[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[0], high[0]));
  v[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[0], high[0]));
  v[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[1], high[1]));
  v[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[1], high[1]));
}

template <Layout kLayout, Type kType>
struct Reader;

template <>
struct Reader<Layout::kRaw, Type::kBfloat16> {
  const uint16_t* at;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    at = static_cast<const uint16_t*>(w.raw) + row * w.columns - kTile;
  }
  EFFC_INLINE void StartTile(int64_t) {
    at += kTile;
    for (int i = 0; i < 4; ++i) Prefetch(at + kAhead / 2 + 32 * i);
  }
  template <int kB>
  EFFC_INLINE void Block(__m512 (&v)[4]) {
    Get<false>(at + 64 * kB, 0, v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m512 (&v)[4]) {
    Get<true>(at + 64 * kB, FirstBits(n), v);
  }
  template <bool kPartial>
  EFFC_INLINE void Get(const uint16_t* p, __mmask64 mask, __m512 (&v)[4]) {
    __m512i high[2];
    const __m512i zero[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    LoadHalves<kPartial>(p, mask, high);
    JoinHalves(high, zero, v);
  }
};

template <>
struct Reader<Layout::kRaw, Type::kFloat> {
  const float* at;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    at = static_cast<const float*>(w.raw) + row * w.columns - kTile;
  }
  EFFC_INLINE void StartTile(int64_t) {
    at += kTile;
    for (int i = 0; i < 8; ++i) Prefetch(at + kAhead / 4 + 16 * i);
  }
  template <int kB>
  EFFC_INLINE void Block(__m512 (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA { v[j] = Avx512::Load(at + 64 * kB + 16 * j); });
    Avx512::TransposeLanes(v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m512 (&v)[4]) {
    const __mmask64 mask = FirstBits(n);
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      v[j] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> (16 * j)), at + 64 * kB + 16 * j);
    });
    Avx512::TransposeLanes(v);
  }
};

template <>
struct Reader<Layout::kRaw, Type::kFloat16> {
  const uint16_t* at;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    at = static_cast<const uint16_t*>(w.raw) + row * w.columns - kTile;
  }
  EFFC_INLINE void StartTile(int64_t) {
    at += kTile;
    for (int i = 0; i < 4; ++i) Prefetch(at + kAhead / 2 + 32 * i);
  }
  template <int kB>
  EFFC_INLINE void Block(__m512 (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      v[j] = _mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 64 * kB + 16 * j)));
    });
    Avx512::TransposeLanes(v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m512 (&v)[4]) {
    const __mmask64 mask = FirstBits(n);
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      v[j] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask >> (16 * j)),
                                                      at + 64 * kB + 16 * j));
    });
    Avx512::TransposeLanes(v);
  }
};

// The sign_mantissa and low planes of a rank reader, and the join of all parts.
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
    Prefetch(sm + kAhead);
    Prefetch(sm + kAhead + 64);
    if constexpr (kLow) {
      low += kTile;
      for (int i = 0; i < 4; ++i) Prefetch(low + kAhead / 2 + 32 * i);
    }
  }
  template <bool kPartial>
  EFFC_INLINE __m512i SignMantissa(int block, __mmask64 mask) const {
    const uint8_t* p = sm + 64 * block;
    return kPartial ? _mm512_maskz_loadu_epi8(mask, p) : _mm512_loadu_si512(p);
  }
  // `upper` and `lower` are the bytes of the upper half of each weight.
  template <bool kPartial>
  EFFC_INLINE void Join(int block, __mmask64 mask, __m512i upper, __m512i lower,
                        __m512 (&v)[4]) const {
    if constexpr (kPartial) {
      upper = _mm512_maskz_mov_epi8(mask, upper);
      lower = _mm512_maskz_mov_epi8(mask, lower);
    }
    const __m512i high[2] = {_mm512_unpacklo_epi8(lower, upper),
                             _mm512_unpackhi_epi8(lower, upper)};
    __m512i low_half[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if constexpr (kLow) LoadHalves<kPartial>(low + 64 * block, mask, low_half);
    JoinHalves(high, low_half, v);
  }
};

EFFC_INLINE __m512i Top() { return _mm512_set1_epi8(static_cast<char>(0x80)); }

template <Type kType>
struct Reader<Layout::kRank4, kType> {
  RankPlanes<kType == Type::kFloat> planes;
  const uint8_t* codes;
  const uint8_t* escape;
  __m512i table_upper;  // exponent >> 1, four copies so that the upper index bits do not matter
  __m512i table_lower;  // exponent << 7
  __m512i upper[2];
  __m512i lower[2];

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    planes.Open(w, row);
    codes = w.codes + row * w.code_stride - kTile / 2;
    escape = w.escapes + w.row_escapes[row];
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)));
    table_upper = _mm512_andnot_si512(Top(), _mm512_srli_epi16(table, 1));
    table_lower = _mm512_and_si512(Top(), _mm512_slli_epi16(table, 7));
  }

  EFFC_INLINE void StartTile(int64_t) {
    planes.StartTile();
    codes += kTile / 2;
    Prefetch(codes + kAhead / 2);
    const __m512i pair = _mm512_loadu_si512(codes);
    const __m512i second = _mm512_srli_epi16(pair, 4);
    upper[0] = _mm512_permutexvar_epi8(pair, table_upper);
    lower[0] = _mm512_permutexvar_epi8(pair, table_lower);
    upper[1] = _mm512_permutexvar_epi8(second, table_upper);
    lower[1] = _mm512_permutexvar_epi8(second, table_lower);
    const __m512i nibble = _mm512_set1_epi8(15);
    const __mmask64 first_mask = _mm512_cmpeq_epi8_mask(_mm512_and_si512(pair, nibble), nibble);
    const __mmask64 second_mask =
        _mm512_cmpge_epu8_mask(pair, _mm512_set1_epi8(static_cast<char>(0xF0)));
    if (__builtin_expect(!_kortestz_mask64_u8(first_mask, second_mask), 0)) {
      Patch(first_mask, upper[0], lower[0]);
      Patch(second_mask, upper[1], lower[1]);
    }
  }

  EFFC_INLINE void Patch(__mmask64 mask, __m512i& up, __m512i& down) {
    const __m512i e = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(escape));
    escape += _mm_popcnt_u64(mask);
    up = _mm512_mask_mov_epi8(up, mask, _mm512_andnot_si512(Top(), _mm512_srli_epi16(e, 1)));
    down = _mm512_mask_mov_epi8(down, mask, _mm512_and_si512(Top(), _mm512_slli_epi16(e, 7)));
  }

  template <int kB>
  EFFC_INLINE void Block(__m512 (&v)[4]) {
    Get<kB, false>(0, v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m512 (&v)[4]) {
    Get<kB, true>(FirstBits(n), v);
  }
  template <int kB, bool kPartial>
  EFFC_INLINE void Get(__mmask64 mask, __m512 (&v)[4]) {
    const __m512i sm = planes.template SignMantissa<kPartial>(kB, mask);
    planes.template Join<kPartial>(
        kB, mask, _mm512_ternarylogic_epi64(upper[kB], sm, Top(), 0xF8),  // upper | (sm & top)
        _mm512_ternarylogic_epi64(lower[kB], sm, Top(), 0xF4), v);        // lower | (sm & ~top)
  }
};

template <Type kType>
struct Reader<Layout::kRank3, kType> {
  RankPlanes<kType == Type::kFloat> planes;
  const uint8_t* codes;
  const uint8_t* escape;
  __m512i table;   // eight copies
  __m512i spread;  // three bytes to each group of eight weights
  __m512i shifts;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    planes.Open(w, row);
    codes = w.codes + row * w.code_stride - 48;
    escape = w.escapes + w.row_escapes[row];
    int64_t entries;
    std::memcpy(&entries, w.table, 8);
    table = _mm512_set1_epi64(entries);
    spread = _mm512_set_epi64(0x1717171717171615, 0x1414141414141312, 0x111111111111100F,
                              0x0E0E0E0E0E0E0D0C, 0x0B0B0B0B0B0B0A09, 0x0808080808080706,
                              0x0505050505050403, 0x0202020202020100);
    shifts = _mm512_set1_epi64(0x15120F0C09060300);
  }

  EFFC_INLINE void StartTile(int64_t) {
    planes.StartTile();
    codes += 48;
    Prefetch(codes + kAhead * 3 / 8);
  }

  template <int kB>
  EFFC_INLINE void Block(__m512 (&v)[4]) {
    Get<kB, false>(0, v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m512 (&v)[4]) {
    Get<kB, true>(FirstBits(n), v);
  }
  template <int kB, bool kPartial>
  EFFC_INLINE void Get(__mmask64 mask, __m512 (&v)[4]) {
    const __m512i packed = _mm512_castsi256_si512(_mm256_maskz_loadu_epi64(7, codes + 24 * kB));
    const __m512i code =
        _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, packed));
    const __mmask64 escaped = _mm512_testn_epi8_mask(code, _mm512_set1_epi8(7));
    const __m512i e = _mm512_mask_expand_epi8(_mm512_permutexvar_epi8(code, table), escaped,
                                              _mm512_loadu_si512(escape));
    escape += _mm_popcnt_u64(escaped);
    const __m512i sm = planes.template SignMantissa<kPartial>(kB, mask);
    planes.template Join<kPartial>(
        kB, mask,
        _mm512_ternarylogic_epi64(_mm512_srli_epi16(e, 1), sm, Top(), 0xD8),      // top ? sm : e
        _mm512_ternarylogic_epi64(_mm512_slli_epi16(e, 7), sm, Top(), 0xE4), v);  // top ? e : sm
  }
};

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512",          Avx512::kLanes, Product<Avx512, Reader>, Widen<Avx512, Reader>,
    &kAvx512Attention, &kAvx512Panels};

}  // namespace effc
