// Panels in plain C++.
#include "cpu/panel_encode.h"
#include "cpu/panel_product.h"

namespace effc {
namespace {

struct Scalar {
  typedef float Four __attribute__((vector_size(16)));
  struct Unit {
    Four v[4];
  };
  static constexpr int kMaxQueries = 4;
  static constexpr int TileUnits(int) { return 1; }

  template <class Fn>
  static EFFC_INLINE Unit Make(Fn&& fn) {
    Unit u;
    Unroll<4>([&](auto i) EFFC_INLINE_LAMBDA { u.v[i] = fn(i); });
    return u;
  }
  // fn(i) for each of the 16 lanes.
  template <class Fn>
  static EFFC_INLINE Unit MakeLanes(Fn&& fn) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = fn(i);
    return Load(lanes);
  }
  static EFFC_INLINE void Prefetch(const void* p) { __builtin_prefetch(p); }
  static EFFC_INLINE Unit Zero() { return {}; }
  static EFFC_INLINE Unit Load(const float* p) {
    Unit u;
    std::memcpy(&u, p, sizeof(u));
    return u;
  }
  static EFFC_INLINE void Store(float* p, const Unit& u) { std::memcpy(p, &u, sizeof(u)); }
  static EFFC_INLINE Unit Broadcast(const float* p) {
    return Make([&](auto) EFFC_INLINE_LAMBDA { return Four{*p, *p, *p, *p}; });
  }
  static EFFC_INLINE Unit Add(const Unit& x, const Unit& y) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return x.v[i] + y.v[i]; });
  }
  static EFFC_INLINE Unit Mul(const Unit& x, const Unit& y) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return x.v[i] * y.v[i]; });
  }
  static EFFC_INLINE Unit MulAdd(const Unit& x, const Unit& y, const Unit& z) {
    return Make([&](auto i) EFFC_INLINE_LAMBDA { return x.v[i] * y.v[i] + z.v[i]; });
  }
  static EFFC_INLINE float Sum(const Unit& u) {
    const Four x = (u.v[0] + u.v[1]) + (u.v[2] + u.v[3]);
    return (x[0] + x[2]) + (x[1] + x[3]);
  }
  static EFFC_INLINE Unit WidenHalf(const uint16_t* p) {
    return MakeLanes([&](int i) { return HalfToFloat(p[i]); });
  }
  static EFFC_INLINE Unit WidenHalves(EightHalves a, EightHalves b) {
    uint16_t halves[16];
    std::memcpy(halves, &a, 16);
    std::memcpy(halves + 8, &b, 16);
    return WidenHalf(halves);
  }
  static EFFC_INLINE Unit WidenBfloat16(const uint16_t* p) {
    return MakeLanes([&](int i) { return Bfloat16ToFloat(p[i]); });
  }

  template <int kBits>
  static EFFC_INLINE const uint8_t* LoadWord(const uint8_t* p) {
    return p;
  }
  template <int kBits, int kField>
  static EFFC_INLINE Unit Field(const uint8_t* p) {
    if constexpr (kBits == 16) {
      uint16_t words[16];
      std::memcpy(words, p, sizeof(words));
      return WidenBfloat16(words);
    }
    constexpr int kMask = (1 << kBits) - 1;
    return MakeLanes([&](int i) { return static_cast<float>(p[i] >> kBits % 8 * kField & kMask); });
  }
};

}  // namespace

const PanelKernels kScalarPanels = {PanelProduct<Scalar>, PanelWiden<Scalar>, ChannelMaxima,
                                    EncodeKeys, EncodeValues};

}  // namespace effc
