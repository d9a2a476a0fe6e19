// What the kernels of all custom ops share: attributes, tensors, threads, errors that name the
// node.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/cache_storage.h"
#include "cpu/weight.h"
#include "ort/ort_abi.h"

namespace effc::ort {

// Throws Error with the message of a status that is not null.
void CheckStatus(const Api& api, OrtStatus* status);

std::string ShapeText(const std::vector<int64_t>& dims);

// Attributes of a node that is being made.
class NodeAttributes : public Attributes {
 public:
  NodeAttributes(const Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  int64_t Int(const char* name) const override;
  float Float(const char* name) const override;
  std::string String(const char* name) const override;
  std::vector<int64_t> Ints(const char* name) const override;

 private:
  void Require(OrtStatus* status, const char* name, const char* type) const;

  const Api& api_;
  const OrtKernelInfo* info_;
};

class NodeKernel {
 public:
  NodeKernel(OrtApi* table, const OrtKernelInfo* info, const char* op);

  OrtStatus* Fail(int32_t code, const std::string& message) const;

 protected:
  void Check(OrtStatus* status) const { CheckStatus(api_, status); }
  // A tensor; its dimensions are in it when `dims` is null and there are at most two.
  Tensor Read(const OrtValue* value, std::vector<int64_t>* dims = nullptr) const;
  Tensor Input(const OrtKernelContext* context, size_t index, std::vector<int64_t>* dims) const;
  // The same, with data null for an input that is not there.
  Tensor OptionalInput(const OrtKernelContext* context, size_t index,
                       std::vector<int64_t>* dims) const;
  void* Output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims) const;
  // Calls fn(begin, end) on ranges of `grain` indices, on the session's threads.
  template <class Fn>
  void Parallel(const OrtKernelContext* context, int64_t count, int64_t grain, Fn&& fn) const;

  Api api_;
  std::string name_;   // of the node
  std::string where_;  // what a message begins with
};

template <class Fn>
void NodeKernel::Parallel(const OrtKernelContext* context, int64_t count, int64_t grain,
                          Fn&& fn) const {
  if (count <= grain) return fn(int64_t{0}, count);
  struct Shared {
    Fn& fn;
    int64_t count;
    int64_t grain;
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string message;
  } shared{fn, count, grain, {}, {}, {}};
  auto task = [](void* data, size_t index) {
    Shared& s = *static_cast<Shared*>(data);
    if (s.failed) return;
    const int64_t begin = static_cast<int64_t>(index) * s.grain;
    try {
      s.fn(begin, std::min(s.count, begin + s.grain));
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(s.mutex);
      if (!s.failed.exchange(true)) s.message = error.what();
    }
  };
  const size_t tasks = static_cast<size_t>((count + grain - 1) / grain);
  Check(api_.KernelContextParallelFor(context, +task, tasks, size_t{0}, &shared));
  if (shared.failed) throw Error(shared.message);
}

}  // namespace effc::ort
