// Panels with AVX-512: a unit is one vector.
#include <immintrin.h>

#include "cpu/panel_encode.h"
#include "cpu/panel_product.h"

namespace effc {
namespace {

struct Avx512 {
  using Unit = __m512;
  static constexpr int kMaxQueries = 8;
  static constexpr int TileUnits(int queries) { return queries <= 2 ? 8 : queries <= 4 ? 4 : 2; }

  static EFFC_INLINE void Prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static EFFC_INLINE Unit Zero() { return _mm512_setzero_ps(); }
  static EFFC_INLINE Unit Load(const float* p) { return _mm512_loadu_ps(p); }
  static EFFC_INLINE void Store(float* p, Unit u) { _mm512_storeu_ps(p, u); }
  static EFFC_INLINE Unit Broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static EFFC_INLINE Unit Add(Unit a, Unit b) { return _mm512_add_ps(a, b); }
  static EFFC_INLINE Unit Mul(Unit a, Unit b) { return _mm512_mul_ps(a, b); }
  static EFFC_INLINE Unit MulAdd(Unit a, Unit b, Unit c) { return _mm512_fmadd_ps(a, b, c); }
  static EFFC_INLINE float Sum(Unit u) { return _mm512_reduce_add_ps(u); }
  static EFFC_INLINE __m256i LoadWords(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static EFFC_INLINE Unit WidenHalf(const uint16_t* p) { return _mm512_cvtph_ps(LoadWords(p)); }
  static EFFC_INLINE Unit WidenHalves(EightHalves a, EightHalves b) {
    return _mm512_cvtph_ps(
        _mm256_set_m128i(reinterpret_cast<__m128i>(b), reinterpret_cast<__m128i>(a)));
  }
  static EFFC_INLINE Unit WidenBfloat16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(LoadWords(p)), 16));
  }

  // 16 bytes as integers; codes of 16 bits as they are in memory.
  template <int kBits>
  static EFFC_INLINE __m512i LoadWord(const uint8_t* p) {
    if constexpr (kBits == 16) {
      return _mm512_cvtepu16_epi32(LoadWords(p));
    } else {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
  }
  // The permutation reads the low four bits of an index: a table that repeats does the masking.
  template <int kBits, int kField>
  static EFFC_INLINE Unit Field(__m512i word) {
    if constexpr (kBits == 16) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
    } else if constexpr (kBits == 8) {
      return _mm512_cvtepi32_ps(word);
    } else if constexpr (kBits == 4) {
      return _mm512_permutexvar_ps(
          _mm512_srli_epi32(word, 4 * kField),
          _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    } else {
      return _mm512_permutexvar_ps(_mm512_srli_epi32(word, 2 * kField),
                                   _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
    }
  }
};

}  // namespace

const PanelKernels kAvx512Panels = {PanelProduct<Avx512>, PanelWiden<Avx512>, ChannelMaxima,
                                    EncodeKeys, EncodeValues};

}  // namespace effc
