// Attention over a cache and new tokens, for every storage. docs/cached-attention.md has the
// meaning.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/page.h"

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

  int64_t past() const { return total - seq; }
};

// fn(begin, end) on ranges of at most `grain` indices that cover [0, count), on several threads.
using RangeFunction = std::function<void(int64_t, int64_t)>;
using ParallelFunction = std::function<void(int64_t count, int64_t grain, const RangeFunction& fn)>;

// Memory of a thread that lives as long as it; `slot` tells buffers apart.
float* ThreadFloats(int slot, int64_t floats);

// The new tokens as attention reads them, and where each row begins.
class NewTokens {
 public:
  // Rotates and scales queries, rotates keys. Throws Error for a key or value that is not finite.
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

// A run of tokens in memory: rows, or one coded page.
struct TokenSpan {
  int64_t count;
  TokenRows keys;
  TokenRows values;
  const uint8_t* page;  // null for rows
};

// Where the tokens of a step lie: the cache, then the new ones.
class TokenStore {
 public:
  virtual ~TokenStore() = default;
  // The block of slots that holds `slot` begins at BlockBegin and ends, before `end`, at BlockEnd.
  virtual int64_t BlockBegin(int64_t row, int64_t slot) const = 0;
  virtual int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const = 0;
  // The longest run from `slot` on that ends at `end` or before; a page is asked for as a block.
  virtual TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const = 0;
  virtual const PageLayout* layout() const { return nullptr; }
};

// Slots that query i of a row may see, if they are valid.
struct VisibleSlots {
  int64_t begin;
  int64_t end;
};
VisibleSlots Visible(const AttentionForm& form, const AttentionOperands& operands, int64_t start,
                     int64_t i);

// Computes y [B, S, H * E]. Throws Error when a result is not finite.
void Attend(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
            const NewTokens& tokens, const TokenStore& store, const ParallelFunction& parallel,
            float* y);

}  // namespace effc
