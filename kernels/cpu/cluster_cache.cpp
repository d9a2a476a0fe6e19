#include "cpu/cluster_cache.h"

#include <algorithm>
#include <cstring>

#include "cpu/clusters.h"
#include "cpu/dense_step.h"

namespace effc {
namespace {

constexpr size_t kQueries = 2;  // the tensor after keys and values

}  // namespace

std::vector<CacheTensorForm> ClusterStorage::Tensors(int64_t batch) const {
  std::vector<CacheTensorForm> forms = DenseStorage::Tensors(batch);
  forms.push_back(
      {"past queries", {Type::kFloat}, {batch, form_.heads, selection_.recent, form_.head_size}});
  return forms;
}

std::vector<int64_t> ClusterStorage::Present(size_t index, const std::vector<int64_t>& past,
                                             int64_t total) const {
  return index < kQueries ? DenseStorage::Present(index, past, total) : past;
}

void ClusterStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                          const std::vector<CacheTensor>& past,
                          const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                          float* y) const {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  CheckClusters(form_, operands);
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  const ChosenSlots chosen = ChooseClusters(kernels, form_, operands, tokens, parallel);
  Attend(kernels, form_, operands, tokens, store, {&chosen}, parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
  for (int64_t at = 0; at < operands.batch * form_.kv_heads; ++at) {
    WriteQueries(operands, tokens, past[kQueries], present[kQueries], at / form_.kv_heads,
                 at % form_.kv_heads);
  }
}

void ClusterStorage::WriteQueries(const AttentionOperands& operands, const NewTokens& tokens,
                                  const CacheTensor& past, const CacheTensor& present, int64_t row,
                                  int64_t head) const {
  const int64_t group = form_.group();
  const int64_t bytes = form_.head_size * static_cast<int64_t>(sizeof(float));
  const int64_t first = std::max<int64_t>(0, operands.seq - selection_.recent);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = head * group + g;
    char* const to = static_cast<char*>(const_cast<void*>(Place(present, row, h, 0).data));
    if (past.data != present.data) {
      std::memcpy(to, Place(past, row, h, 0).data, selection_.recent * bytes);
    }
    for (int64_t i = first; i < operands.seq; ++i) {
      const float* const query = tokens.Query(row, head, i) + g * PaddedRow(form_.head_size);
      std::memcpy(to + (operands.past() + i) % selection_.recent * bytes, query, bytes);
    }
  }
}

}  // namespace effc
