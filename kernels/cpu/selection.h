// Which cached tokens a step reads where it does not read all of them. docs/cached-attention.md,
// section "Selection".
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/cached_attention.h"

namespace effc {

enum class SelectionKind : int32_t {
  kAll,
  kPages,
  kTopK,
  kWindow,
  kClusters,
  kEvict,
  kRetain,
  kStride,
  kLowRank
};

// How far sinks are from a query that reads them beyond its window.
enum class FarPositions : int32_t {
  kKeep,     // as far as they are
  kCompact,  // as if they came right before the window
  kCap,      // as far as the window is long
};

// The attributes of a selection. kPages: a row's tokens before a step are `sinks` first ones, whole
// blocks, and at least `recent` last ones; a step chooses among the blocks. kTopK: the same with
// blocks of one token. kWindow: `sinks` first ones are read besides the window. kClusters: the
// queries of the `recent` last tokens are kept. kEvict: the cache keeps `budget` tokens, `sinks`
// first and `recent` last ones among them, and loses `block` tokens when it is full. kRetain: the
// cache has room for `budget` tokens, `sinks` first and `recent` last ones among them, and makes
// room for `block` tokens at least when it is full. kStride: `sinks` first tokens, `recent` last
// ones in whole blocks, and every `stride`-th block are read. kLowRank: as kPages, with blocks of
// the prefix alone.
struct SelectionSpec {
  SelectionKind kind = SelectionKind::kAll;
  int64_t sinks = 0;
  int64_t recent = 0;
  int64_t block = 0;   // tokens
  int64_t budget = 0;  // tokens chosen, at least
  float share = 0;     // of the blocks chosen, at least
  float reach = 1;     // kPages: of what ranks a block, from the middle of its keys to the bound
  // Whether a dense cache has the means of blocks, and no bounds.
  bool by_mean() const { return reach == 0; }
  int64_t dense_below = 0;  // with fewer tokens everything is read
  int64_t refresh = 0;      // kTopK: a choice serves fewer steps than this; 0: one
  float similarity = 1;     // kTopK: and queries whose cosine with its own is at least this
  FarPositions positions = FarPositions::kKeep;
  int64_t stride = 1;  // kStride: blocks
  int64_t pool = 1;    // kEvict: tokens over which votes are averaged, odd
  // Blocks to choose from, of a row with this many tokens before the step.
  int64_t Blocks(int64_t tokens) const {
    return std::max<int64_t>(0, tokens - sinks - recent) / block;
  }
  // kEvict: tokens a cache has room for.
  int64_t places() const { return budget + block; }
  int64_t Wanted(int64_t blocks) const {
    const auto shared = static_cast<int64_t>(std::ceil(static_cast<double>(share) * blocks));
    return std::max({int64_t{1}, budget / block, shared});
  }
};

// Slots [begin, end).
struct SlotRun {
  int64_t begin;
  int64_t end;
};

// What every row and key head reads in a step; a row without runs reads everything.
class ChosenSlots {
 public:
  ChosenSlots() = default;
  // With one head, all key heads share its runs.
  ChosenSlots(int64_t rows, int64_t heads) : heads_(heads), runs_(rows * heads) {}

  bool shared() const { return heads_ == 1; }
  bool Selects(int64_t row) const { return !runs_.empty() && !runs_[row * heads_].empty(); }
  std::vector<SlotRun>& Runs(int64_t row, int64_t head) {
    return runs_[row * heads_ + head % heads_];
  }
  const std::vector<SlotRun>& Runs(int64_t row, int64_t head) const {
    return runs_[row * heads_ + head % heads_];
  }

 private:
  int64_t heads_ = 1;
  std::vector<std::vector<SlotRun>> runs_;
};

// What is known of the blocks of a cache without reading their tokens: every key lies in a box.
class BlockBounds {
 public:
  virtual ~BlockBounds() = default;
  // scores[i * stride + b] = the product of query row i with the middle of the box of block b, and
  // `reach` times the way from there to the largest product that a key in the box can have; for
  // blocks [begin, end) of a row and key head. Rows of queries are PaddedRow(D) apart.
  virtual void Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t begin,
                     int64_t end, float* scores, int64_t stride) const = 0;
  // Blocks of a key head that are read besides the chosen ones, whatever their score, ascending.
  virtual std::span<const int32_t> Always(int64_t) const { return {}; }
};

// Chooses blocks for a step of one new token; a step of several reads everything.
ChosenSlots ChooseSlots(const Kernels& kernels, const AttentionForm& form,
                        const AttentionOperands& operands, const NewTokens& tokens,
                        const SelectionSpec& spec, const BlockBounds& bounds,
                        const ParallelFunction& parallel);

}  // namespace effc
