#include "cpu/selection.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/largest.h"

namespace effc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPartBlocks = 1024;  // blocks that a task bounds

// A row that selects, and its place among the bounds.
struct SelectingRow {
  int64_t row;
  int64_t blocks;
  int64_t wanted;
  int64_t first;  // of its bounds [K, G, blocks]
};

class Chooser {
 public:
  Chooser(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
          const NewTokens& tokens, const SelectionSpec& spec, const BlockBounds& bounds)
      : pieces_(*kernels.attention),
        form_(form),
        operands_(operands),
        tokens_(tokens),
        spec_(spec),
        bounds_(bounds) {}

  ChosenSlots Run(const ParallelFunction& parallel) {
    FindRows();
    if (rows_.empty()) return {};
    const int64_t heads = form_.kv_heads;
    const int64_t parts = (most_blocks_ + kPartBlocks - 1) / kPartBlocks;
    const auto count = static_cast<int64_t>(rows_.size()) * heads;
    parallel(count * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Bound(rows_[i / parts / heads], i / parts % heads, i % parts * kPartBlocks);
      }
    });
    ChosenSlots chosen(operands_.batch, heads);
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const SelectingRow& row = rows_[i / heads];
        Choose(row, i % heads, chosen.Runs(row.row, i % heads));
      }
    });
    return chosen;
  }

 private:
  void FindRows() {
    int64_t floats = 0;
    for (int64_t row = 0; row < operands_.batch; ++row) {
      const int64_t tokens = operands_.past() - tokens_.Start(row);
      if (tokens < spec_.dense_below || tokens <= 0) continue;
      const int64_t blocks = spec_.Blocks(tokens);
      const int64_t wanted = spec_.Wanted(blocks);
      if (wanted >= blocks) continue;
      rows_.push_back({row, blocks, wanted, floats});
      floats += form_.heads * blocks;
      most_blocks_ = std::max(most_blocks_, blocks);
    }
    scores_ = ThreadFloats(kBlockScores, floats);
  }

  float* Scores(const SelectingRow& row, int64_t head) {
    return scores_ + row.first + head * form_.group() * row.blocks;
  }

  void Bound(const SelectingRow& row, int64_t head, int64_t begin) {
    const int64_t end = std::min(row.blocks, begin + kPartBlocks);
    if (begin >= end) return;
    bounds_.Score(row.row, head, tokens_.Query(row.row, head, operands_.seq - 1), form_.group(),
                  begin, end, Scores(row, head), row.blocks);
  }

  // Of a query head: ln of the sum of exp(scale * bound).
  float LogSum(const float* bounds, int64_t blocks) const {
    QueryRow state{-kInfinity, 0, 0, std::numeric_limits<int64_t>::max(), nullptr};
    float* const copy = ThreadFloats(kScores, kScoreStride);
    for (int64_t at = 0; at < blocks; at += kBlockTokens) {
      const int64_t count = std::min(kBlockTokens, blocks - at);
      std::memcpy(copy, bounds + at, count * sizeof(float));
      pieces_.absorb(&state, 1, {0, count, nullptr, form_.scale, 0}, copy, kScoreStride, nullptr, 0,
                     0);
    }
    return state.max + std::log(state.sum);
  }

  // The most that any query head of the group gives a block.
  void Rank(const float* bounds, int64_t blocks, float* ranks) const {
    std::fill(ranks, ranks + blocks, -kInfinity);
    for (int64_t g = 0; g < form_.group(); ++g, bounds += blocks) {
      const float all = LogSum(bounds, blocks);
      for (int64_t b = 0; b < blocks; ++b) {
        const float rank = form_.scale * bounds[b] - all;
        // A bound that is no number says nothing: its block is read.
        ranks[b] = std::max(ranks[b], std::isnan(rank) ? kInfinity : rank);
      }
    }
  }

  void Choose(const SelectingRow& row, int64_t head, std::vector<SlotRun>& runs) {
    std::vector<float> ranks(row.blocks);
    Rank(Scores(row, head), row.blocks, ranks.data());
    const std::span<const int32_t> always = bounds_.Always(head);
    for (const int32_t block : always) ranks[block] = kInfinity;
    const int64_t wanted = std::min<int64_t>(row.blocks, row.wanted + always.size());
    const int64_t start = tokens_.Start(row.row);
    const int64_t middle = start + spec_.sinks;
    if (spec_.sinks > 0) runs.push_back({start, middle});
    for (const int32_t block : PlacesOfLargest(ranks.data(), row.blocks, wanted)) {
      const int64_t begin = middle + block * spec_.block;
      if (!runs.empty() && runs.back().end == begin) {
        runs.back().end += spec_.block;
      } else {
        runs.push_back({begin, begin + spec_.block});
      }
    }
    runs.push_back({middle + row.blocks * spec_.block, operands_.total});
  }

  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const SelectionSpec& spec_;
  const BlockBounds& bounds_;
  std::vector<SelectingRow> rows_;
  float* scores_ = nullptr;
  int64_t most_blocks_ = 0;
};

}  // namespace

ChosenSlots ChooseSlots(const Kernels& kernels, const AttentionForm& form,
                        const AttentionOperands& operands, const NewTokens& tokens,
                        const SelectionSpec& spec, const BlockBounds& bounds,
                        const ParallelFunction& parallel) {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  if (operands.seq != 1) return {};
  return Chooser(kernels, form, operands, tokens, spec, bounds).Run(parallel);
}

}  // namespace effc
