// Attention with NEON.
#include <arm_neon.h>

#include "cpu/attention_block.h"

namespace effc {
namespace {

struct Neon {
  using Vec = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kDots = 16;
  static constexpr int kPanelRows = 4;
  static constexpr int kPanelVectors = 4;

  static EFFC_INLINE Vec Set(float x) { return vdupq_n_f32(x); }
  static EFFC_INLINE void Store(float* p, Vec v) { vst1q_f32(p, v); }
  static EFFC_INLINE Vec Load(const float* p) { return vld1q_f32(p); }
  static EFFC_INLINE Vec Load(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static EFFC_INLINE Vec Load(const Bfloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  template <class Element>
  static EFFC_INLINE Vec LoadFirst(const Element* p, int64_t n) {
    Element elements[4] = {};
    std::memcpy(elements, p, n * sizeof(Element));
    return Load(elements);
  }
  static EFFC_INLINE float ToFloat(float x) { return x; }
  template <class Element>
  static EFFC_INLINE float ToFloat(Element x) {
    const Element elements[4] = {x};
    return vgetq_lane_f32(Load(elements), 0);
  }

  static EFFC_INLINE Vec Add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static EFFC_INLINE Vec Sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static EFFC_INLINE Vec Mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static EFFC_INLINE Vec Div(Vec a, Vec b) { return vdivq_f32(a, b); }
  static EFFC_INLINE Vec MulAdd(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  // NaN where one of them is.
  static EFFC_INLINE Vec Min(Vec a, Vec b) { return vminq_f32(a, b); }
  static EFFC_INLINE Vec Max(Vec a, Vec b) { return vmaxq_f32(a, b); }
  static EFFC_INLINE Vec Abs(Vec a) { return vabsq_f32(a); }
  static EFFC_INLINE Vec CopySign(Vec a, Vec sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000), sign, a);
  }
  // x < limit ? yes : no
  static EFFC_INLINE Vec SelectBelow(Vec x, float limit, Vec yes, Vec no) {
    return vbslq_f32(vcltq_f32(x, Set(limit)), yes, no);
  }
  // 2^n, where x = n + 1.5 * 2^23.
  static EFFC_INLINE Vec PowerOf2(Vec x) {
    return vreinterpretq_f32_u32(
        vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23), vdupq_n_u32(0x3F800000)));
  }
  static EFFC_INLINE float Sum(Vec v) {
    const float32x2_t half = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(half, 0) + vget_lane_f32(half, 1);
  }
  static EFFC_INLINE Vec SumEach(const Vec (&v)[4]) {
    return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
  }
  static EFFC_INLINE void Transpose(Vec (&v)[4]) {
    const Vec a = vzip1q_f32(v[0], v[2]);
    const Vec b = vzip2q_f32(v[0], v[2]);
    const Vec c = vzip1q_f32(v[1], v[3]);
    const Vec d = vzip2q_f32(v[1], v[3]);
    v[0] = vzip1q_f32(a, c);
    v[1] = vzip2q_f32(a, c);
    v[2] = vzip1q_f32(b, d);
    v[3] = vzip2q_f32(b, d);
  }
};

}  // namespace

const AttentionKernels kNeonAttention = MakeAttention<Neon>();

}  // namespace effc
