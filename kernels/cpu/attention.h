// The pieces of attention that every instruction set provides, and the plain data they share.
//
// A query row is one query head of one new token. Its scores of a block of tokens pass through the
// running softmax of Milakov and Gimelshein (2018), which keeps the maximum, the sum and the
// weighted values so far, so that a block is read once. Everything about one query row is computed
// in an order that depends on its own tokens only: not on other rows, tiles or threads.
#pragma once

#include <cstdint>

#include "cpu/weight.h"

namespace effc {

constexpr int64_t kBlockTokens = 128;   // tokens of a block of rows
constexpr int64_t kLongestBlock = 256;  // tokens of any block; a page may have that many
constexpr int64_t kScoreStride = 272;   // floats between rows of scores: not a power of two
constexpr int64_t kPanelLanes = 64;     // tokens in a panel of transposed keys
constexpr int64_t kRowPadding = 16;     // rows of queries and of sums are padded to multiples of it

inline int64_t PaddedRow(int64_t elements) {
  return (elements + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// Rows of tokens in memory: float32, float16 or bfloat16, `stride` elements apart.
struct TokenRows {
  const void* data;
  Type type;
  int64_t stride;
};

inline int64_t ElementBytes(Type type) { return type == Type::kFloat ? 4 : 2; }

// The running softmax of a query row, and what it may see.
struct QueryRow {
  float max;      // of the scores so far; -inf before the first
  float sum;      // of exp(score - max)
  int64_t begin;  // it sees valid slots [begin, end)
  int64_t end;
  const float* bias;  // of slot 0, or null
};

// Slots [begin, begin + count) of a row of the batch.
struct SlotBlock {
  int64_t begin;
  int64_t count;
  const uint8_t* valid;  // of slot `begin`, or null when all are valid
  float scale;
  float softcap;
};

struct AttentionKernels {
  // scores[i * score_stride + t] = dot(query row i, token t). Rows of `queries` are zero-padded to
  // PaddedRow(d). Memory `ahead` bytes behind each key is prefetched.
  void (*scores)(const float* queries, int64_t query_stride, int64_t m, const TokenRows& keys,
                 int64_t n, int64_t d, float* scores, int64_t score_stride, int64_t ahead);
  // sums[i * sum_stride + e] += weights[i * weight_stride + t] * values[t][e], in the order of t.
  void (*values)(const float* weights, int64_t weight_stride, int64_t m, const TokenRows& values,
                 int64_t n, int64_t e, float* sums, int64_t sum_stride, int64_t ahead);
  // Panels [n / kPanelLanes][d][kPanelLanes] of transposed keys, from token `at` on.
  void (*transpose)(const TokenRows& keys, int64_t n, int64_t d, int64_t at, float* panels);
  // Scores as `scores` gives them up to rounding, from panels; rows of scores are written up to the
  // next multiple of kPanelLanes.
  void (*panel_scores)(const float* queries, int64_t query_stride, int64_t m, const float* panels,
                       int64_t n, int64_t d, float* scores, int64_t score_stride);
  // Scores of a block become weights exp(score - max); the running state and the sums follow.
  // Scores have room for a multiple of kRowPadding.
  void (*absorb)(QueryRow* rows, int64_t m, const SlotBlock& block, float* scores,
                 int64_t score_stride, float* sums, int64_t sum_stride, int64_t e);
  // Joins `count` parts of a row, `row_stride` apart, into the state of the first, and writes
  // sums / sum, or 0 for a row that saw nothing. False when the result is not finite.
  bool (*finish)(QueryRow* rows, int64_t row_stride, const float* sums, int64_t sum_stride,
                 int64_t count, int64_t e, float* out);
  // Rows of d floats, one after the other, whose element j turns with j + half by the angles of its
  // row, `half` apart; as RotateRow, to the bit.
  void (*turn_halves)(const TokenRows& rows, int64_t n, int64_t d, const float* cosines,
                      const float* sines, int64_t half, float* out);
  void (*widen)(const void* from, Type type, int64_t n, float* to);
  // Rounds to nearest, ties to even; false when a result is not finite.
  bool (*narrow)(const float* from, int64_t n, Type type, void* to);
};

extern const AttentionKernels kScalarAttention;
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
extern const AttentionKernels kNeonAttention;

}  // namespace effc
