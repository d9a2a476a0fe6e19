// Storage `pages`: the first and last tokens as they are, those between in pages of codes.
#pragma once

#include "cpu/cache_storage.h"
#include "cpu/page.h"
#include "cpu/selection.h"

namespace effc {

class PageStep;
class PageStore;
struct VotedSlots;

// How the salient tokens of a page are chosen.
enum class Importance : int32_t { kNone, kNormalised, kCausalCount, kAccumulated };

// The attributes of the storage.
struct PageCacheSpec {
  PageSpec page;
  int64_t sinks = 0;
  int64_t recent = 0;
  Importance importance = Importance::kNone;

  int64_t places() const { return sinks + recent + page.page; }
  bool two_classes() const { return page.salient > 0 && page.salient < page.page; }
  bool has_statistics() const {
    return page.salient < page.page || page.key_scheme == KeyScheme::kBalanced;
  }
  // Full pages of a row with this many tokens.
  int64_t Pages(int64_t tokens) const {
    const int64_t rest = tokens - sinks - recent;
    return rest < 0 ? 0 : rest / page.page;
  }
};

class PageStorage : public CacheStorage {
 public:
  // Throws Error for a page that there cannot be.
  PageStorage(const AttentionForm& form, const PageCacheSpec& spec, const SelectionSpec& selection);

  std::vector<CacheTensorForm> Tensors(int64_t batch) const override;
  void CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const override;
  std::vector<int64_t> Present(size_t index, const std::vector<int64_t>& past,
                               int64_t total) const override;
  void Step(const Kernels& kernels, const AttentionOperands& operands,
            const std::vector<CacheTensor>& past, const std::vector<CacheTensor>& present,
            const ParallelFunction& parallel, float* y) const override;

 private:
  VotedSlots Choose(const Kernels& kernels, const PageStep& step, const PageStore& store,
                    const ParallelFunction& parallel) const;

  AttentionForm form_;
  PageCacheSpec spec_;
  SelectionSpec selection_;
  PageLayout layout_;
};

// Tokens that went into pages since the library was loaded, each counted for every row and key
// head.
int64_t QuantizedTokens();

}  // namespace effc
