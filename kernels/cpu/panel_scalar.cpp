// Panels in plain C++.
#include "cpu/panel_encode.h"
#include "cpu/panel_product.h"

namespace effc {
namespace {

struct Scalar {
  struct Unit {
    float f[16];
  };
  static constexpr int64_t kAhead = 4096;  // bytes between use and prefetch of codes
  static constexpr int kMaxQueries = 4;
  static constexpr int TileUnits(int) { return 1; }

  template <class Fn>
  static EFFC_INLINE Unit Make(Fn&& fn) {
    Unit u;
    for (int i = 0; i < 16; ++i) u.f[i] = fn(i);
    return u;
  }
  static EFFC_INLINE void Prefetch(const void*) {}
  static EFFC_INLINE Unit Zero() { return {}; }
  static EFFC_INLINE Unit Load(const float* p) {
    return Make([&](int i) { return p[i]; });
  }
  static EFFC_INLINE void Store(float* p, const Unit& u) { std::memcpy(p, u.f, sizeof(u.f)); }
  static EFFC_INLINE Unit Broadcast(const float* p) {
    return Make([&](int) { return *p; });
  }
  static EFFC_INLINE Unit Add(const Unit& a, const Unit& b) {
    return Make([&](int i) { return a.f[i] + b.f[i]; });
  }
  static EFFC_INLINE Unit Mul(const Unit& a, const Unit& b) {
    return Make([&](int i) { return a.f[i] * b.f[i]; });
  }
  static EFFC_INLINE Unit MulAdd(const Unit& a, const Unit& b, const Unit& c) {
    return Make([&](int i) { return a.f[i] * b.f[i] + c.f[i]; });
  }
  static EFFC_INLINE float Sum(const Unit& u) {
    float sum = 0;
    for (const float x : u.f) sum += x;
    return sum;
  }
  static EFFC_INLINE Unit WidenHalf(const uint16_t* p) {
    return Make([&](int i) { return HalfToFloat(p[i]); });
  }
  static EFFC_INLINE Unit WidenBfloat16(const uint16_t* p) {
    return Make([&](int i) { return Bfloat16ToFloat(p[i]); });
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
    return Make([&](int i) { return static_cast<float>(p[i] >> kBits % 8 * kField & kMask); });
  }
};

}  // namespace

const PanelKernels kScalarPanels = {PanelProduct<Scalar>, PanelWiden<Scalar>, ChannelMaxima,
                                    EncodeKeys, EncodeValues};

}  // namespace effc
