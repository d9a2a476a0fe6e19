// Conversions of the 16-bit floats in a page. Kept apart for every translation unit, so that no
// function compiled for a newer machine is shared.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/unroll.h"

namespace effc {
namespace {

EFFC_INLINE float Bfloat16ToFloat(uint16_t word) {
  return std::bit_cast<float>(uint32_t{word} << 16);
}

// Nearest, ties to even; finite stays finite.
EFFC_INLINE uint16_t Bfloat16Nearest(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t word = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((word & 0x7FFF) < 0x7F80 ? word : word - 1);
}

// The smallest bfloat16 not below x >= 0.
EFFC_INLINE uint16_t Bfloat16Above(float x) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + 0xFFFF) >> 16);
}

constexpr uint32_t kHalfBias = 112 << 10;  // between the exponents of float and float16

// A finite float16 as float.
EFFC_INLINE float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu;
  const float normal = std::bit_cast<float>((magnitude + kHalfBias) << 13);
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float x = magnitude < 0x400 ? small : normal;
  return half & 0x8000 ? -x : x;
}

// The largest float16 not above x >= 0, which is at most 65504.
EFFC_INLINE uint32_t TruncatedHalf(float x) {
  const float small = x < 0x1p-14f ? x : 0;
  const uint32_t normal = (std::bit_cast<uint32_t>(x) >> 13) - kHalfBias;
  return x < 0x1p-14f ? static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p24f)) : normal;
}

// The smallest float16 not below x >= 0, which is at most 65504.
EFFC_INLINE uint16_t HalfAbove(float x) {
  const uint32_t half = TruncatedHalf(x);
  return static_cast<uint16_t>(half + (HalfToFloat(static_cast<uint16_t>(half)) < x));
}

// The largest float16 not above x, whose magnitude is at most 65504.
EFFC_INLINE uint16_t HalfBelow(float x) {
  return static_cast<uint16_t>(x < 0 ? 0x8000 | HalfAbove(-x) : TruncatedHalf(x));
}

}  // namespace
}  // namespace effc
