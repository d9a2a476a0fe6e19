// Attention over a cache and new tokens, for every storage. docs/cached-attention.md has the
// meaning.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"

namespace effc {

enum class Rotary : int32_t { kNone, kHalf, kInterleaved };

// The attributes that do not depend on the storage.
struct AttentionForm {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  int64_t value_size = 0;
  float scale = 1;
  float softcap = 0;
  bool causal = true;
  int64_t window = 0;
  Rotary rotary = Rotary::kNone;
  int64_t rotary_size = 0;

  int64_t group() const { return heads / kv_heads; }
};

// Clusters of the first cached tokens of every row, by key head: cluster j is the slots from where
// the one before it ends, and parents are runs of clusters.
struct TokenClusters {
  Type type = Type::kFloat;              // of centroids and parents
  const char* centroids = nullptr;       // [K, count, D]
  const int32_t* ends = nullptr;         // [K, count]
  const float* radii = nullptr;          // [K, count]
  int64_t count = 0;                     // 0: there are none
  const char* parents = nullptr;         // [K, parent_count, D]
  const int32_t* parent_ends = nullptr;  // [K, parent_count]: clusters
  const float* parent_radii = nullptr;   // [K, parent_count]
  int64_t parent_count = 0;
  const float* thresholds = nullptr;  // of parents, of clusters
};

// The first cached tokens of every row, whose keys are a product of two matrices: `tokens` times
// the `basis` of a key head, turned to their positions. They have no place in the cache.
struct LowRankTokens {
  Type type = Type::kFloat;            // of all but outliers
  const char* tokens = nullptr;        // [count, rank]
  const char* basis = nullptr;         // [K, D, rank]
  const char* values = nullptr;        // [K, count, E]
  const char* landmarks = nullptr;     // [K, chunks, D]: means of the keys of a chunk
  const int32_t* outliers = nullptr;   // [K, outlier_count]: chunks that keep their keys
  const char* outlier_keys = nullptr;  // [K, outlier_count, chunk, D]
  int64_t count = 0;                   // 0: there are none
  int64_t rank = 0;
  int64_t chunk = 1;  // tokens
  int64_t chunks = 0;
  int64_t outlier_count = 0;
};

// The operands of one step: B rows, S new tokens, T tokens in all.
struct AttentionOperands {
  int64_t batch = 0;
  int64_t seq = 0;
  int64_t total = 0;
  const float* query = nullptr;    // [B, S, H * D]
  const float* key = nullptr;      // [B, S, K * D]
  const float* value = nullptr;    // [B, S, K * E]
  const uint8_t* valid = nullptr;  // [B, T]
  const float* bias = nullptr;     // [bias_batch, bias_heads, S, T] or null
  int64_t bias_batch = 1;
  int64_t bias_heads = 1;
  const float* cosine = nullptr;  // [angle_batch, S, R / 2] with rotary
  const float* sine = nullptr;
  int64_t angle_batch = 1;
  const float* far_cosine = nullptr;  // [far_batch, positions, R / 2] of a storage that has them
  const float* far_sine = nullptr;
  int64_t far_batch = 1;
  int64_t far_positions = 0;
  const float* scores = nullptr;  // [B, T] of a storage that reads them
  TokenClusters clusters;
  LowRankTokens low_rank;

  int64_t past() const { return total - seq; }
};

// Bias of slot 0 for a query of a head, or null.
inline const float* BiasRow(const AttentionOperands& operands, int64_t row, int64_t head,
                            int64_t query) {
  if (operands.bias == nullptr) return nullptr;
  const int64_t b = operands.bias_batch == 1 ? 0 : row;
  const int64_t h = operands.bias_heads == 1 ? 0 : head;
  return operands.bias + ((b * operands.bias_heads + h) * operands.seq + query) * operands.total;
}

// fn(begin, end) on ranges of at most `grain` indices that cover [0, count), on several threads.
using RangeFunction = std::function<void(int64_t, int64_t)>;
using ParallelFunction = std::function<void(int64_t count, int64_t grain, const RangeFunction& fn)>;

// Memory of a thread that lives as long as it, one for each use: what is allocated anew in every
// step costs more than what is done with it, since the system clears its pages.
enum ThreadBuffer {
  kScores,
  kSums,
  kPanels,
  kValueRows,
  kPageRows,
  kPageScratch,
  kPageQueries,
  kFarQueries,
  kTurnedKeys,
  kRebuiltKeys,
  kCoefficients,
  kBases,
  kBlockScores,
  kPartSums,
  kVotes,
  kPartScores,
  kTokenShares,
  kThreadBuffers  // how many
};
float* ThreadFloats(ThreadBuffer use, int64_t floats);

// Rotates a row of D floats by R / 2 angles.
void RotateRow(const AttentionForm& form, const float* cosine, const float* sine, float* x);

// The new tokens as attention reads them, and where each row begins.
class NewTokens {
 public:
  // Rotates queries and keys. Throws Error for a key or value that is not finite.
  NewTokens(const AttentionForm& form, const AttentionOperands& operands,
            const ParallelFunction& parallel);

  // Query row of token i and group member g, the first of a run ordered by token, then member;
  // rows are PaddedRow(D) apart and zero-padded.
  const float* Query(int64_t row, int64_t head, int64_t i) const {
    const int64_t at = (row * form_.kv_heads + head) * operands_.seq + i;
    return queries_.data() + at * form_.group() * PaddedRow(form_.head_size);
  }
  TokenRows Keys(int64_t row, int64_t head, int64_t i) const {
    const int64_t at = (row * form_.kv_heads + head) * operands_.seq + i;
    return {keys_.data() + at * form_.head_size, Type::kFloat, form_.head_size};
  }
  TokenRows Values(int64_t row, int64_t head, int64_t i) const {
    const int64_t stride = form_.kv_heads * form_.value_size;
    const float* const at = operands_.value + (row * operands_.seq + i) * stride;
    return {at + head * form_.value_size, Type::kFloat, stride};
  }
  // First valid slot of a row; T if there is none.
  int64_t Start(int64_t row) const { return starts_[row]; }

 private:
  void FindStarts();
  void PrepareToken(int64_t row, int64_t i);
  void Rotate(float* x, int64_t row, int64_t i) const;

  const AttentionForm& form_;
  const AttentionOperands& operands_;
  std::vector<float> queries_;
  std::vector<float> keys_;
  std::vector<int64_t> starts_;
};

class TokenStore;

// Slots that query i of a row may see, if they are valid.
struct VisibleSlots {
  int64_t begin;
  int64_t end;
};
VisibleSlots Visible(const AttentionForm& form, const AttentionOperands& operands, int64_t start,
                     int64_t i);

// Of a query row: the maximum of its scores and the sum of exp(score - maximum).
struct Normaliser {
  float max;
  float sum;
};

class ChosenSlots;
class FarSinks;
class StridePattern;
struct TokenShares;

// Where a step does not read just the slots it sees: what it reads instead, and what besides.
struct Reads {
  const ChosenSlots* chosen = nullptr;
  const FarSinks* sinks = nullptr;
  const TokenShares* shares = nullptr;  // of each row: of what is chosen, what is known already
  const StridePattern* pattern = nullptr;
  bool packed = false;  // whether slots are not those of the text, so that the caller logs reads
};

// Computes y [B, S, H * E], and the normalisers [B, K, S, G] unless null. Throws Error when a
// result is not finite.
void Attend(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
            const NewTokens& tokens, const TokenStore& store, const Reads& reads,
            const ParallelFunction& parallel, float* y, Normaliser* normalisers = nullptr);

}  // namespace effc
