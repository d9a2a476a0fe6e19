// AVX2 with FMA, F16C and BMI2: 32 weights a block.
#include <immintrin.h>

#include <cstring>

#include "cpu/product.h"

namespace effc {
namespace {

constexpr int64_t kAhead = 8192;  // bytes between use and prefetch of a word plane

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTileWidth = 3;  // rows of x in a dense tile
  static EFFC_INLINE Vec Zero() { return _mm256_setzero_ps(); }
  static EFFC_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
  static EFFC_INLINE void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static EFFC_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static EFFC_INLINE float Sum(Vec v) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }

  // Natural order to block order: lanes [0 4], [1 5], [2 6], [3 7] of the eight 128-bit lanes.
  static EFFC_INLINE void FromNatural(Vec (&v)[4]) {
    const Vec a = v[0], b = v[1], c = v[2], d = v[3];
    v[0] = _mm256_permute2f128_ps(a, c, 0x20);
    v[1] = _mm256_permute2f128_ps(a, c, 0x31);
    v[2] = _mm256_permute2f128_ps(b, d, 0x20);
    v[3] = _mm256_permute2f128_ps(b, d, 0x31);
  }

  static EFFC_INLINE void StoreNatural(float* p, Vec (&v)[4]) {
    Store(p, _mm256_permute2f128_ps(v[0], v[1], 0x20));
    Store(p + 8, _mm256_permute2f128_ps(v[2], v[3], 0x20));
    Store(p + 16, _mm256_permute2f128_ps(v[0], v[1], 0x31));
    Store(p + 24, _mm256_permute2f128_ps(v[2], v[3], 0x31));
  }
};

EFFC_INLINE __m256i LoadBytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

EFFC_INLINE void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Zeroes the weights from index n on; v is in block order.
EFFC_INLINE void KeepFirst(int64_t n, __m256 (&v)[4]) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(n));
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19);
  Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
    const __m256i keep =
        _mm256_cmpgt_epi32(limit, _mm256_add_epi32(index, _mm256_set1_epi32(4 * j)));
    v[j] = _mm256_and_ps(v[j], _mm256_castsi256_ps(keep));
  });
}

// Lane 0 of the first: elements 0..7, lane 1: 16..23; of the second: 8..15 and 24..31.
EFFC_INLINE void LoadHalves(const uint16_t* p, __m256i (&out)[2]) {
  const __m256i a = LoadBytes(p);
  const __m256i b = LoadBytes(p + 16);
  out[0] = _mm256_permute2x128_si256(a, b, 0x20);
  out[1] = _mm256_permute2x128_si256(a, b, 0x31);
}

EFFC_INLINE void JoinHalves(const __m256i (&high)[2], const __m256i (&low)[2], __m256 (&v)[4]) {
  v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[0], high[0]));
  v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[0], high[0]));
  v[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[1], high[1]));
  v[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[1], high[1]));
}

// A raw weight row of 2- or 4-byte words.
template <class Word, class Self>
struct RawReader {
  const Word* at;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    at = static_cast<const Word*>(w.raw) + row * w.columns - kTile;
  }
  EFFC_INLINE void StartTile(int64_t) {
    at += kTile;
    Unroll<2 * sizeof(Word)>([&](auto i) EFFC_INLINE_LAMBDA {
      Prefetch(reinterpret_cast<const char*>(at) + kAhead + 64 * i);
    });
  }
  template <int kB>
  EFFC_INLINE void Block(__m256 (&v)[4]) {
    Self::Get(at + 32 * kB, v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m256 (&v)[4]) {
    Word words[32] = {};
    std::memcpy(words, at + 32 * kB, n * sizeof(Word));
    Self::Get(words, v);
  }
};

template <Layout kLayout, Type kType>
struct Reader;

template <>
struct Reader<Layout::kRaw, Type::kBfloat16>
    : RawReader<uint16_t, Reader<Layout::kRaw, Type::kBfloat16>> {
  static EFFC_INLINE void Get(const uint16_t* p, __m256 (&v)[4]) {
    __m256i high[2];
    const __m256i zero[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    LoadHalves(p, high);
    JoinHalves(high, zero, v);
  }
};

template <>
struct Reader<Layout::kRaw, Type::kFloat> : RawReader<float, Reader<Layout::kRaw, Type::kFloat>> {
  static EFFC_INLINE void Get(const float* p, __m256 (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA { v[j] = Avx2::Load(p + 8 * j); });
    Avx2::FromNatural(v);
  }
};

template <>
struct Reader<Layout::kRaw, Type::kFloat16>
    : RawReader<uint16_t, Reader<Layout::kRaw, Type::kFloat16>> {
  static EFFC_INLINE void Get(const uint16_t* p, __m256 (&v)[4]) {
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      v[j] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * j)));
    });
    Avx2::FromNatural(v);
  }
};

EFFC_INLINE __m256i Top() { return _mm256_set1_epi8(static_cast<char>(0x80)); }

// The bytes of the upper half of 32 weights whose exponents are known.
struct Upper {
  __m256i upper;  // exponent >> 1
  __m256i lower;  // exponent << 7
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
    Prefetch(sm + kAhead);
    Prefetch(sm + kAhead + 64);
    if constexpr (kLow) {
      low += kTile;
      for (int i = 0; i < 4; ++i) Prefetch(low + kAhead / 2 + 32 * i);
    }
  }
  static EFFC_INLINE void Join(const Upper& e, const uint8_t* p, const uint16_t* halves,
                               __m256 (&v)[4]) {
    const __m256i bytes = LoadBytes(p);
    const __m256i upper = _mm256_or_si256(e.upper, _mm256_and_si256(bytes, Top()));
    const __m256i lower = _mm256_or_si256(e.lower, _mm256_andnot_si256(Top(), bytes));
    const __m256i high[2] = {_mm256_unpacklo_epi8(lower, upper),
                             _mm256_unpackhi_epi8(lower, upper)};
    __m256i low_half[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if constexpr (kLow) LoadHalves(halves, low_half);
    JoinHalves(high, low_half, v);
  }
  EFFC_INLINE void JoinBlock(int block, const Upper& e, __m256 (&v)[4]) const {
    Join(e, sm + 32 * block, kLow ? low + 32 * block : nullptr, v);
  }
  EFFC_INLINE void JoinPartial(int block, int64_t n, const Upper& e, __m256 (&v)[4]) const {
    uint8_t bytes[32] = {};
    uint16_t halves[32] = {};
    std::memcpy(bytes, sm + 32 * block, n);
    if constexpr (kLow) std::memcpy(halves, low + 32 * block, 2 * n);
    Join(e, bytes, halves, v);
    KeepFirst(n, v);
  }
};

template <Type kType>
struct Reader<Layout::kRank4, kType> {
  RankPlanes<kType == Type::kFloat> planes;
  const uint8_t* codes;
  const uint8_t* escape;
  __m256i table_upper;
  __m256i table_lower;
  __m256i pairs[2];

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    planes.Open(w, row);
    codes = w.codes + row * w.code_stride - kTile / 2;
    escape = w.escapes + w.row_escapes[row];
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)));
    table_upper = _mm256_andnot_si256(Top(), _mm256_srli_epi16(table, 1));
    table_lower = _mm256_and_si256(Top(), _mm256_slli_epi16(table, 7));
  }
  EFFC_INLINE void StartTile(int64_t) {
    planes.StartTile();
    codes += kTile / 2;
    Prefetch(codes + kAhead / 2);
    pairs[0] = LoadBytes(codes);
    pairs[1] = LoadBytes(codes + 32);
  }
  template <int kB>
  EFFC_INLINE Upper Exponents() {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i pair = kB < 2 ? pairs[kB & 1] : _mm256_srli_epi16(pairs[kB & 1], 4);
    const __m256i code = _mm256_and_si256(pair, nibble);
    Upper e = {_mm256_shuffle_epi8(table_upper, code), _mm256_shuffle_epi8(table_lower, code)};
    const uint32_t mask =
        static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(code, nibble)));
    if (__builtin_expect(mask != 0, 0)) Patch(mask, e);
    return e;
  }
  EFFC_INLINE void Patch(uint32_t mask, Upper& e) {
    alignas(32) uint8_t upper[32];
    alignas(32) uint8_t lower[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(upper), e.upper);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lower), e.lower);
    for (; mask != 0; mask &= mask - 1, ++escape) {
      const int at = __builtin_ctz(mask);
      upper[at] = *escape >> 1;
      lower[at] = static_cast<uint8_t>(*escape << 7);
    }
    e.upper = LoadBytes(upper);
    e.lower = LoadBytes(lower);
  }
  template <int kB>
  EFFC_INLINE void Block(__m256 (&v)[4]) {
    planes.JoinBlock(kB, Exponents<kB>(), v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m256 (&v)[4]) {
    planes.JoinPartial(kB, n, Exponents<kB>(), v);
  }
};

template <Type kType>
struct Reader<Layout::kRank3, kType> {
  RankPlanes<kType == Type::kFloat> planes;
  const uint8_t* codes;
  const uint8_t* escape;
  __m256i table;

  EFFC_INLINE void Open(const WeightView& w, int64_t row) {
    planes.Open(w, row);
    codes = w.codes + row * w.code_stride - 48;
    escape = w.escapes + w.row_escapes[row];
    int64_t packed = 0;
    std::memcpy(&packed, w.table, sizeof(packed));
    table = _mm256_set1_epi64x(packed);
  }
  EFFC_INLINE void StartTile(int64_t) {
    planes.StartTile();
    codes += 48;
    Prefetch(codes + kAhead * 3 / 8);
  }
  template <int kB>
  EFFC_INLINE Upper Exponents() {
    alignas(32) uint64_t spread[4];
    for (int i = 0; i < 4; ++i) {
      const uint8_t* p = codes + 12 * kB + 3 * i;
      const uint32_t word = p[0] | p[1] << 8 | p[2] << 16;
      spread[i] = _pdep_u64(word, 0x0707070707070707);
    }
    const __m256i code = LoadBytes(spread);
    __m256i e = _mm256_shuffle_epi8(table, code);
    uint32_t mask = static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(code, _mm256_setzero_si256())));
    if (mask != 0) {
      alignas(32) uint8_t bytes[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), e);
      for (; mask != 0; mask &= mask - 1) bytes[__builtin_ctz(mask)] = *escape++;
      e = LoadBytes(bytes);
    }
    return {_mm256_andnot_si256(Top(), _mm256_srli_epi16(e, 1)),
            _mm256_and_si256(Top(), _mm256_slli_epi16(e, 7))};
  }
  template <int kB>
  EFFC_INLINE void Block(__m256 (&v)[4]) {
    planes.JoinBlock(kB, Exponents<kB>(), v);
  }
  template <int kB>
  EFFC_INLINE void PartialBlock(int64_t n, __m256 (&v)[4]) {
    planes.JoinPartial(kB, n, Exponents<kB>(), v);
  }
};

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",          Avx2::kLanes, Product<Avx2, Reader>, Widen<Avx2, Reader>,
    &kAvx2Attention, &kAvx2Panels};

}  // namespace effc
