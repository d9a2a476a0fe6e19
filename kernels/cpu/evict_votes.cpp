#include "cpu/evict_votes.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

namespace effc {
namespace {

constexpr int64_t kMostScores = 1 << 20;  // floats of scores at a time
constexpr int64_t kLeastRows = 16;

[[noreturn]] void RefuseDamaged(int64_t row, int64_t head) {
  throw Error("the past tokens of row " + std::to_string(row) + ", head " + std::to_string(head) +
              " are not in order; give the cache that a step of this node left");
}

}  // namespace

std::vector<int32_t> EvictVotes::Choose(int64_t row, int64_t head) const {
  const PackedRow& r = step_.Row(row);
  const SelectionSpec& spec = step_.spec;
  const int64_t count = r.candidates();
  std::vector<int32_t> chosen;
  std::vector<int32_t> others;
  std::vector<float> votes(Votes(row, head));
  int64_t before = 0;  // candidates before the recent ones
  int64_t previous = -1;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t token = step_.Candidate(row, head, c);
    if (token < previous) RefuseDamaged(row, head);
    previous = token;
    const int64_t slot = c < r.kept ? c : r.kept + r.fresh[c - r.kept];
    votes[c] = votes[slot];
    before += token < r.tokens - spec.recent ? 1 : 0;
    const bool stays = token < spec.sinks || token >= r.tokens - spec.recent;
    (stays ? chosen : others).push_back(static_cast<int32_t>(c));
  }
  votes.resize(before);
  const std::vector<float> pooled = Pooled(votes);
  const int64_t wanted = spec.budget - static_cast<int64_t>(chosen.size());
  if (wanted < 0) RefuseDamaged(row, head);
  std::nth_element(
      others.begin(), others.begin() + wanted, others.end(),
      [&](int32_t a, int32_t b) { return pooled[a] != pooled[b] ? pooled[a] > pooled[b] : a < b; });
  chosen.insert(chosen.end(), others.begin(), others.begin() + wanted);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// The last `recent` tokens that are valid: those of this step, before them from the cache.
EvictVotes::Voters EvictVotes::FindVoters(int64_t row, int64_t head) const {
  const PackedRow& r = step_.Row(row);
  const int64_t recent = step_.spec.recent;
  const int64_t d = step_.form.head_size;
  const int64_t group = step_.form.group();
  const uint8_t* const valid = step_.operands.valid + row * step_.operands.total + r.start;
  const int32_t* const numbers = step_.Tokens(step_.past[kKeptToken], row, head);
  const auto* const last = reinterpret_cast<const float*>(step_.past[kLastQuery].data) +
                           (row * step_.form.kv_heads + head) * recent * group * d;
  Voters voters;
  for (int64_t token = std::max<int64_t>(0, r.tokens - recent); token < r.tokens; ++token) {
    if (!valid[token]) continue;
    if (token < r.old_tokens) {
      const int64_t end = std::upper_bound(numbers, numbers + r.kept, token + 1) - numbers;
      AddVoter(last + token % recent * group * d, d, end, voters);
    } else {
      const int64_t i = r.start + token - step_.operands.past();
      AddVoter(tokens_.Query(row, head, i), PaddedRow(d), r.kept + i + 1, voters);
    }
  }
  return voters;
}

void EvictVotes::AddVoter(const float* queries, int64_t stride, int64_t end, Voters& voters) const {
  const int64_t padded = PaddedRow(step_.form.head_size);
  for (int64_t g = 0; g < step_.form.group(); ++g) {
    voters.queries.resize(voters.queries.size() + padded);
    std::memcpy(voters.queries.data() + voters.queries.size() - padded, queries + g * stride,
                step_.form.head_size * sizeof(float));
    voters.ends.push_back(end);
  }
}

std::vector<float> EvictVotes::Votes(int64_t row, int64_t head) const {
  const Voters voters = FindVoters(row, head);
  const AttentionOperands& packed = step_.packed();
  const int64_t first = step_.First(row);
  const int64_t slots = packed.total - first;
  const int64_t stride = (slots + kPanelLanes - 1) / kPanelLanes * kPanelLanes + kRowPadding;
  const auto all = static_cast<int64_t>(voters.ends.size());
  const int64_t step = std::min(all, std::max(kLeastRows, kMostScores / stride));
  float* const scores = ThreadFloats(kVotes, step * stride);
  std::vector<float> votes(slots);
  for (int64_t from = 0; from < all; from += step) {
    const int64_t m = std::min(step, all - from);
    const float* const queries = voters.queries.data() + from * PaddedRow(step_.form.head_size);
    Score(row, head, queries, m, slots, scores, stride);
    std::vector<QueryRow> rows(m);
    for (int64_t i = 0; i < m; ++i) {
      rows[i] = {-std::numeric_limits<float>::infinity(), 0, 0, voters.ends[from + i], nullptr};
    }
    const SlotBlock block{0, slots, packed.valid + row * packed.total + first, step_.form.scale,
                          step_.form.softcap};
    pieces_.absorb(rows.data(), m, block, scores, stride, nullptr, 0, 0);
    for (int64_t i = 0; i < m; ++i) {
      const float share = rows[i].sum > 0 ? 1 / rows[i].sum : 0;
      const float* const weights = scores + i * stride;
      for (int64_t t = 0; t < slots; ++t) votes[t] += share * weights[t];
    }
  }
  return votes;
}

void EvictVotes::Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t slots,
                       float* scores, int64_t stride) const {
  const int64_t d = step_.form.head_size;
  const int64_t first = step_.First(row);
  float* const panels = ThreadFloats(kPanels, kBlockTokens * d);
  for (int64_t begin = 0; begin < slots; begin += kBlockTokens) {
    const int64_t end = std::min(slots, begin + kBlockTokens);
    for (int64_t slot = begin; slot < end;) {
      const TokenSpan run = store_.Run(row, head, first + slot, first + end);
      pieces_.transpose(run.keys, run.count, d, slot - begin, panels);
      slot += run.count;
    }
    pieces_.panel_scores(queries, PaddedRow(d), m, panels, end - begin, d, scores + begin, stride);
  }
}

// The mean over `pool` neighbours, beyond the ends zero.
std::vector<float> EvictVotes::Pooled(const std::vector<float>& votes) const {
  const auto count = static_cast<int64_t>(votes.size());
  const int64_t half = step_.spec.pool / 2;
  std::vector<float> pooled(count);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t begin = std::max<int64_t>(0, c - half);
    const int64_t end = std::min(count, c + half + 1);
    pooled[c] = std::accumulate(votes.begin() + begin, votes.begin() + end, 0.0f);
  }
  return pooled;
}

}  // namespace effc
