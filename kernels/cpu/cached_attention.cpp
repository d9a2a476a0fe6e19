#include "cpu/cached_attention.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/far_sinks.h"
#include "cpu/read_log.h"
#include "cpu/selection.h"
#include "cpu/stride_pattern.h"
#include "cpu/token_store.h"
#include "cpu/token_votes.h"

namespace effc {
namespace {

constexpr int64_t kFewQueryRows = 64;  // rows up to which tokens are read without a transpose
constexpr int64_t kPartTokens = 512;   // tokens of one task with few query rows
constexpr int64_t kTileRows = 128;     // query rows of one task otherwise
constexpr int64_t kLeastTileRows = 32;
constexpr int64_t kTokensAhead = 12;   // of single tokens, how many are fetched ahead
constexpr int64_t kTokensAtOnce = 16;  // of single tokens, how many are weighed together
constexpr int64_t kTasks = 256;        // wanted at most

enum class Reading { kSlots, kChosen, kShares };

// Queries [begin, end) of a row and key head, over slots [from, to), or over those of the pieces
// [from, to), of which shares may be known.
struct Task {
  int64_t row;
  int64_t head;
  int64_t begin;
  int64_t end;
  int64_t from;
  int64_t to;
  int64_t part;  // of the parts that few query rows are split into, or -1
  Reading reading;
  bool first;  // of its queries
};

// The parts of one row and key head, in order.
struct Joint {
  int64_t row;
  int64_t head;
  int64_t begin;  // queries
  int64_t end;
  int64_t first_part;
  int64_t parts;
};

class Attention {
 public:
  Attention(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
            const NewTokens& tokens, const TokenStore& store, const Reads& reads, float* y,
            Normaliser* normalisers)
      : pieces_(*kernels.attention),
        form_(form),
        operands_(operands),
        tokens_(tokens),
        store_(store),
        reads_(reads),
        reader_(kernels, form, store),
        group_(form.group()),
        sum_stride_(PaddedRow(form.value_size)),
        y_(y),
        normalisers_(normalisers) {}

  void Run(const ParallelFunction& parallel) {
    for (int64_t row = 0; row < operands_.batch; ++row) Plan(row);
    rows_.resize(part_rows_);
    sums_ = ThreadFloats(kPartSums, part_rows_ * sum_stride_);
    const int64_t count = static_cast<int64_t>(tasks_.size());
    parallel(count, std::max<int64_t>(1, count / kTasks), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) RunTask(tasks_[i]);
    });
    for (const Joint& joint : joints_) Join(joint);
  }

 private:
  // All of it depends on this row's own tokens only, so that its results do, too.
  void Plan(int64_t row) {
    const int64_t start = tokens_.Start(row);
    const int64_t past = operands_.past();
    const int64_t seq = operands_.seq;
    const int64_t first =
        form_.causal ? std::min(seq, std::max<int64_t>(0, start - past)) : int64_t{0};
    ClearOutput(row, 0, start == operands_.total ? seq : first);
    if (start == operands_.total || first == seq) return;
    const int64_t own = std::min(seq, operands_.total - start);
    for (int64_t head = 0; head < form_.kv_heads; ++head) {
      if (reads_.chosen != nullptr && reads_.chosen->Selects(row)) {
        if (head > 0 && reads_.chosen->shared()) {
          PlanAgain(head);
        } else {
          PlanChosen(row, head);
        }
      } else if (own * group_ <= kFewQueryRows && !HasPattern(row)) {
        PlanParts(row, head, first);
      } else {
        PlanTiles(row, head, first, own);
      }
    }
  }

  bool HasPattern(int64_t row) const {
    return reads_.pattern != nullptr && reads_.pattern->Selects(row);
  }

  void PlanParts(int64_t row, int64_t head, int64_t first) {
    const int64_t seq = operands_.seq;
    const int64_t start = tokens_.Start(row);
    const int64_t end = Visible(form_, operands_, start, seq - 1).end;
    int64_t from = store_.BlockBegin(row, Visible(form_, operands_, start, first).begin);
    Joint joint{row, head, first, seq, part_rows_, 0};
    while (from < end) {
      int64_t to = from;
      while (to < end && to - from < kPartTokens) to = store_.BlockEnd(row, to, end);
      tasks_.push_back(
          {row, head, first, seq, from, to, part_rows_, Reading::kSlots, joint.parts == 0});
      part_rows_ += (seq - first) * group_;
      ++joint.parts;
      from = to;
    }
    joints_.push_back(joint);
  }

  void PlanTiles(int64_t row, int64_t head, int64_t first, int64_t own) {
    const int64_t even = own * group_ * form_.kv_heads / 8;
    const int64_t rows = std::clamp(even, kLeastTileRows, kTileRows);
    const int64_t step = std::max<int64_t>(1, rows / group_);
    const int64_t start = tokens_.Start(row);
    for (int64_t end = operands_.seq; end > first; end -= step) {  // longest first
      const int64_t begin = std::max(first, end - step);
      const int64_t from = Visible(form_, operands_, start, begin).begin;
      const int64_t to = Visible(form_, operands_, start, end - 1).end;
      tasks_.push_back(
          {row, head, begin, end, store_.BlockBegin(row, from), to, -1, Reading::kSlots, true});
    }
  }

  void PlanChosen(int64_t row, int64_t head) {
    Joint joint{row, head, 0, operands_.seq, part_rows_, 0};
    std::vector<SlotRun> rest;  // of which no shares are known
    auto from = static_cast<int64_t>(slots_.size());
    for (const SlotRun& run : reads_.chosen->Runs(row, head)) {
      if (!Known(row, run)) {
        rest.push_back(run);
        continue;
      }
      for (int64_t slot = run.begin; slot < run.end; ++slot) {
        slots_.push_back({slot, slot + 1});
        if (static_cast<int64_t>(slots_.size()) - from == kPartTokens) Close(joint, from, true);
      }
    }
    Close(joint, from, true);
    int64_t tokens = 0;
    for (const SlotRun& run : rest) {
      for (int64_t begin = run.begin; begin < run.end; begin = slots_.back().end) {
        slots_.push_back({begin, store_.BlockEnd(row, begin, run.end)});
        tokens += slots_.back().end - begin;
        if (tokens < kPartTokens) continue;
        Close(joint, from, false);
        tokens = 0;
      }
    }
    Close(joint, from, false);
    joints_.push_back(joint);
  }

  // The tasks of the head before, for this one.
  void PlanAgain(int64_t head) {
    Joint joint = joints_.back();
    const size_t first = tasks_.size() - joint.parts;
    for (int64_t part = 0; part < joint.parts; ++part) {
      Task task = tasks_[first + part];
      task.head = head;
      task.part += part_rows_ - joint.first_part;
      tasks_.push_back(task);
    }
    joint.head = head;
    part_rows_ += part_rows_ - joint.first_part;
    joint.first_part = joints_.back().first_part + (joint.end - joint.begin) * group_ * joint.parts;
    joints_.push_back(joint);
  }

  bool Known(int64_t row, SlotRun run) const {
    return reads_.shares != nullptr && reads_.shares[row].begin <= run.begin &&
           run.end <= reads_.shares[row].end;
  }

  // A task for the pieces from `from` on, if there are any.
  void Close(Joint& joint, int64_t& from, bool known) {
    const auto to = static_cast<int64_t>(slots_.size());
    if (to == from) return;
    tasks_.push_back({joint.row, joint.head, joint.begin, joint.end, from, to, part_rows_,
                      known ? Reading::kShares : Reading::kChosen, false});
    part_rows_ += (joint.end - joint.begin) * group_;
    ++joint.parts;
    from = to;
  }

  void ClearOutput(int64_t row, int64_t begin, int64_t end) const {
    const int64_t width = form_.heads * form_.value_size;
    std::fill(y_ + (row * operands_.seq + begin) * width, y_ + (row * operands_.seq + end) * width,
              0.0f);
  }

  void RunTask(const Task& task) {
    const int64_t m = (task.end - task.begin) * group_;
    if (task.part >= 0) {
      float* const sums = sums_ + task.part * sum_stride_;
      OpenRows(task, rows_.data() + task.part, sums);
      ReadSinks(task, m, rows_.data() + task.part, sums);
      if (task.reading == Reading::kShares) {
        return ReadShares(task, m, rows_.data() + task.part, sums);
      }
      if (task.reading == Reading::kChosen)
        return ReadChosen(task, m, rows_.data() + task.part, sums);
      return ReadRows(task, m, rows_.data() + task.part, sums);
    }
    std::vector<QueryRow> rows(m);
    float* const sums = ThreadFloats(kSums, m * sum_stride_);
    OpenRows(task, rows.data(), sums);
    ReadSinks(task, m, rows.data(), sums);
    ReadTiles(task, m, rows.data(), sums);
    for (int64_t i = 0; i < m; ++i) {
      Finish(task.row, task.head, task.begin + i / group_, i % group_, &rows[i], 0,
             sums + i * sum_stride_, 0, 1);
    }
  }

  void OpenRows(const Task& task, QueryRow* rows, float* sums) const {
    const int64_t start = tokens_.Start(task.row);
    const int64_t m = (task.end - task.begin) * group_;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t query = task.begin + i / group_;
      const VisibleSlots seen = Visible(form_, operands_, start, query);
      rows[i] = {-std::numeric_limits<float>::infinity(), 0, seen.begin, seen.end,
                 BiasRow(operands_, task.row, task.head * group_ + i % group_, query)};
    }
    std::fill(sums, sums + m * sum_stride_, 0.0f);
  }

  SlotBlock Slots(int64_t row, int64_t begin, int64_t end) const {
    const uint8_t* const valid = operands_.valid + row * operands_.total + begin;
    const bool all = std::memchr(valid, 0, end - begin) == nullptr;
    return {begin, end - begin, all ? nullptr : valid, form_.scale, form_.softcap};
  }

  // Few query rows: tokens are read where they lie.
  void ReadRows(const Task& task, int64_t m, QueryRow* rows, float* sums) const {
    const float* const queries = tokens_.Query(task.row, task.head, task.begin);
    float* const scores = ThreadFloats(kScores, m * kScoreStride);
    BlockPlace block{task.row, task.head, task.from, 0};
    for (; block.begin < task.to; block.begin = block.end) {
      block.end = store_.BlockEnd(task.row, block.begin, task.to);
      const SlotBlock slots = Slots(task.row, block.begin, block.end);
      const bool ordered = NeedsOrder(slots, rows, m);
      reader_.Scores(block, queries, m, ordered, scores);
      pieces_.absorb(rows, m, slots, scores, kScoreStride, sums, sum_stride_, form_.value_size);
      const bool last = block.end == task.to;
      const BlockPlace next{task.row, task.head, last ? block.begin : block.end,
                            last ? block.end : store_.BlockEnd(task.row, block.end, task.to)};
      reader_.Values(block, scores, m, ordered, sums, next);
    }
  }

  // The sinks that lie before the windows of the queries.
  void ReadSinks(const Task& task, int64_t m, QueryRow* rows, float* sums) const {
    const FarSinks* const sinks = reads_.sinks;
    if (sinks == nullptr || !task.first || sinks->Count(task.row, task.end - 1) == 0) return;
    std::vector<QueryRow> far(rows, rows + m);
    for (int64_t i = 0; i < m; ++i) {
      far[i].begin = 0;
      far[i].end = sinks->Count(task.row, task.begin + i / group_);
    }
    const int64_t count = far[m - 1].end;
    const int64_t d = form_.head_size;
    float* const scores = ThreadFloats(kScores, m * kScoreStride);
    pieces_.scores(sinks->Queries(task.row, task.head, task.begin, task.end), PaddedRow(d), m,
                   sinks->Keys(task.row, task.head), count, d, scores, kScoreStride, 0);
    SlotBlock block = Slots(task.row, tokens_.Start(task.row), tokens_.Start(task.row) + count);
    block.begin = 0;
    pieces_.absorb(far.data(), m, block, scores, kScoreStride, sums, sum_stride_, form_.value_size);
    pieces_.values(scores, kScoreStride, m, sinks->Values(task.row, task.head), count,
                   form_.value_size, sums, sum_stride_, 0);
    for (int64_t i = 0; i < m; ++i) {
      rows[i].max = far[i].max;
      rows[i].sum = far[i].sum;
    }
  }

  // Few query rows that see all of the chosen slots; short pieces share a block of scores.
  void ReadChosen(const Task& task, int64_t m, QueryRow* rows, float* sums) const {
    const float* const queries = tokens_.Query(task.row, task.head, task.begin);
    float* const scores = ThreadFloats(kScores, m * kScoreStride);
    for (int64_t i = 0; i < m; ++i) {
      rows[i].begin = 0;
      rows[i].end = kLongestBlock;
    }
    for (int64_t from = task.from, to = 0; from < task.to; from = to) {
      int64_t count = 0;
      std::array<uint8_t, kLongestBlock> valid;
      for (to = from; to < task.to && (to == from || count + Length(to) <= kBlockTokens); ++to) {
        std::memcpy(valid.data() + count,
                    operands_.valid + task.row * operands_.total + slots_[to].begin, Length(to));
        count += Length(to);
      }
      const bool all = std::memchr(valid.data(), 0, count) == nullptr;
      for (int64_t i = from, at = 0; i < to; at += Length(i++)) {
        reader_.Scores(Piece(task, i), queries, m, !all, scores + at);
      }
      const SlotBlock block{0, count, all ? nullptr : valid.data(), form_.scale, form_.softcap};
      pieces_.absorb(rows, m, block, scores, kScoreStride, sums, sum_stride_, form_.value_size);
      for (int64_t i = from, at = 0; i < to; at += Length(i++)) {
        reader_.Values(Piece(task, i), scores + at, m, !all, sums,
                       Piece(task, std::min(i + to - from, task.to - 1)));
      }
    }
  }

  // Of slots whose shares are known, values only; a few at once, so that sums stay in registers.
  void ReadShares(const Task& task, int64_t m, QueryRow* rows, float* sums) const {
    const TokenShares& known = reads_.shares[task.row];
    const int64_t e = form_.value_size;
    float* const shares = ThreadFloats(kScores, m * kScoreStride);
    float* const values = ThreadFloats(kValueRows, kTokensAtOnce * e);
    for (int64_t i = 0; i < m; ++i) rows[i].max = known.bases[task.head * group_ + i];
    size_t part = 0;
    for (int64_t from = task.from; from < task.to; from += kTokensAtOnce) {
      const int64_t count = std::min(kTokensAtOnce, task.to - from);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t slot = slots_[from + t].begin;
        while (known.parts[part].end <= slot) ++part;
        Prefetch(task, from + t + kTokensAhead);
        TakeShares(task, known, part, slot, m, shares + t);
        reader_.Value(task.row, task.head, slot, values + t * e);
      }
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t t = 0; t < count; ++t) rows[i].sum += shares[i * kScoreStride + t];
      }
      pieces_.values(shares, kScoreStride, m, {values, Type::kFloat, e}, count, e, sums,
                     sum_stride_, 0);
    }
  }

  void Prefetch(const Task& task, int64_t at) const {
    if (at < task.to) reader_.PrefetchValue(task.row, task.head, slots_[at].begin);
  }

  void TakeShares(const Task& task, const TokenShares& known, size_t part, int64_t slot, int64_t m,
                  float* shares) const {
    const int64_t first = task.head * group_;
    const float* const factors = known.factors.data() + part * form_.heads + first;
    for (int64_t i = 0; i < m; ++i) {
      shares[i * kScoreStride] = *known.At(first + i, known.parts[part], slot) * factors[i];
    }
  }

  BlockPlace Piece(const Task& task, int64_t i) const {
    return {task.row, task.head, slots_[i].begin, slots_[i].end};
  }

  int64_t Length(int64_t slots) const { return slots_[slots].end - slots_[slots].begin; }

  // Whether some token of the block is treated differently from the others.
  static bool NeedsOrder(const SlotBlock& block, const QueryRow* rows, int64_t m) {
    const int64_t end = block.begin + block.count;
    return block.valid != nullptr || std::any_of(rows, rows + m, [&](const QueryRow& row) {
             return row.bias != nullptr || row.begin > block.begin || row.end < end;
           });
  }

  // Many query rows: each block is transposed and widened once for all of them.
  void ReadTiles(const Task& task, int64_t m, QueryRow* rows, float* sums) const {
    const int64_t d = form_.head_size;
    const int64_t e = form_.value_size;
    const float* const queries = tokens_.Query(task.row, task.head, task.begin);
    float* const scores = ThreadFloats(kScores, m * kScoreStride);
    float* const panels = ThreadFloats(kPanels, kLongestBlock * d);
    float* const values = ThreadFloats(kValueRows, kLongestBlock * e);
    int64_t run_end = HasPattern(task.row) ? task.from : task.to;
    BlockPlace block{task.row, task.head, task.from, 0};
    for (; block.begin < task.to; block.begin = block.end) {
      if (block.begin == run_end) run_end = EnterRun(task, run_end, m, rows);
      block.end = store_.BlockEnd(task.row, block.begin, run_end);
      int64_t first = 0;  // rows that see some of the block; the rest would not change
      int64_t last = m;
      while (first < last && rows[first].end <= block.begin) ++first;
      while (first < last && rows[last - 1].begin >= block.end) --last;
      const int64_t count = last - first;
      if (count == 0) continue;
      reader_.Widen(block, panels, values);
      pieces_.panel_scores(queries + first * PaddedRow(d), PaddedRow(d), count, panels,
                           block.end - block.begin, d, scores, kScoreStride);
      pieces_.absorb(rows + first, count, Slots(task.row, block.begin, block.end), scores,
                     kScoreStride, sums + first * sum_stride_, sum_stride_, e);
      pieces_.values(scores, kScoreStride, count, {values, Type::kFloat, e},
                     block.end - block.begin, e, sums + first * sum_stride_, sum_stride_, 0);
    }
  }

  // Lets rows see what the pattern does from `slot` on, and returns where that ends.
  int64_t EnterRun(const Task& task, int64_t slot, int64_t m, QueryRow* rows) const {
    const PatternRun run = reads_.pattern->Run(task.row, task.head, slot, task.to);
    const int64_t start = tokens_.Start(task.row);
    for (int64_t i = 0; i < m; ++i) {
      rows[i].begin = run.fixed ? start : reads_.pattern->Near(task.row, task.begin + i / group_);
    }
    return run.end;
  }

  void Join(const Joint& joint) {
    const int64_t m = (joint.end - joint.begin) * group_;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t at = joint.first_part + i;
      Finish(joint.row, joint.head, joint.begin + i / group_, i % group_, rows_.data() + at, m,
             sums_ + at * sum_stride_, m * sum_stride_, joint.parts);
    }
  }

  void Finish(int64_t row, int64_t head, int64_t query, int64_t g, QueryRow* rows,
              int64_t row_stride, const float* sums, int64_t sum_stride, int64_t count) const {
    const int64_t h = head * group_ + g;
    float* const out = y_ + ((row * operands_.seq + query) * form_.heads + h) * form_.value_size;
    const bool finite =
        pieces_.finish(rows, row_stride, sums, sum_stride, count, form_.value_size, out);
    if (normalisers_ != nullptr) {
      const int64_t at = (row * form_.kv_heads + head) * operands_.seq + query;
      normalisers_[at * group_ + g] = {rows[0].max, rows[0].sum};
    }
    if (finite) return;
    throw Error(
        "the attention of row " + std::to_string(row) + ", head " + std::to_string(h) + ", token " +
        std::to_string(query) +
        " is not finite: its query, its bias or its part of the cache holds NaN or infinity");
  }

  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const AttentionOperands& operands_;
  const NewTokens& tokens_;
  const TokenStore& store_;
  const Reads& reads_;
  const BlockReader reader_;
  const int64_t group_;
  const int64_t sum_stride_;
  float* const y_;
  Normaliser* const normalisers_;
  std::vector<Task> tasks_;
  std::vector<Joint> joints_;
  std::vector<SlotRun> slots_;  // pieces of chosen tasks, each a part of a block
  std::vector<QueryRow> rows_;  // of all parts
  float* sums_ = nullptr;
  int64_t part_rows_ = 0;
};

}  // namespace

VisibleSlots Visible(const AttentionForm& form, const AttentionOperands& operands, int64_t start,
                     int64_t i) {
  const int64_t slot = operands.past() + i;
  const int64_t begin = form.window > 0 ? std::max(start, slot - form.window + 1) : start;
  return {begin, form.causal ? slot + 1 : operands.total};
}

void Attend(const Kernels& kernels, const AttentionForm& form, const AttentionOperands& operands,
            const NewTokens& tokens, const TokenStore& store, const Reads& reads,
            const ParallelFunction& parallel, float* y, Normaliser* normalisers) {
  if (!reads.packed) LogStep(form, operands, tokens, reads);
  Attention(kernels, form, operands, tokens, store, reads, y, normalisers).Run(parallel);
}

}  // namespace effc
