#include "cpu/token_store.h"

#include <algorithm>
#include <cstring>

namespace effc {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kStreamBytes = 4096;  // how far ahead rows that follow each other are fetched

int64_t Distance(const TokenRows& from, const TokenRows& to) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(to.data) -
                              reinterpret_cast<uintptr_t>(from.data));
}

// fn(run, tokens of the block before it)
template <class Fn>
void ForEachRun(const TokenStore& store, const BlockPlace& block, Fn&& fn) {
  for (int64_t slot = block.begin; slot < block.end;) {
    const TokenSpan run = store.Run(block.row, block.head, slot, block.end);
    fn(run, slot - block.begin);
    slot += run.count;
  }
}

// Copies m rows of n floats between strides.
void CopyRows(const float* from, int64_t from_stride, int64_t m, int64_t n, float* to,
              int64_t to_stride) {
  for (int64_t i = 0; i < m; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride, n * sizeof(float));
  }
}

}  // namespace

void BlockReader::Scores(const BlockPlace& block, const float* queries, int64_t m, bool ordered,
                         float* scores) const {
  const int64_t d = form_.head_size;
  ForEachRun(store_, block, [&](const TokenSpan& run, int64_t at) {
    if (run.page != nullptr) {
      return ScorePage(run.page, queries, m, ordered, scores, kScoreStride);
    }
    const TokenRows keys = store_.Keys(block.row, block.head, block.begin + at, run);
    pieces_.scores(queries, PaddedRow(d), m, keys, run.count, d, scores + at, kScoreStride,
                   Distance(keys, run.values));
  });
}

void BlockReader::KeyScores(const BlockPlace& block, const float* queries, int64_t m, float* scores,
                            int64_t stride) const {
  const int64_t d = form_.head_size;
  ForEachRun(store_, block, [&](const TokenSpan& run, int64_t at) {
    if (run.page == nullptr) {
      const TokenRows keys = store_.Keys(block.row, block.head, block.begin + at, run);
      return pieces_.scores(queries, PaddedRow(d), m, keys, run.count, d, scores + at, stride,
                            kStreamBytes);
    }
    ScorePage(run.page, queries, m, true, scores, stride);
  });
}

void BlockReader::Values(const BlockPlace& block, const float* weights, int64_t m, bool ordered,
                         float* sums, const BlockPlace& next) const {
  const TokenRows keys = store_.Run(next.row, next.head, next.begin, next.end).keys;
  ForEachRun(store_, block, [&](const TokenSpan& run, int64_t at) {
    if (run.page != nullptr) return WeighPage(run.page, weights, m, ordered, sums);
    const int64_t before = at * run.keys.stride * ElementBytes(run.keys.type);
    const int64_t ahead = keys.data == nullptr ? 0 : Distance(run.values, keys) + before;
    pieces_.values(weights + at, kScoreStride, m, run.values, run.count, form_.value_size, sums,
                   PaddedRow(form_.value_size), ahead);
  });
}

void BlockReader::Widen(const BlockPlace& block, float* panels, float* values) const {
  const int64_t e = form_.value_size;
  ForEachRun(store_, block, [&](const TokenSpan& run, int64_t at) {
    if (run.page != nullptr) return WidenPage(run.page, panels, values);
    const TokenRows keys = store_.Keys(block.row, block.head, block.begin + at, run);
    pieces_.transpose(keys, run.count, form_.head_size, at, panels);
    const char* row = static_cast<const char*>(run.values.data);
    const int64_t stride = run.values.stride * ElementBytes(run.values.type);
    for (int64_t t = 0; t < run.count; ++t, row += stride) {
      pieces_.widen(row, run.values.type, e, values + (at + t) * e);
    }
  });
}

void BlockReader::ScorePage(const uint8_t* page, const float* queries, int64_t m, bool ordered,
                            float* scores, int64_t stride) const {
  const PageLayout& layout = *store_.layout();
  const int64_t d = form_.head_size;
  const float* rows = queries;
  if (d != PaddedRow(d)) {
    float* const packed = ThreadFloats(kPageQueries, m * d);
    CopyRows(queries, PaddedRow(d), m, d, packed, d);
    rows = packed;
  }
  float* const scratch = ThreadFloats(kPageScratch, PageScratchFloats(layout, m));
  if (!ordered || !layout.two_classes()) {
    return PageScores(kernels_, layout, page, rows, m, scores, stride, scratch);
  }
  float* const stored = ThreadFloats(kPageRows, m * kScoreStride);
  PageScores(kernels_, layout, page, rows, m, stored, kScoreStride, scratch);
  const StoredOrder order = PageOrder(layout, page);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t t = 0; t < layout.spec.page; ++t) {
      scores[i * stride + order[t]] = stored[i * kScoreStride + t];
    }
  }
}

void BlockReader::WeighPage(const uint8_t* page, const float* weights, int64_t m, bool ordered,
                            float* sums) const {
  const PageLayout& layout = *store_.layout();
  const int64_t e = form_.value_size;
  const float* rows = weights;
  if (ordered && layout.two_classes()) {
    float* const stored = ThreadFloats(kPageRows, m * kScoreStride);
    const StoredOrder order = PageOrder(layout, page);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t t = 0; t < layout.spec.page; ++t) {
        stored[i * kScoreStride + t] = weights[i * kScoreStride + order[t]];
      }
    }
    rows = stored;
  }
  float* const scratch = ThreadFloats(kPageScratch, PageScratchFloats(layout, m));
  if (e == PaddedRow(e)) {
    return PageValues(kernels_, layout, page, rows, kScoreStride, m, sums, scratch);
  }
  float* const packed = ThreadFloats(kPageQueries, m * e);
  CopyRows(sums, PaddedRow(e), m, e, packed, e);
  PageValues(kernels_, layout, page, rows, kScoreStride, m, packed, scratch);
  CopyRows(packed, e, m, e, sums, PaddedRow(e));
}

void BlockReader::Value(int64_t row, int64_t head, int64_t slot, float* out) const {
  const TokenSpan run = store_.Run(row, head, slot, slot + 1);
  if (run.page == nullptr) {
    return pieces_.widen(run.values.data, run.values.type, form_.value_size, out);
  }
  const PageLayout& layout = *store_.layout();
  const int64_t place = slot - store_.BlockBegin(row, slot);
  DecodeValue(kernels_, layout, run.page, StoredPlace(layout, run.page, place), out);
}

void BlockReader::PrefetchValue(int64_t row, int64_t head, int64_t slot) const {
  const TokenSpan run = store_.Run(row, head, slot, slot + 1);
  if (run.page != nullptr) {
    const PageLayout& layout = *store_.layout();
    const int64_t place = slot - store_.BlockBegin(row, slot);
    return ::effc::PrefetchValue(layout, run.page, StoredPlace(layout, run.page, place));
  }
  const auto* const bytes = static_cast<const char*>(run.values.data);
  const int64_t count = form_.value_size * ElementBytes(run.values.type);
  for (int64_t i = 0; i < count; i += kLineBytes) __builtin_prefetch(bytes + i);
  __builtin_prefetch(bytes + count - 1);  // rows need not begin with a line
}

void BlockReader::WidenPage(const uint8_t* page, float* panels, float* values) const {
  const PageLayout& layout = *store_.layout();
  const int64_t d = form_.head_size;
  const int64_t e = form_.value_size;
  const int64_t tokens = layout.spec.page;
  float* const keys = ThreadFloats(kPageQueries, tokens * d);
  if (!layout.two_classes()) {
    DecodePage(kernels_, layout, page, keys, values);
    return pieces_.transpose({keys, Type::kFloat, d}, tokens, d, 0, panels);
  }
  float* const ordered = ThreadFloats(kPageRows, tokens * std::max(d, e));
  const StoredOrder order = PageOrder(layout, page);
  DecodePage(kernels_, layout, page, keys, ordered);
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(values + order[t] * e, ordered + t * e, e * sizeof(float));
  }
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(ordered + order[t] * d, keys + t * d, d * sizeof(float));
  }
  pieces_.transpose({ordered, Type::kFloat, d}, tokens, d, 0, panels);
}

}  // namespace effc
