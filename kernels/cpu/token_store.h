// Where the tokens of a step lie, and how blocks of them are read.
#pragma once

#include "cpu/cached_attention.h"
#include "cpu/page.h"

namespace effc {

// A run of tokens in memory: rows, or one coded page.
struct TokenSpan {
  int64_t count;
  TokenRows keys;
  TokenRows values;
  const uint8_t* page;  // null for rows
};

// The cache, then the new tokens.
class TokenStore {
 public:
  virtual ~TokenStore() = default;
  // The block of slots that holds `slot` begins at BlockBegin and ends, before `end`, at BlockEnd.
  virtual int64_t BlockBegin(int64_t row, int64_t slot) const = 0;
  virtual int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const = 0;
  // The longest run from `slot` on that ends at `end` or before; a page is asked for as a block.
  virtual TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const = 0;
  // Keys of a run from `slot` on as queries meet them. Memory of the thread, good until the next
  // call, where that is not how they lie.
  virtual TokenRows Keys(int64_t, int64_t, int64_t, const TokenSpan& run) const { return run.keys; }
  virtual const PageLayout* layout() const { return nullptr; }
};

// Slots [begin, end) of a row, a block of its store, as a key head has them.
struct BlockPlace {
  int64_t row;
  int64_t head;
  int64_t begin;
  int64_t end;
};

// Products with blocks of tokens, wherever they lie. Rows of scores are kScoreStride apart. Tokens
// of a page are in slot order only where `ordered`, which costs time.
class BlockReader {
 public:
  BlockReader(const Kernels& kernels, const AttentionForm& form, const TokenStore& store)
      : kernels_(kernels), pieces_(*kernels.attention), form_(form), store_(store) {}

  // Scores of m query rows, PaddedRow(D) apart.
  void Scores(const BlockPlace& block, const float* queries, int64_t m, bool ordered,
              float* scores) const;
  // Scores in slot order, `stride` apart, for who reads no values after them.
  void KeyScores(const BlockPlace& block, const float* queries, int64_t m, float* scores,
                 int64_t stride) const;
  // Adds weighted values to sums, PaddedRow(E) apart. Prefetches the keys of `next`.
  void Values(const BlockPlace& block, const float* weights, int64_t m, bool ordered, float* sums,
              const BlockPlace& next) const;
  // The value of one token, as floats.
  void Value(int64_t row, int64_t head, int64_t slot, float* out) const;
  void PrefetchValue(int64_t row, int64_t head, int64_t slot) const;
  // Panels of transposed keys, and rows of E values, in slot order.
  void Widen(const BlockPlace& block, float* panels, float* values) const;

 private:
  void ScorePage(const uint8_t* page, const float* queries, int64_t m, bool ordered, float* scores,
                 int64_t stride) const;
  void WeighPage(const uint8_t* page, const float* weights, int64_t m, bool ordered,
                 float* sums) const;
  void WidenPage(const uint8_t* page, float* panels, float* values) const;

  const Kernels& kernels_;
  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const TokenStore& store_;
};

}  // namespace effc
