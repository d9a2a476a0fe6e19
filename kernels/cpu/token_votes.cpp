#include "cpu/token_votes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/largest.h"

namespace effc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPartTokens = 2048;  // tokens that a task scores, or counts votes for

// A row that selects.
struct VotingRow {
  int64_t row;
  int64_t wanted;
  std::vector<Normaliser> partial;  // [part][H]
  float* votes;                     // of the slots it chooses from
};

class Voting {
 public:
  Voting(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
         const NewTokens& tokens, const TokenStore& store, const SelectionSpec& spec)
      : pieces_(*kernels.attention),
        form_(form),
        operands_(operands),
        tokens_(tokens),
        store_(store),
        spec_(spec),
        reader_(kernels, form, store) {}

  VotedSlots Run(const ParallelFunction& parallel, const std::vector<uint8_t>& decided) {
    voted_.shares.resize(operands_.batch);
    voted_.chosen = ChosenSlots(operands_.batch, 1);
    for (int64_t row = 0; row < operands_.batch; ++row) {
      if (decided.empty() || !decided[row]) AddRow(row);
    }
    if (rows_.empty()) return std::move(voted_);
    TakeMemory();
    ForEachPart(parallel, form_.kv_heads,
                [&](VotingRow& row, int64_t part, int64_t head) { Score(row, part, head); });
    for (const VotingRow& row : rows_) JoinParts(row);
    ForEachPart(parallel, 1, [&](VotingRow& row, int64_t part, int64_t) { Vote(row, part); });
    parallel(static_cast<int64_t>(rows_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Choose(rows_[i]);
    });
    return std::move(voted_);
  }

 private:
  void AddRow(int64_t row) {
    const int64_t start = tokens_.Start(row);
    const int64_t tokens = operands_.past() - start;
    if (tokens < spec_.dense_below || tokens <= 0) return;
    const int64_t middle = spec_.Blocks(tokens);
    const int64_t wanted = spec_.Wanted(middle);
    if (wanted >= middle) return;
    TokenShares& shares = voted_.shares[row];
    shares.begin = start + spec_.sinks;
    shares.end = shares.begin + middle;
    shares.bases.resize(form_.heads);
    VotingRow voting{row, wanted, {}, nullptr};
    for (int64_t from = shares.begin, to = from; from < shares.end; from = to) {
      while (to < shares.end && to - from < kPartTokens) to = store_.BlockEnd(row, to, shares.end);
      shares.parts.push_back({from, to, shares.stride});
      shares.stride += PaddedRow(to - from) + kRowPadding;  // scores are written in whole vectors
    }
    voting.partial.resize(shares.parts.size() * form_.heads);
    shares.factors.resize(voting.partial.size());
    rows_.push_back(std::move(voting));
  }

  // One piece for all rows.
  void TakeMemory() {
    int64_t floats = 0;
    for (const VotingRow& row : rows_) floats += (form_.heads + 1) * Shares(row).stride;
    float* at = ThreadFloats(kTokenShares, floats);
    for (VotingRow& row : rows_) {
      TokenShares& shares = voted_.shares[row.row];
      shares.within = at;
      row.votes = at + form_.heads * shares.stride;
      at += (form_.heads + 1) * shares.stride;
    }
  }

  const TokenShares& Shares(const VotingRow& row) const { return voted_.shares[row.row]; }

  // fn(row, part, i) for i of [0, each).
  void ForEachPart(const ParallelFunction& parallel, int64_t each,
                   const std::function<void(VotingRow&, int64_t, int64_t)>& fn) {
    for (VotingRow& row : rows_) {
      const auto parts = static_cast<int64_t>(Shares(row).parts.size());
      parallel(parts * each, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) fn(row, i % parts, i / parts);
      });
    }
  }

  // Shares of a part among itself.
  void Score(VotingRow& row, int64_t part, int64_t head) {
    const int64_t group = form_.group();
    const TokenShares& shares = Shares(row);
    const TokenShares::Part& slots = shares.parts[part];
    const int64_t count = slots.end - slots.begin;
    const float* const queries = tokens_.Query(row.row, head, operands_.seq - 1);
    float* const scores = shares.At(head * group, slots, slots.begin);
    for (int64_t from = slots.begin, to = from; from < slots.end; from = to) {
      to = store_.BlockEnd(row.row, from, slots.end);
      reader_.KeyScores({row.row, head, from, to}, queries, group, scores + from - slots.begin,
                        shares.stride);
    }
    const uint8_t* const valid = operands_.valid + row.row * operands_.total + slots.begin;
    const bool all = std::memchr(valid, 0, count) == nullptr;
    std::vector<QueryRow> state(group, QueryRow{-kInfinity, 0, slots.begin, slots.end, nullptr});
    const SlotBlock block{slots.begin, count, all ? nullptr : valid, form_.scale, form_.softcap};
    pieces_.absorb(state.data(), group, block, scores, shares.stride, nullptr, 0, 0);
    for (int64_t g = 0; g < group; ++g) {
      row.partial[part * form_.heads + head * group + g] = {state[g].max, state[g].sum};
    }
  }

  void JoinParts(const VotingRow& row) {
    const auto parts = static_cast<int64_t>(Shares(row).parts.size());
    for (int64_t head = 0; head < form_.heads; ++head) {
      float max = -kInfinity;
      for (int64_t p = 0; p < parts; ++p) {
        max = std::max(max, row.partial[p * form_.heads + head].max);
      }
      float sum = 0;
      for (int64_t p = 0; p < parts; ++p) {
        const Normaliser& one = row.partial[p * form_.heads + head];
        if (one.sum != 0) sum += one.sum * std::exp(one.max - max);
      }
      TokenShares& shares = voted_.shares[row.row];
      shares.bases[head] = max + std::log(sum);
      for (int64_t p = 0; p < parts; ++p) {
        const Normaliser& one = row.partial[p * form_.heads + head];
        shares.factors[p * form_.heads + head] =
            one.sum == 0 ? 0 : std::exp(one.max - shares.bases[head]);
      }
    }
  }

  // What every slot of a part gets from all heads.
  void Vote(VotingRow& row, int64_t part) {
    const TokenShares& all = Shares(row);
    const TokenShares::Part& slots = all.parts[part];
    const int64_t count = slots.end - slots.begin;
    float* const votes = ThreadFloats(kPartScores, PaddedRow(count));
    std::fill(votes, votes + count, 0.0f);
    const TokenRows shares{all.At(0, slots, slots.begin), Type::kFloat, all.stride};
    pieces_.values(all.factors.data() + part * form_.heads, form_.heads, 1, shares, form_.heads,
                   count, votes, PaddedRow(count), 0);
    std::memcpy(row.votes + slots.begin - all.begin, votes, count * sizeof(float));
  }

  void Choose(VotingRow& row) {
    const TokenShares& all = Shares(row);
    const int64_t count = all.end - all.begin;
    // A vote that is no number says nothing: its token is read.
    std::replace_if(
        row.votes, row.votes + count, [](float vote) { return std::isnan(vote); }, kInfinity);
    std::vector<SlotRun>& runs = voted_.chosen.Runs(row.row, 0);
    const int64_t start = tokens_.Start(row.row);
    if (start < all.begin) runs.push_back({start, all.begin});
    int64_t next = -1;
    for (const int32_t t : PlacesOfLargest(row.votes, count, row.wanted)) {
      if (t == next) {
        ++runs.back().end;
      } else {
        runs.push_back({all.begin + t, all.begin + t + 1});
      }
      next = t + 1;
    }
    runs.push_back({all.end, operands_.total});
  }

  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const TokenStore& store_;
  const SelectionSpec& spec_;
  const BlockReader reader_;
  std::vector<VotingRow> rows_;
  VotedSlots voted_;
};

}  // namespace

VotedSlots VoteForTokens(const Kernels& kernels, const AttentionForm& form,
                         const AttentionOperands& operands, const NewTokens& tokens,
                         const TokenStore& store, const SelectionSpec& spec,
                         const ParallelFunction& parallel, const std::vector<uint8_t>& decided) {
  if (operands.bias != nullptr) throw Error("a selection takes no bias");
  if (operands.seq != 1) return {};
  return Voting(kernels, form, operands, tokens, store, spec).Run(parallel, decided);
}

}  // namespace effc
