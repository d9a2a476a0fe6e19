// How a cache keeps its tokens: one class for each value of the attribute `storage`.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/cached_attention.h"

namespace effc {

// A tensor of the cache. As `present`, data may be that of `past`.
struct CacheTensor {
  char* data = nullptr;
  Type type = Type::kFloat;
  std::vector<int64_t> dims;
};

// What a tensor of the cache must be; -1 is any size.
struct CacheTensorForm {
  const char* name;
  std::vector<Type> types;
  std::vector<int64_t> dims;
};

class CacheStorage {
 public:
  virtual ~CacheStorage() = default;
  // The tensors for `batch` rows (-1: unknown).
  virtual std::vector<CacheTensorForm> Tensors(int64_t batch) const = 0;
  // Throws Error unless past tensors that fit Tensors() can hold the `past` tokens.
  virtual void CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const = 0;
  // Dimensions of present tensor `index`, from those of the past and the tokens in all (-1:
  // unknown).
  virtual std::vector<int64_t> Present(size_t index, const std::vector<int64_t>& past,
                                       int64_t total) const = 0;
  // Positions of which two inputs behind the cache have cosines and sines: that of queries of far
  // sinks, or those of all places; -1: of any number. 0: there are no such inputs.
  virtual int64_t far_positions() const { return 0; }
  // Whether those of places take the place of the new tokens' own.
  virtual bool turns_by_place() const { return false; }
  // Whether an input follows them: a score of every token.
  virtual bool reads_scores() const { return false; }
  // Whether seven inputs follow the cache: the clusters of a prefix.
  virtual bool has_clusters() const { return false; }
  // Tokens of a chunk where six inputs follow the angles: a prefix of low rank. 0: there are none.
  virtual int64_t low_rank_chunk() const { return 0; }
  // Attention of one step into y, then the cache that follows into `present`.
  virtual void Step(const Kernels& kernels, const AttentionOperands& operands,
                    const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
                    const ParallelFunction& parallel, float* y) const = 0;
};

// Attributes of a node, by name. Every function throws Error when there is none of that type.
class Attributes {
 public:
  virtual ~Attributes() = default;
  virtual int64_t Int(const char* name) const = 0;
  virtual float Float(const char* name) const = 0;
  virtual std::string String(const char* name) const = 0;
  virtual std::vector<int64_t> Ints(const char* name) const = 0;
};

// Read and check the attributes of effc.CachedAttention. Throw Error for a value that it has not.
AttentionForm ReadForm(const Attributes& attributes);
std::unique_ptr<CacheStorage> ReadStorage(const Attributes& attributes, const AttentionForm& form);

}  // namespace effc
