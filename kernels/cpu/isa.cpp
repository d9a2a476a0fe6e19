#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace effc {
namespace {

std::vector<const Kernels*> Detect() {
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) {
    list.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")) {
    list.push_back(&kAvx2Kernels);
  }
#elif defined(__aarch64__)
  list.push_back(&kNeonKernels);
#endif
  list.push_back(&kScalarKernels);
  return list;
}

const Kernels* Find(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : AvailableKernels()) {
    if (name == kernels->name) return kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw Error("instruction set '" + name + "' is not available here; choose one of: " + names);
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const std::vector<const Kernels*>& AvailableKernels() {
  static const std::vector<const Kernels*> list = Detect();
  return list;
}

const Kernels& ActiveKernels() {
  const Kernels* kernels = selected.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* wanted = std::getenv("EFFC_ISA");
    kernels = wanted != nullptr && *wanted ? Find(wanted) : AvailableKernels().front();
    selected.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void SelectIsa(const std::string& name) { selected.store(Find(name), std::memory_order_release); }

void PermuteX(const float* x, int64_t m, int64_t columns, int lanes, float* out) {
  const int64_t padded = PaddedColumns(columns);
  const int64_t block = 4 * int64_t{lanes};
  for (int64_t row = 0; row < m; ++row, x += columns, out += padded) {
    const int64_t whole = columns / block * block;
    for (int64_t k = 0; k < whole; k += block) {
      for (int64_t lane = 0; lane < lanes / 4; ++lane) {
        for (int64_t j = 0; j < 4; ++j) {
          std::memcpy(out + k + j * lanes + 4 * lane, x + k + 16 * lane + 4 * j, 16);
        }
      }
    }
    std::memset(out + whole, 0, (padded - whole) * sizeof(float));
    for (int64_t k = whole; k < columns; ++k) {
      const int64_t at = k - whole;
      out[whole + at % 16 / 4 * lanes + at / 16 * 4 + at % 4] = x[k];
    }
  }
}

}  // namespace effc
