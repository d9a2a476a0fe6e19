// Which tokens a cache keeps when it overflows: those that its last queries attend to.
//
// SnapKV (Li et al. 2024, arXiv 2404.14469): the probabilities that the queries at the end give a
// token are summed and averaged over its neighbours; the best tokens stay, for every head. Here the
// query heads of a key head vote together.
#pragma once

#include <vector>

#include "cpu/evict_step.h"

namespace effc {

class EvictVotes {
 public:
  EvictVotes(const Kernels& kernels, const EvictStep& step, const NewTokens& tokens,
             const PackedStore& store)
      : pieces_(*kernels.attention), step_(step), tokens_(tokens), store_(store) {}

  // The candidates that stay, ascending: sinks, recent tokens, and those with the most votes.
  std::vector<int32_t> Choose(int64_t row, int64_t head) const;

 private:
  // The query rows of one key head that vote, and the packed slots before which they see.
  struct Voters {
    std::vector<float> queries;  // PaddedRow(D) apart
    std::vector<int64_t> ends;   // from the first packed slot of the row on
  };
  Voters FindVoters(int64_t row, int64_t head) const;
  void AddVoter(const float* queries, int64_t stride, int64_t end, Voters& voters) const;
  // Of every packed slot: the sum of the probabilities that voters give it.
  std::vector<float> Votes(int64_t row, int64_t head) const;
  void Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t slots,
             float* scores, int64_t stride) const;
  std::vector<float> Pooled(const std::vector<float>& votes) const;

  const AttentionKernels& pieces_;
  const EvictStep& step_;
  const NewTokens& tokens_;
  const PackedStore& store_;
};

}  // namespace effc
