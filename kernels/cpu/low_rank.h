// The tokens of a prefix whose keys are a product of two small matrices (ShadowKV).
// docs/cached-attention.md, section "Selection".
#pragma once

#include <span>

#include "cpu/selection.h"
#include "cpu/token_store.h"

namespace effc {

// Throws Error for outliers that are no chunks, a cache shorter than the prefix, angles that do not
// reach it, or a row that hides a token of it.
void CheckLowRank(const AttentionForm& form, const AttentionOperands& operands);

// Rebuilds the keys of a prefix.
class LowRankKeys {
 public:
  LowRankKeys(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
              const ParallelFunction& parallel);

  // Keys of tokens [begin, begin + count) as queries meet them, at most kBlockTokens of them.
  // Memory of the thread, good until the next call.
  TokenRows Rebuild(int64_t head, int64_t begin, int64_t count) const;

 private:
  const float* Coefficients(int64_t begin, int64_t count) const;
  TokenRows Rotate(float* rows, int64_t begin, int64_t count) const;

  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const int64_t stride_;       // floats between rebuilt keys
  const int64_t head_floats_;  // of the panels of a head
  float* panels_ = nullptr;    // of the bases of all heads
};

// The prefix, then the cache behind it and the new tokens.
class LowRankStore : public TokenStore {
 public:
  LowRankStore(const AttentionForm& form, const AttentionOperands& operands,
               const LowRankKeys& keys, const TokenStore& rest)
      : form_(form), prefix_(operands.low_rank), keys_(keys), rest_(rest) {}

  int64_t BlockBegin(int64_t row, int64_t slot) const override;
  int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const override;
  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override;
  TokenRows Keys(int64_t row, int64_t head, int64_t slot, const TokenSpan& run) const override;

 private:
  const AttentionForm& form_;
  const LowRankTokens& prefix_;
  const LowRankKeys& keys_;
  const TokenStore& rest_;
};

// Chunks by the product of a query with the mean of their keys; outliers are read in any case.
class LandmarkBounds : public BlockBounds {
 public:
  LandmarkBounds(const Kernels& kernels, const AttentionForm& form, const LowRankTokens& prefix)
      : pieces_(*kernels.attention), form_(form), prefix_(prefix) {}

  void Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t begin, int64_t end,
             float* scores, int64_t stride) const override;
  std::span<const int32_t> Always(int64_t head) const override;

 private:
  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const LowRankTokens& prefix_;
};

}  // namespace effc
