// The memory bandwidth that bounds a product with few rows of x.
#pragma once

#include <cstdint>

namespace effc {

// Best bytes per second over `rounds` reads of a buffer of `bytes` by `threads` threads.
double ReadBandwidth(int64_t bytes, int threads, int rounds);

}  // namespace effc
