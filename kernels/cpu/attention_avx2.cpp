// Attention with AVX2, FMA and F16C.
#include <immintrin.h>

#include "cpu/attention_block.h"

namespace effc {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kDots = 8;
  static constexpr int kPanelRows = 6;
  static constexpr int kPanelVectors = 2;

  static EFFC_INLINE Vec Set(float x) { return _mm256_set1_ps(x); }
  static EFFC_INLINE void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static EFFC_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
  static EFFC_INLINE Vec LoadFirst(const float* p, int64_t n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index));
  }
  static EFFC_INLINE Vec Load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static EFFC_INLINE Vec Load(const Bfloat16* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  template <class Word>
  static EFFC_INLINE Vec LoadFirst(const Word* p, int64_t n) {
    Word words[8] = {};
    std::memcpy(words, p, n * sizeof(Word));
    return Load(words);
  }
  static EFFC_INLINE float ToFloat(float x) { return x; }
  static EFFC_INLINE float ToFloat(Half x) { return _cvtsh_ss(x.bits); }
  static EFFC_INLINE float ToFloat(Bfloat16 x) {
    return std::bit_cast<float>(uint32_t{x.bits} << 16);
  }

  static EFFC_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static EFFC_INLINE Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static EFFC_INLINE Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static EFFC_INLINE Vec Div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // b where one of them is NaN.
  static EFFC_INLINE Vec Min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static EFFC_INLINE Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static EFFC_INLINE Vec Abs(Vec a) { return _mm256_andnot_ps(Set(-0.0f), a); }
  static EFFC_INLINE Vec CopySign(Vec a, Vec sign) {
    return _mm256_or_ps(Abs(a), _mm256_and_ps(Set(-0.0f), sign));
  }
  // x < limit ? yes : no
  static EFFC_INLINE Vec SelectBelow(Vec x, float limit, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, Set(limit), _CMP_LT_OQ));
  }
  // 2^n, where x = n + 1.5 * 2^23.
  static EFFC_INLINE Vec PowerOf2(Vec x) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(x), 23),
                                                _mm256_set1_epi32(0x3F800000)));
  }

  static EFFC_INLINE float Sum(Vec v) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }

  static EFFC_INLINE Vec Halve(Vec a, Vec b) {
    return Add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  static EFFC_INLINE Vec Quarter(Vec a, Vec b) {
    const __m256d x = _mm256_castps_pd(a);
    const __m256d y = _mm256_castps_pd(b);
    return Add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
               _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  static EFFC_INLINE Vec SumEach(const Vec (&v)[8]) {
    const Vec a = Quarter(Halve(v[0], v[1]), Halve(v[2], v[3]));
    const Vec b = Quarter(Halve(v[4], v[5]), Halve(v[6], v[7]));
    return Add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }

  static EFFC_INLINE void Transpose(Vec (&v)[8]) {
    Vec w[8];  // w[4 g + j], 128-bit lane l: column 4 l + j of rows 4 g to 4 g + 3
    Unroll<2>([&](auto g) EFFC_INLINE_LAMBDA {
      const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[4 * g], v[4 * g + 1]));
      const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[4 * g], v[4 * g + 1]));
      const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[4 * g + 2], v[4 * g + 3]));
      const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[4 * g + 2], v[4 * g + 3]));
      w[4 * g] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
      w[4 * g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
      w[4 * g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
      w[4 * g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    });
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      v[j] = _mm256_permute2f128_ps(w[j], w[4 + j], 0x20);
      v[4 + j] = _mm256_permute2f128_ps(w[j], w[4 + j], 0x31);
    });
  }
};

}  // namespace

const AttentionKernels kAvx2Attention = MakeAttention<Avx2>();

}  // namespace effc
