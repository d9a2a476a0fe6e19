// Loops whose index is a compile-time constant.
#pragma once

#include <utility>

#define EFFC_INLINE inline __attribute__((always_inline))
#define EFFC_INLINE_LAMBDA __attribute__((always_inline))

namespace effc {
namespace {

template <int kCount, class Fn, int... kIndex>
EFFC_INLINE void UnrollImpl(Fn& fn, std::integer_sequence<int, kIndex...>) {
  (fn(std::integral_constant<int, kIndex>{}), ...);
}

// fn(0) .. fn(kCount - 1) with compile-time arguments.
template <int kCount, class Fn>
EFFC_INLINE void Unroll(Fn&& fn) {
  UnrollImpl<kCount>(fn, std::make_integer_sequence<int, kCount>{});
}

}  // namespace
}  // namespace effc
