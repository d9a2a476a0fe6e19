// The largest of many numbers.
#pragma once

#include <cstdint>
#include <vector>

namespace effc {

// Places of the `wanted` largest numbers, ascending; of equal ones, the first. None may be NaN.
std::vector<int32_t> PlacesOfLargest(const float* numbers, int64_t count, int64_t wanted);

}  // namespace effc
