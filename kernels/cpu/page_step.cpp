#include "cpu/page_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace effc {
namespace {

constexpr int64_t kAllProbe = 32;    // up to so many new tokens
constexpr int64_t kProbeShare = 20;  // else one of so many at the end, and as many before

uint64_t SplitMix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

TokenRows ExactRows(const CacheTensor& tensor, int64_t row, int64_t head, int64_t place) {
  const int64_t size = tensor.dims[3];
  const int64_t at = ((row * tensor.dims[1] + head) * tensor.dims[2] + place) * size;
  return {tensor.data + at * ElementBytes(tensor.type), tensor.type, size};
}

}  // namespace

PageRow PageStep::Row(int64_t row) const {
  PageRow r{};
  r.start = tokens.Start(row);
  r.old_tokens = std::max<int64_t>(0, operands.past() - r.start);
  r.tokens = operands.total - r.start;
  r.old_pages = spec.Pages(r.old_tokens);
  r.pages = spec.Pages(r.tokens);
  return r;
}

TokenSpan PageStep::At(const PageRow& row, int64_t index, int64_t head, int64_t u) const {
  const int64_t old = OldLive(row);
  if (u < old) {
    return {old - u, ExactRows(past[kExactKey], index, head, u),
            ExactRows(past[kExactValue], index, head, u), nullptr};
  }
  const int64_t i = row.start + Token(row, u) - operands.past();
  return {Live(row) - u, tokens.Keys(index, head, i), tokens.Values(index, head, i), nullptr};
}

uint8_t* PageStep::Page(const CacheTensor& pages, int64_t row, int64_t head, int64_t page) const {
  const int64_t capacity = pages.dims[2];
  const int64_t place = form.window > 0 ? page % capacity : page;
  const int64_t at = (row * pages.dims[1] + head) * capacity + place;
  return reinterpret_cast<uint8_t*>(pages.data) + at * layout.bytes;
}

PageStore::PageStore(const PageStep& step) : step_(step) {
  for (int64_t row = 0; row < step.operands.batch; ++row) rows_.push_back(step.Row(row));
}

int64_t PageStore::BlockBegin(int64_t row, int64_t slot) const {
  const PageRow& r = rows_[row];
  const int64_t paged = slot - r.start - step_.spec.sinks;
  const int64_t page = step_.spec.page.page;
  if (paged < 0 || paged >= r.old_pages * page) return slot;
  return slot - paged % page;
}

int64_t PageStore::BlockEnd(int64_t row, int64_t begin, int64_t end) const {
  const PageRow& r = rows_[row];
  const int64_t page = step_.spec.page.page;
  const int64_t paged = begin - r.start - step_.spec.sinks;
  if (paged >= 0 && paged < r.old_pages * page) return begin + page;
  int64_t limit = std::min(end, begin + kBlockTokens);
  if (paged < 0 && r.old_pages > 0) limit = std::min(limit, r.start + step_.spec.sinks);
  return limit;
}

TokenSpan PageStore::Run(int64_t row, int64_t head, int64_t slot, int64_t end) const {
  const PageRow& r = rows_[row];
  const int64_t token = slot - r.start;
  const int64_t page = step_.spec.page.page;
  const int64_t paged = token - step_.spec.sinks;
  if (paged >= 0 && paged < r.old_pages * page) {
    const uint8_t* const bytes = step_.Page(step_.past[kPages], row, head, paged / page);
    return {page, {}, {}, bytes};
  }
  const int64_t live = paged < 0 ? token : token - r.old_pages * page;
  TokenSpan span = step_.At(r, row, head, live);
  span.count = std::min(span.count, end - slot);
  return span;
}

std::vector<int64_t> Probes(int64_t count, int64_t past) {
  std::vector<int64_t> probes;
  const int64_t share = count <= kAllProbe ? 0 : (count + kProbeShare - 1) / kProbeShare;
  const int64_t rest = share == 0 ? 0 : count - share;
  for (int64_t i = 0; i < share; ++i) {
    const int64_t begin = i * rest / share;
    const int64_t length = (i + 1) * rest / share - begin;
    const uint64_t seed = (static_cast<uint64_t>(count) << 32) + static_cast<uint64_t>(past + i);
    probes.push_back(begin +
                     static_cast<int64_t>(SplitMix64(seed) % static_cast<uint64_t>(length)));
  }
  for (int64_t i = rest; i < count; ++i) probes.push_back(i);
  return probes;
}

namespace {

// Adds the probabilities of one probe to the live tokens of a row and key head.
class ProbeReader {
 public:
  ProbeReader(const Kernels& kernels, const PageStep& step, const PageStore& store,
              const Normaliser* normalisers, int64_t index, int64_t head)
      : pieces_(*kernels.attention),
        step_(step),
        reader_(kernels, step.form, store),
        normalisers_(normalisers),
        index_(index),
        head_(head),
        row_(step.Row(index)),
        group_(step.form.group()) {}

  void Add(int64_t query, Statistics& statistics) const {
    const VisibleSlots seen = Visible(step_.form, step_.operands, row_.start, query);
    const int64_t live = step_.Live(row_);
    for (int64_t u = 0; u < live;) {
      int64_t count = std::min(live - u, kBlockTokens);
      if (u < step_.spec.sinks) count = std::min(count, step_.spec.sinks - u);
      const int64_t slot = row_.start + step_.Token(row_, u);
      if (slot < seen.end && slot + count > seen.begin) {
        AddBlock(query, seen, slot, count, statistics.sums.data() + u,
                 statistics.counts.data() + u);
      }
      u += count;
    }
  }

 private:
  void AddBlock(int64_t query, const VisibleSlots& seen, int64_t slot, int64_t count, float* sums,
                float* counts) const {
    const AttentionOperands& operands = step_.operands;
    const uint8_t* const valid = operands.valid + index_ * operands.total + slot;
    float* const scores = ThreadFloats(kScores, group_ * kScoreStride);
    reader_.Scores({index_, head_, slot, slot + count}, step_.tokens.Query(index_, head_, query),
                   group_, true, scores);
    std::vector<QueryRow> rows(group_);
    const Normaliser* const normaliser =
        normalisers_ + ((index_ * step_.form.kv_heads + head_) * operands.seq + query) * group_;
    for (int64_t g = 0; g < group_; ++g) {
      rows[g] = {normaliser[g].max, 0, seen.begin, seen.end,
                 BiasRow(operands, index_, head_ * group_ + g, query)};
    }
    const SlotBlock block{slot, count, valid, step_.form.scale, step_.form.softcap};
    pieces_.absorb(rows.data(), group_, block, scores, kScoreStride, nullptr, 0, 0);
    for (int64_t g = 0; g < group_; ++g) {
      if (!(normaliser[g].sum > 0)) continue;
      for (int64_t t = 0; t < count; ++t) {
        sums[t] += scores[g * kScoreStride + t] / normaliser[g].sum;
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      counts[t] += valid[t] && slot + t >= seen.begin && slot + t < seen.end ? 1.0f : 0.0f;
    }
  }

  const AttentionKernels& pieces_;
  const PageStep& step_;
  const BlockReader reader_;
  const Normaliser* const normalisers_;
  const int64_t index_;
  const int64_t head_;
  const PageRow row_;
  const int64_t group_;
};

// Largest |q| of each channel over the valid queries.
void RaiseQueryMax(const PageStep& step, int64_t index, int64_t head, std::vector<float>& most) {
  const int64_t d = step.form.head_size;
  const int64_t group = step.form.group();
  const uint8_t* const valid = step.operands.valid + index * step.operands.total;
  for (int64_t i = 0; i < step.operands.seq; ++i) {
    if (!valid[step.operands.past() + i]) continue;
    for (int64_t g = 0; g < group; ++g) {
      const float* const q = step.tokens.Query(index, head, i) + g * PaddedRow(d);
      for (int64_t j = 0; j < d; ++j) most[j] = std::max(most[j], std::fabs(q[j]));
    }
  }
}

}  // namespace

Statistics AddProbes(const Kernels& kernels, const PageStep& step, const PageStore& store,
                     const Normaliser* normalisers, int64_t index, int64_t head) {
  const PageRow row = step.Row(index);
  const int64_t d = step.form.head_size;
  const int64_t places = step.spec.places();
  const CacheTensor& tensor = step.past[kStatistics];
  const int64_t at = (index * step.form.kv_heads + head) * tensor.dims[2];
  const float* const old = reinterpret_cast<const float*>(tensor.data) + at;
  const int64_t live = step.Live(row);
  const int64_t kept = step.OldLive(row);
  Statistics statistics;
  statistics.sums.assign(old, old + kept);
  statistics.counts.assign(old + places, old + places + kept);
  statistics.query_max.assign(old + 2 * places, old + 2 * places + d);
  statistics.sums.resize(live);
  statistics.counts.resize(live);
  RaiseQueryMax(step, index, head, statistics.query_max);
  if (!step.spec.two_classes()) return statistics;
  const int64_t own = row.new_tokens();
  const int64_t first = step.operands.seq - own;
  const uint8_t* const valid = step.operands.valid + index * step.operands.total;
  const ProbeReader reader(kernels, step, store, normalisers, index, head);
  for (const int64_t probe : Probes(own, row.old_tokens)) {
    if (valid[step.operands.past() + first + probe]) reader.Add(first + probe, statistics);
  }
  return statistics;
}

}  // namespace effc
