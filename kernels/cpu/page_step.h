// One step of a paged cache: what lies where, what probes see, what is written.
#pragma once

#include <vector>

#include "cpu/page_cache.h"
#include "cpu/token_store.h"

namespace effc {

enum PageTensor : size_t { kExactKey, kExactValue, kPages, kStatistics };

// Tokens of one row, counted from its first valid slot, before and after a step. Those not in pages
// are its live tokens: live token u is token u below `sinks`, else token u + old_pages * page.
struct PageRow {
  int64_t start;  // slot of token 0
  int64_t old_tokens;
  int64_t tokens;
  int64_t old_pages;
  int64_t pages;

  int64_t new_tokens() const { return tokens - old_tokens; }
};

class PageStep {
 public:
  PageStep(const AttentionForm& form, const PageCacheSpec& spec, const PageLayout& layout,
           const AttentionOperands& operands, const NewTokens& tokens,
           const std::vector<CacheTensor>& past)
      : form(form), spec(spec), layout(layout), operands(operands), tokens(tokens), past(past) {}

  PageRow Row(int64_t row) const;
  int64_t OldLive(const PageRow& row) const {
    return row.old_tokens - row.old_pages * spec.page.page;
  }
  int64_t Live(const PageRow& row) const { return row.tokens - row.old_pages * spec.page.page; }
  // Token of live token u, and back.
  int64_t Token(const PageRow& row, int64_t u) const {
    return u < spec.sinks ? u : u + row.old_pages * spec.page.page;
  }
  // The exact or new live tokens from u on: how many follow each other in memory, and where.
  TokenSpan At(const PageRow& row, int64_t index, int64_t head, int64_t u) const;
  uint8_t* Page(const CacheTensor& pages, int64_t row, int64_t head, int64_t page) const;

  const AttentionForm& form;
  const PageCacheSpec& spec;
  const PageLayout& layout;
  const AttentionOperands& operands;
  const NewTokens& tokens;
  const std::vector<CacheTensor>& past;
};

// The exact buffer, the pages and the new tokens as attention reads them.
class PageStore : public TokenStore {
 public:
  explicit PageStore(const PageStep& step);

  int64_t BlockBegin(int64_t row, int64_t slot) const override;
  int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const override;
  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override;
  const PageLayout* layout() const override { return &step_.layout; }

 private:
  const PageStep& step_;
  std::vector<PageRow> rows_;
};

// What the statistics of one row and key head are after a step, for its live tokens.
struct Statistics {
  std::vector<float> sums;    // of the probabilities that probes gave a token
  std::vector<float> counts;  // of probes that could see it
  std::vector<float> query_max;
};

// The old statistics and what the probes of this step add.
Statistics AddProbes(const Kernels& kernels, const PageStep& step, const PageStore& store,
                     const Normaliser* normalisers, int64_t row, int64_t head);

// Queries of a row that probe, ascending, of its `count` new tokens after `past` ones.
std::vector<int64_t> Probes(int64_t count, int64_t past);

// Writes the cache of one row and key head after a step; `statistics` is null without them.
void WritePages(const Kernels& kernels, const PageStep& step, const Statistics* statistics,
                const std::vector<CacheTensor>& present, int64_t row, int64_t head);

}  // namespace effc
