#include "ort/shared_weight.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#include "cpu/codec.h"

namespace effc::ort {
namespace {

using Key = std::tuple<Layout, Layout, Type, int64_t, int64_t, std::vector<const void*>>;

struct Cache {
  std::mutex mutex;
  std::map<Key, std::weak_ptr<const RuntimeWeight>> weights;
};

// Never destroyed: sessions may close while the process ends.
Cache& GlobalCache() {
  static Cache& cache = *new Cache;
  return cache;
}

int LoadThreads() {
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 16);
}

// The layout a Huffman weight takes in memory.
Layout RuntimeLayout(const Spec& spec) {
  const char* wanted = std::getenv("EFFC_RUNTIME_LAYOUT");
  if (wanted != nullptr && *wanted) {
    const Layout layout = ParseLayout(wanted);
    if (layout == Layout::kHuffman) {
      throw Error("EFFC_RUNTIME_LAYOUT must be raw, rank4 or rank3");
    }
    return spec.dtype == Type::kFloat16 ? Layout::kRaw : layout;
  }
  return spec.dtype == Type::kFloat16 ? Layout::kRaw : Layout::kRank4;
}

// Lets the system take back pages that will not be read again. Their content is kept.
void DropPages(const Tensor& tensor) {
#ifdef MADV_PAGEOUT
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data) + page - 1) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(tensor.data) + static_cast<uintptr_t>(tensor.count())) / page *
      page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#else
  static_cast<void>(tensor);
#endif
}

std::unique_ptr<RuntimeWeight> Load(const Spec& spec, Layout layout, Layout runtime,
                                    const std::vector<Tensor>& tensors) {
  const int threads = LoadThreads();
  if (layout != Layout::kHuffman) {
    return OpenWeight(spec, layout, tensors.data(), tensors.size(), threads);
  }
  std::vector<OwnedTensor> made =
      Transcode(spec, layout, tensors.data(), tensors.size(), runtime, threads);
  std::vector<Tensor> views;
  for (const OwnedTensor& tensor : made) views.push_back(tensor.view);
  std::unique_ptr<RuntimeWeight> weight =
      OpenWeight(spec, runtime, views.data(), views.size(), threads);
  for (OwnedTensor& tensor : made) weight->owned.push_back(std::move(tensor.memory));
  DropPages(tensors[2]);
  if (runtime == Layout::kRaw) DropPages(tensors[0]);
  return weight;
}

}  // namespace

std::shared_ptr<const RuntimeWeight> SharedWeight(const Spec& spec, Layout layout,
                                                  const std::vector<Tensor>& tensors) {
  CheckTensors(spec, layout, tensors.data(), tensors.size());
  const Layout runtime = layout == Layout::kHuffman ? RuntimeLayout(spec) : layout;
  std::vector<const void*> pointers;
  for (const Tensor& tensor : tensors) {
    // Where a tensor without content lies says nothing.
    pointers.push_back(tensor.count() == 0 ? nullptr : tensor.data);
  }
  const Key key{layout, runtime, spec.dtype, spec.rows, spec.columns, std::move(pointers)};
  Cache& cache = GlobalCache();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  std::erase_if(cache.weights, [](const auto& entry) { return entry.second.expired(); });
  if (const auto found = cache.weights.find(key); found != cache.weights.end()) {
    if (auto weight = found->second.lock()) return weight;
  }
  std::shared_ptr<const RuntimeWeight> weight = Load(spec, layout, runtime, tensors);
  cache.weights[key] = weight;
  return weight;
}

int64_t LiveWeights() {
  Cache& cache = GlobalCache();
  const std::lock_guard<std::mutex> lock(cache.mutex);
  return std::count_if(cache.weights.begin(), cache.weights.end(),
                       [](const auto& entry) { return !entry.second.expired(); });
}

}  // namespace effc::ort
