#include "cpu/bandwidth.h"

#include <chrono>
#include <vector>

#include "cpu/parallel.h"

namespace effc {
namespace {

uint64_t Fold(const uint64_t* words, int64_t count) {
  uint64_t lanes[16] = {};
  for (int64_t i = 0; i + 16 <= count; i += 16) {
    __builtin_prefetch(words + i + 256);
    __builtin_prefetch(words + i + 264);
    for (int j = 0; j < 16; ++j) lanes[j] |= words[i + j];
  }
  uint64_t all = 0;
  for (const uint64_t lane : lanes) all |= lane;
  return all;
}

}  // namespace

double ReadBandwidth(int64_t bytes, int threads, int rounds) {
  const std::vector<uint64_t> words(bytes / 8, 1);
  const int64_t count = static_cast<int64_t>(words.size());
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    std::atomic<uint64_t> seen{0};
    const auto start = std::chrono::steady_clock::now();
    ParallelRanges(count, 1 << 17, threads, [&](int64_t begin, int64_t end) {
      seen |= Fold(words.data() + begin, end - begin);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (seen != 0) best = std::max(best, static_cast<double>(count) * 8 / seconds.count());
  }
  return best;
}

}  // namespace effc
