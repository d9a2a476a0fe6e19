// Panels with NEON: a unit is four vectors.
#include <arm_neon.h>

#include "cpu/panel_encode.h"
#include "cpu/panel_product.h"

namespace effc {
namespace {

struct Neon {
  struct Unit {
    float32x4_t v[4];
  };
  static constexpr int kMaxQueries = 6;
  static constexpr int TileUnits(int queries) { return queries <= 1 ? 4 : queries <= 3 ? 2 : 1; }

  template <class Fn>
  static EFFC_INLINE Unit Make(Fn&& fn) {
    Unit u;
    Unroll<4>([&](auto i) EFFC_INLINE_LAMBDA { u.v[i] = fn(i); });
    return u;
  }
  static EFFC_INLINE void Prefetch(const void* p) { __builtin_prefetch(p); }
  static EFFC_INLINE Unit Zero() {
    return Make([](auto) EFFC_INLINE_LAMBDA { return vdupq_n_f32(0); });
  }
  static EFFC_INLINE Unit Load(const float* p) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return vld1q_f32(p + 4 * i); });
  }
  static EFFC_INLINE void Store(float* p, const Unit& u) {
    Unroll<4>([&](auto i) EFFC_INLINE_LAMBDA { vst1q_f32(p + 4 * i, u.v[i]); });
  }
  static EFFC_INLINE Unit Broadcast(const float* p) {
    const float32x4_t x = vld1q_dup_f32(p);
    return {{x, x, x, x}};
  }
  static EFFC_INLINE Unit Add(const Unit& x, const Unit& y) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return vaddq_f32(x.v[i], y.v[i]); });
  }
  static EFFC_INLINE Unit Mul(const Unit& x, const Unit& y) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return vmulq_f32(x.v[i], y.v[i]); });
  }
  static EFFC_INLINE Unit MulAdd(const Unit& x, const Unit& y, const Unit& z) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
  }
  static EFFC_INLINE float Sum(const Unit& u) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(u.v[0], u.v[1]), vaddq_f32(u.v[2], u.v[3])));
  }
  static EFFC_INLINE Unit WidenHalf(const uint16_t* p) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA {
      return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    });
  }
  static EFFC_INLINE Unit WidenHalves(EightHalves a, EightHalves b) {
    uint16_t halves[16];
    std::memcpy(halves, &a, 16);
    std::memcpy(halves + 8, &b, 16);
    return WidenHalf(halves);
  }
  static EFFC_INLINE Unit WidenBfloat16(const uint16_t* p) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA {
      return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    });
  }

  // 16 bytes; codes of 16 bits stay in memory.
  template <int kBits>
  static EFFC_INLINE auto LoadWord(const uint8_t* p) {
    if constexpr (kBits == 16) {
      return p;
    } else {
      return vld1q_u8(p);
    }
  }
  template <int kBits, int kField>
  static EFFC_INLINE Unit Field(const uint8_t* p) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA {
      return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i)), 16));
    });
  }
  template <int kBits, int kField>
  static EFFC_INLINE Unit Field(uint8x16_t word) {
    constexpr int kShift = kBits % 8 * kField;
    if constexpr (kShift > 0) word = vshrq_n_u8(word, kShift);
    if constexpr (kShift + kBits < 8) word = vandq_u8(word, vdupq_n_u8((1 << kBits) - 1));
    const uint16x8_t low = vmovl_u8(vget_low_u8(word));
    const uint16x8_t high = vmovl_u8(vget_high_u8(word));
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
             vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
             vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
  }
};

}  // namespace

const PanelKernels kNeonPanels = {PanelProduct<Neon>, PanelWiden<Neon>, ChannelMaxima, EncodeKeys,
                                  EncodeValues};

}  // namespace effc
