// Panels with AVX2: a unit is two vectors.
#include <immintrin.h>

#include "cpu/panel_encode.h"
#include "cpu/panel_product.h"

namespace effc {
namespace {

struct Avx2 {
  struct Unit {
    __m256 a;
    __m256 b;
  };
  struct Word {
    __m256i a;
    __m256i b;
  };
  static constexpr int kMaxQueries = 6;
  static constexpr int TileUnits(int queries) { return queries <= 1 ? 4 : queries <= 3 ? 2 : 1; }

  static EFFC_INLINE void Prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static EFFC_INLINE Unit Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static EFFC_INLINE Unit Load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  static EFFC_INLINE void Store(float* p, Unit u) {
    _mm256_storeu_ps(p, u.a);
    _mm256_storeu_ps(p + 8, u.b);
  }
  static EFFC_INLINE Unit Broadcast(const float* p) {
    const __m256 x = _mm256_broadcast_ss(p);
    return {x, x};
  }
  static EFFC_INLINE Unit Add(Unit x, Unit y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
  }
  static EFFC_INLINE Unit Mul(Unit x, Unit y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
  }
  static EFFC_INLINE Unit MulAdd(Unit x, Unit y, Unit z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static EFFC_INLINE float Sum(Unit u) {
    const __m256 x = _mm256_add_ps(u.a, u.b);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static EFFC_INLINE __m128i LoadBytes(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static EFFC_INLINE Unit WidenHalf(const uint16_t* p) {
    return {_mm256_cvtph_ps(LoadBytes(p)), _mm256_cvtph_ps(LoadBytes(p + 8))};
  }
  static EFFC_INLINE __m256 FromBfloat16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(LoadBytes(p)), 16));
  }
  static EFFC_INLINE Unit WidenHalves(EightHalves a, EightHalves b) {
    return {_mm256_cvtph_ps(reinterpret_cast<__m128i>(a)),
            _mm256_cvtph_ps(reinterpret_cast<__m128i>(b))};
  }
  static EFFC_INLINE Unit WidenBfloat16(const uint16_t* p) {
    return {FromBfloat16(p), FromBfloat16(p + 8)};
  }

  template <int kBits>
  static EFFC_INLINE Word LoadWord(const uint8_t* p) {
    if constexpr (kBits == 16) {
      return {_mm256_cvtepu16_epi32(LoadBytes(p)), _mm256_cvtepu16_epi32(LoadBytes(p + 16))};
    } else {
      return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
              _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
    }
  }
  template <int kBits, int kField>
  static EFFC_INLINE __m256 Half(__m256i word) {
    if constexpr (kBits == 16) return _mm256_castsi256_ps(_mm256_slli_epi32(word, 16));
    constexpr int kShift = kBits % 16 * kField;
    if constexpr (kShift > 0) word = _mm256_srli_epi32(word, kShift);
    if constexpr (kShift + kBits < 8) {
      word = _mm256_and_si256(word, _mm256_set1_epi32((1 << kBits) - 1));
    }
    return _mm256_cvtepi32_ps(word);
  }
  template <int kBits, int kField>
  static EFFC_INLINE Unit Field(Word word) {
    return {Half<kBits, kField>(word.a), Half<kBits, kField>(word.b)};
  }
};

}  // namespace

const PanelKernels kAvx2Panels = {PanelProduct<Avx2>, PanelWiden<Avx2>, ChannelMaxima, EncodeKeys,
                                  EncodeValues};

}  // namespace effc
