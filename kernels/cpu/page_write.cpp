// The cache after a step: pages that became full, then the tokens that stay as they are.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/page_step.h"

namespace effc {
namespace {

std::atomic<int64_t> quantized_tokens{0};

float ImportanceOf(Importance kind, float sum, float count, int64_t following) {
  switch (kind) {
    case Importance::kNormalised:
      return count > 0 ? sum / count : 0;
    case Importance::kCausalCount:
      return sum / static_cast<float>(following);
    default:
      return sum;
  }
}

// Writes the cache of one row and key head.
class PageWriter {
 public:
  PageWriter(const Kernels& kernels, const PageStep& step, const Statistics* statistics,
             const std::vector<CacheTensor>& present, int64_t index, int64_t head)
      : kernels_(kernels),
        step_(step),
        statistics_(statistics),
        present_(present),
        index_(index),
        head_(head),
        row_(step.Row(index)),
        page_(step.spec.page.page),
        paged_((row_.pages - row_.old_pages) * page_) {}

  void Write() const {
    if (present_[kPages].data != step_.past[kPages].data) CopyPages();
    const int64_t capacity = present_[kPages].dims[2];
    // A ring keeps the last pages only.
    const int64_t kept = step_.form.window > 0 ? row_.pages - capacity : int64_t{0};
    for (int64_t p = std::max(row_.old_pages, kept); p < row_.pages; ++p) WritePage(p);
    WriteExact(kExactKey);
    WriteExact(kExactValue);
    if (statistics_ != nullptr) WriteStatistics();
  }

 private:
  int64_t Head(const CacheTensor& tensor) const { return index_ * tensor.dims[1] + head_; }

  void CopyPages() const {
    const CacheTensor& from = step_.past[kPages];
    const CacheTensor& to = present_[kPages];
    const int64_t used = from.dims[2] * step_.layout.bytes;
    const int64_t size = to.dims[2] * step_.layout.bytes;
    char* const out = to.data + Head(to) * size;
    if (used > 0) std::memcpy(out, from.data + Head(from) * used, used);
    if (size > used) std::memset(out + used, 0, size - used);
  }

  // Live token at the begin of a page that became full.
  int64_t FirstLive(int64_t page) const {
    return step_.spec.sinks + (page - row_.old_pages) * page_;
  }

  void WritePage(int64_t page) const {
    const int64_t first = FirstLive(page);
    const int64_t d = step_.form.head_size;
    const int64_t e = step_.form.value_size;
    const float* keys[kMaxPage];
    const float* values[kMaxPage];
    std::vector<float> widened(page_ * (d + e));
    for (int64_t t = 0; t < page_; ++t) {
      const TokenSpan span = step_.At(row_, index_, head_, first + t);
      keys[t] = FloatRow(span.keys, d, widened.data() + t * d);
      values[t] = FloatRow(span.values, e, widened.data() + page_ * d + t * e);
    }
    const int64_t slot = row_.start + step_.Token(row_, first);
    const uint8_t* const valid = step_.operands.valid + index_ * step_.operands.total + slot;
    float importance[kMaxPage] = {};
    if (step_.spec.two_classes()) Rank(first, importance);
    const float* const query_max = statistics_ == nullptr ? nullptr : statistics_->query_max.data();
    const int64_t bad = EncodePage(kernels_, step_.layout, keys, values, valid, importance,
                                   query_max, step_.Page(present_[kPages], index_, head_, page));
    if (bad >= 0) {
      throw Error("the key or value of row " + std::to_string(index_) + ", head " +
                  std::to_string(head_) + ", slot " + std::to_string(slot + bad) +
                  " in the cache is NaN or infinite; the cache is damaged");
    }
    quantized_tokens += page_;
  }

  const float* FloatRow(const TokenRows& rows, int64_t size, float* room) const {
    if (rows.type == Type::kFloat) return static_cast<const float*>(rows.data);
    kernels_.attention->widen(rows.data, rows.type, size, room);
    return room;
  }

  void Rank(int64_t first, float* importance) const {
    for (int64_t t = 0; t < page_; ++t) {
      const int64_t u = first + t;
      importance[t] = ImportanceOf(step_.spec.importance, statistics_->sums[u],
                                   statistics_->counts[u], row_.tokens - step_.Token(row_, u));
    }
  }

  // fn(live token, its new place) for all that stay as they are, ascending.
  template <class Fn>
  void ForEachExact(Fn&& fn) const {
    const int64_t sinks = step_.spec.sinks;
    const int64_t live = step_.Live(row_);
    for (int64_t u = 0; u < live; ++u) {
      if (u < sinks) {
        fn(u, u);
      } else if (u >= sinks + paged_) {
        fn(u, u - paged_);
      }
    }
  }

  void WriteExact(PageTensor which) const {
    const CacheTensor& to = present_[which];
    const int64_t size = to.dims[3];
    const int64_t row_bytes = size * ElementBytes(to.type);
    const int64_t old = step_.OldLive(row_);
    char* const out = to.data + Head(to) * to.dims[2] * row_bytes;
    int64_t used = 0;
    ForEachExact([&](int64_t u, int64_t place) {
      const TokenSpan span = step_.At(row_, index_, head_, u);
      const TokenRows& from = which == kExactKey ? span.keys : span.values;
      char* const at = out + place * row_bytes;
      used = place + 1;
      if (u < old) {
        if (at != from.data) std::memmove(at, from.data, row_bytes);
        return;
      }
      const auto* const x = static_cast<const float*>(from.data);
      if (kernels_.attention->narrow(x, size, to.type, at)) return;
      throw Error("a key or value of row " + std::to_string(index_) + ", head " +
                  std::to_string(head_) + ", slot " +
                  std::to_string(row_.start + step_.Token(row_, u)) +
                  " is too large for the 16-bit type of the cache; use a float32 cache");
    });
    if (to.data != step_.past[which].data) {
      std::memset(out + used * row_bytes, 0, (to.dims[2] - used) * row_bytes);
    }
  }

  void WriteStatistics() const {
    const CacheTensor& to = present_[kStatistics];
    const int64_t places = step_.spec.places();
    float* const out = reinterpret_cast<float*>(to.data) + Head(to) * to.dims[2];
    std::fill(out, out + 2 * places, 0.0f);
    ForEachExact([&](int64_t u, int64_t place) {
      out[place] = statistics_->sums[u];
      out[places + place] = statistics_->counts[u];
    });
    std::copy(statistics_->query_max.begin(), statistics_->query_max.end(), out + 2 * places);
  }

  const Kernels& kernels_;
  const PageStep& step_;
  const Statistics* const statistics_;
  const std::vector<CacheTensor>& present_;
  const int64_t index_;
  const int64_t head_;
  const PageRow row_;
  const int64_t page_;
  const int64_t paged_;  // live tokens that go into pages
};

}  // namespace

int64_t QuantizedTokens() { return quantized_tokens; }

void WritePages(const Kernels& kernels, const PageStep& step, const Statistics* statistics,
                const std::vector<CacheTensor>& present, int64_t row, int64_t head) {
  PageWriter(kernels, step, statistics, present, row, head).Write();
}

}  // namespace effc
