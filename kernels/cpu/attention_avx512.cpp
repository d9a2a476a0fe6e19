// Attention with AVX-512.
#include <immintrin.h>

#include "cpu/attention_block.h"

namespace effc {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kDots = 16;
  static constexpr int kPanelRows = 6;
  static constexpr int kPanelVectors = 4;

  static EFFC_INLINE __mmask16 First(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static EFFC_INLINE Vec Set(float x) { return _mm512_set1_ps(x); }
  static EFFC_INLINE void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static EFFC_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
  static EFFC_INLINE Vec LoadFirst(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(First(n), p);
  }
  static EFFC_INLINE Vec Load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static EFFC_INLINE Vec LoadFirst(const Half* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(First(n), p));
  }
  static EFFC_INLINE Vec FromBfloat16(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  static EFFC_INLINE Vec Load(const Bfloat16* p) {
    return FromBfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static EFFC_INLINE Vec LoadFirst(const Bfloat16* p, int64_t n) {
    return FromBfloat16(_mm256_maskz_loadu_epi16(First(n), p));
  }
  static EFFC_INLINE float ToFloat(float x) { return x; }
  static EFFC_INLINE float ToFloat(Half x) { return _cvtsh_ss(x.bits); }
  static EFFC_INLINE float ToFloat(Bfloat16 x) {
    return std::bit_cast<float>(uint32_t{x.bits} << 16);
  }

  static EFFC_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static EFFC_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static EFFC_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static EFFC_INLINE Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // b where one of them is NaN.
  static EFFC_INLINE Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static EFFC_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static EFFC_INLINE Vec Abs(Vec a) { return _mm512_abs_ps(a); }
  static EFFC_INLINE Vec CopySign(Vec a, Vec sign) {
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0x80000000));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        top, _mm512_castps_si512(sign), _mm512_castps_si512(a), 0xCA));  // top ? sign : a
  }
  // x < limit ? yes : no
  static EFFC_INLINE Vec SelectBelow(Vec x, float limit, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, Set(limit), _CMP_LT_OQ), no, yes);
  }
  // 2^n, where x = n + 1.5 * 2^23.
  static EFFC_INLINE Vec PowerOf2(Vec x) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(x), 23),
                                                _mm512_set1_epi32(0x3F800000)));
  }

  static EFFC_INLINE float Sum(Vec v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }

  static EFFC_INLINE Vec Halve(Vec a, Vec b) {
    return Add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  static EFFC_INLINE Vec Quarter(Vec a, Vec b) {
    const __m512d x = _mm512_castps_pd(a);
    const __m512d y = _mm512_castps_pd(b);
    return Add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
               _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  static EFFC_INLINE Vec JoinLanes(Vec a, Vec b) {
    return Add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  static EFFC_INLINE Vec SumEach(const Vec (&v)[16]) {
    Vec four[4];
    Unroll<4>([&](auto i) EFFC_INLINE_LAMBDA {
      four[i] = Quarter(Halve(v[4 * i], v[4 * i + 1]), Halve(v[4 * i + 2], v[4 * i + 3]));
    });
    return JoinLanes(JoinLanes(four[0], four[1]), JoinLanes(four[2], four[3]));
  }

  static EFFC_INLINE void Transpose(Vec (&v)[16]) {
    Vec w[16];  // w[4 g + j], 128-bit lane l: column 4 l + j of rows 4 g to 4 g + 3
    Unroll<4>([&](auto g) EFFC_INLINE_LAMBDA {
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[4 * g], v[4 * g + 1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[4 * g], v[4 * g + 1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[4 * g + 2], v[4 * g + 3]));
      const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[4 * g + 2], v[4 * g + 3]));
      w[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      w[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      w[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      w[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    });
    Unroll<4>([&](auto j) EFFC_INLINE_LAMBDA {
      const Vec a = _mm512_shuffle_f32x4(w[j], w[4 + j], 0x44);
      const Vec b = _mm512_shuffle_f32x4(w[j], w[4 + j], 0xEE);
      const Vec c = _mm512_shuffle_f32x4(w[8 + j], w[12 + j], 0x44);
      const Vec d = _mm512_shuffle_f32x4(w[8 + j], w[12 + j], 0xEE);
      v[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      v[4 + j] = _mm512_shuffle_f32x4(a, c, 0xDD);
      v[8 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      v[12 + j] = _mm512_shuffle_f32x4(b, d, 0xDD);
    });
  }
};

}  // namespace

const AttentionKernels kAvx512Attention = MakeAttention<Avx512>();

}  // namespace effc
