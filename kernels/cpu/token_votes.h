// Selection `topk`: all cached tokens are scored, all heads vote, and a step reads the values of
// the tokens with the most votes. docs/cached-attention.md, section "Selection".
#pragma once

#include <vector>

#include "cpu/selection.h"
#include "cpu/token_store.h"

namespace effc {

// Of one row: the slots [begin, end) it chooses from, and the share of its attention to them that
// each query head gives each of them, as a product: within a part of the slots, and of that part.
// The memory is the calling thread's, up to its next step.
struct TokenShares {
  // Slots, cut at blocks of the store, and the place of the first among the shares of a head.
  struct Part {
    int64_t begin;
    int64_t end;
    int64_t place;
  };
  int64_t begin = 0;
  int64_t end = 0;
  std::vector<Part> parts;
  int64_t stride = 0;
  float* within = nullptr;     // [H][stride]
  std::vector<float> factors;  // [part][H]
  std::vector<float> bases;    // [H]: ln of the sum of exp(score) over the slots

  float* At(int64_t head, const Part& part, int64_t slot) const {
    return within + head * stride + part.place + slot - part.begin;
  }
};

// What every row reads, the same for all key heads, and the shares of rows that select.
struct VotedSlots {
  ChosenSlots chosen;
  std::vector<TokenShares> shares;  // of each row

  Reads reads() const { return {&chosen, nullptr, shares.empty() ? nullptr : shares.data()}; }
};

// Chooses tokens for a step of one new token, in all rows but those of `decided` (of each row, or
// empty); a step of several reads everything.
VotedSlots VoteForTokens(const Kernels& kernels, const AttentionForm& form,
                         const AttentionOperands& operands, const NewTokens& tokens,
                         const TokenStore& store, const SelectionSpec& spec,
                         const ParallelFunction& parallel,
                         const std::vector<uint8_t>& decided = {});

}  // namespace effc
