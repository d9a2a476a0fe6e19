// Work split over short-lived threads; used while encoding and loading, never inside a product.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace effc {

// Calls fn(begin, end) on ranges of at most `grain` indices that cover [0, count).
// Rethrows the first exception after all threads have stopped.
template <class Fn>
void ParallelRanges(int64_t count, int64_t grain, int threads, Fn&& fn) {
  const int64_t tasks = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) {
      try {
        fn(task * grain, std::min(count, (task + 1) * grain));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next = tasks;
      }
    }
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(std::max(threads, 1), tasks);
  for (int64_t i = 1; i < wanted; ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the calling thread does the rest
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace effc
