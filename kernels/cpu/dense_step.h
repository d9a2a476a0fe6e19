// One step of a cache that keeps tokens as they are: where they lie, and what is written.
#pragma once

#include <vector>

#include "cpu/cache_storage.h"
#include "cpu/token_store.h"

namespace effc {

// Keys or values of a tensor [B, K, C, size] from a place on.
TokenRows Place(const CacheTensor& tensor, int64_t row, int64_t head, int64_t place);

// Rounds a token into its place. Throws Error when its type cannot hold it.
void StoreToken(const Kernels& kernels, const float* from, const CacheTensor& tensor, int64_t row,
                int64_t head, int64_t place, int64_t token);

// Slot j at place j or, in a ring, at j mod r; then the new tokens.
class DenseStore : public TokenStore {
 public:
  DenseStore(const AttentionOperands& operands, const NewTokens& tokens, const CacheTensor& keys,
             const CacheTensor& values, int64_t ring)
      : operands_(operands), tokens_(tokens), keys_(keys), values_(values), ring_(ring) {}

  int64_t BlockBegin(int64_t row, int64_t slot) const override;
  int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const override;
  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override;

 private:
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const CacheTensor& keys_;
  const CacheTensor& values_;
  const int64_t ring_;
};

// Keys and values after a step: the first two tensors of `past` and the new tokens.
void WriteDense(const Kernels& kernels, const AttentionForm& form,
                const AttentionOperands& operands, const NewTokens& tokens, int64_t ring,
                const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
                const ParallelFunction& parallel);

}  // namespace effc
