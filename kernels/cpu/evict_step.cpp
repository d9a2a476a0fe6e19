#include "cpu/evict_step.h"

#include <algorithm>
#include <cstring>

#include "cpu/evict_votes.h"
#include "cpu/read_log.h"

namespace effc {
namespace {

constexpr int64_t kTaskBytes = 1 << 17;

// Writes the cache of one row and key head. Places only move towards the start, so that `past` and
// `present` may be one.
class KeptWriter {
 public:
  KeptWriter(const Kernels& kernels, const EvictStep& step, const NewTokens& tokens,
             const std::vector<CacheTensor>& present, int64_t row, int64_t head)
      : kernels_(kernels),
        step_(step),
        tokens_(tokens),
        present_(present),
        row_(row),
        head_(head),
        kept_(step.Row(row).kept) {}

  // All candidates: old ones stay in their places.
  void Append() const {
    const int64_t count = step_.Row(row_).candidates();
    for (size_t i = kKeptKey; i <= kKeptToken; ++i) {
      if (step_.past[i].data == present_[i].data) continue;
      std::memcpy(At(present_[i], 0), At(step_.past[i], 0), kept_ * PlaceBytes(i));
      Clear(i, count);
    }
    if (kept_ == 0) Clear(kKeptToken, count);  // of what a buffer held before
    for (int64_t c = kept_; c < count; ++c) Write(c, c);
    WriteQueries();
  }

  // The chosen candidates, ascending.
  void Compact(const std::vector<int32_t>& chosen) const {
    const auto count = static_cast<int64_t>(chosen.size());
    for (int64_t place = 0; place < count; ++place) Write(chosen[place], place);
    for (size_t i = kKeptKey; i <= kKeptToken; ++i) Clear(i, count);
    WriteQueries();
  }

 private:
  int64_t PlaceBytes(size_t i) const {
    const CacheTensor& tensor = present_[i];
    return i == kKeptToken ? 4 : tensor.dims[3] * ElementBytes(tensor.type);
  }

  char* At(const CacheTensor& tensor, int64_t place) const {
    const int64_t at = (row_ * step_.form.kv_heads + head_) * step_.spec.places() + place;
    const bool numbers = tensor.dims.size() == 3;
    return tensor.data + at * (numbers ? 4 : tensor.dims[3] * ElementBytes(tensor.type));
  }

  void Clear(size_t i, int64_t from) const {
    std::memset(At(present_[i], from), 0, (step_.spec.places() - from) * PlaceBytes(i));
  }

  void Write(int64_t candidate, int64_t place) const {
    const int64_t number = step_.Candidate(row_, head_, candidate);
    step_.Tokens(present_[kKeptToken], row_, head_)[place] = static_cast<int32_t>(number + 1);
    if (candidate >= kept_) return WriteFresh(step_.Row(row_).fresh[candidate - kept_], place);
    for (const size_t i : {kKeptKey, kKeptValue}) {
      char* const to = At(present_[i], place);
      const char* const from = At(step_.past[i], candidate);
      if (to != from) std::memcpy(to, from, PlaceBytes(i));
    }
  }

  void WriteFresh(int64_t token, int64_t place) const {
    const TokenRows rows[] = {tokens_.Keys(row_, head_, token), tokens_.Values(row_, head_, token)};
    for (const size_t i : {kKeptKey, kKeptValue}) {
      StoreToken(kernels_, static_cast<const float*>(rows[i].data), present_[i], row_, head_, place,
                 token);
    }
  }

  // The queries of token t at place t mod `recent`.
  void WriteQueries() const {
    const int64_t d = step_.form.head_size;
    const int64_t group = step_.form.group();
    const int64_t recent = step_.spec.recent;
    const int64_t at = (row_ * step_.form.kv_heads + head_) * recent * group * d;
    auto* const to = reinterpret_cast<float*>(present_[kLastQuery].data) + at;
    const auto* const from = reinterpret_cast<const float*>(step_.past[kLastQuery].data) + at;
    if (to != from) std::memcpy(to, from, recent * group * d * sizeof(float));
    const int64_t first = std::max<int64_t>(0, step_.operands.seq - recent);
    for (int64_t i = first; i < step_.operands.seq; ++i) {
      const int64_t token = step_.Token(row_, i);
      if (token < 0) continue;
      const float* const queries = tokens_.Query(row_, head_, i);
      for (int64_t g = 0; g < group; ++g) {
        std::memcpy(to + (token % recent * group + g) * d, queries + g * PaddedRow(d),
                    d * sizeof(float));
      }
    }
  }

  const Kernels& kernels_;
  const EvictStep& step_;
  const NewTokens& tokens_;
  const std::vector<CacheTensor>& present_;
  const int64_t row_;
  const int64_t head_;
  const int64_t kept_;
};

// (row, head) pairs that one task writes.
int64_t Grain(const EvictStep& step, const std::vector<CacheTensor>& present) {
  int64_t bytes = 1;
  for (size_t i = kKeptKey; i <= kKeptValue; ++i) {
    const bool copies = step.past[i].data != present[i].data;
    bytes += (step.operands.seq + (copies ? step.spec.places() : 0)) * present[i].dims[3] * 4;
  }
  for (int64_t row = 0; row < step.operands.batch; ++row) {
    if (step.Overflows(row)) return 1;
  }
  return std::max<int64_t>(1, kTaskBytes / bytes);
}

}  // namespace

EvictStep::EvictStep(const AttentionForm& form, const SelectionSpec& spec,
                     const AttentionOperands& operands, const std::vector<CacheTensor>& past)
    : PackedStep(form, spec, operands, past) {
  for (int64_t row = 0; row < operands.batch; ++row) {
    rows_[row].kept = CountPlaces(row, Tokens(past[kKeptToken], row, 0), spec.places());
  }
  Pack();
}

void EvictStep::LogReads() const {
  if (!LogsReads() || operands.seq != 1) return;
  for (int64_t row = 0; row < operands.batch; ++row) {
    if (rows_[row].tokens <= 0) continue;
    for (int64_t head = 0; head < form.kv_heads; ++head) {
      std::vector<int64_t> tokens;
      for (int64_t c = 0; c < rows_[row].candidates(); ++c) {
        tokens.push_back(Candidate(row, head, c));
      }
      LogRead(row, head, rows_[row].tokens, RunsOf(tokens));
    }
  }
}

void WriteKept(const Kernels& kernels, const EvictStep& step, const NewTokens& tokens,
               const EvictVotes& votes, const std::vector<CacheTensor>& present,
               const ParallelFunction& parallel) {
  const int64_t heads = step.form.kv_heads;
  parallel(step.operands.batch * heads, Grain(step, present), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const KeptWriter writer(kernels, step, tokens, present, at / heads, at % heads);
      if (step.Overflows(at / heads)) {
        writer.Compact(votes.Choose(at / heads, at % heads));
      } else {
        writer.Append();
      }
    }
  });
}

}  // namespace effc
