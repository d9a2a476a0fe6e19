#include "cpu/largest.h"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>

namespace effc {
namespace {

constexpr int kLowBits = 20;

// Ordered as the number is; the two zeros are one.
uint32_t OrderOf(float number) {
  const auto bits = std::bit_cast<uint32_t>(number + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// Order of the least of the `wanted` largest: most are told apart by their upper bits.
uint32_t LeastOf(const float* numbers, int64_t count, int64_t wanted) {
  std::array<int32_t, 1 << (32 - kLowBits)> counts{};
  for (int64_t i = 0; i < count; ++i) ++counts[OrderOf(numbers[i]) >> kLowBits];
  size_t bin = counts.size();
  int64_t larger = 0;
  do {
    larger += counts[--bin];
  } while (larger < wanted);
  std::vector<uint32_t> same;
  same.reserve(counts[bin]);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t order = OrderOf(numbers[i]);
    if (order >> kLowBits == bin) same.push_back(order);
  }
  const auto place = same.begin() + wanted - 1 - (larger - counts[bin]);
  std::nth_element(same.begin(), place, same.end(), std::greater<uint32_t>());
  return *place;
}

}  // namespace

std::vector<int32_t> PlacesOfLargest(const float* numbers, int64_t count, int64_t wanted) {
  std::vector<int32_t> places;
  if (wanted == 0) return places;
  const uint32_t least = LeastOf(numbers, count, wanted);
  places.reserve(wanted);
  int64_t equal = wanted;  // that are among them
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t order = OrderOf(numbers[i]);
    if (order < least) continue;
    places.push_back(static_cast<int32_t>(i));
    equal -= order > least ? 1 : 0;
  }
  if (static_cast<int64_t>(places.size()) > wanted) {
    std::erase_if(places, [&](int32_t i) { return OrderOf(numbers[i]) == least && --equal < 0; });
  }
  return places;
}

}  // namespace effc
