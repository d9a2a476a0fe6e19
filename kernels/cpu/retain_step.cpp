#include "cpu/retain_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "cpu/read_log.h"

namespace effc {
namespace {

constexpr int64_t kTaskBytes = 1 << 17;

// Moves the chosen places of one row and key head to the beginning, and clears the others.
void MovePlaces(const CacheTensor& past, const CacheTensor& present, const RetainPlaces& places,
                int64_t row, int64_t head) {
  if (past.data == present.data && !places.evicts()) return;
  const int64_t bytes = present.dims[3] * ElementBytes(present.type);
  const auto* const from = static_cast<const char*>(Place(past, row, head, 0).data);
  auto* const to = static_cast<char*>(const_cast<void*>(Place(present, row, head, 0).data));
  const std::vector<int32_t>& chosen = places.chosen;
  const auto kept = static_cast<int64_t>(chosen.size());
  for (int64_t begin = 0, end = 0; begin < kept; begin = end) {
    do {
      ++end;
    } while (end < kept && chosen[end] == chosen[begin] + end - begin);
    const char* const run = from + chosen[begin] * bytes;
    if (run != to + begin * bytes) std::memmove(to + begin * bytes, run, (end - begin) * bytes);
  }
  std::memset(to + kept * bytes, 0, (present.dims[2] - kept) * bytes);
}

// Tokens of the places that stay, then the new ones.
void WriteTokens(const RetainStep& step, const CacheTensor& present, int64_t row) {
  const int32_t* const from = step.Tokens(step.past[kRetainToken], row);
  int32_t* to = step.Tokens(present, row);
  int32_t* const end = to + step.spec.budget;
  for (const int32_t place : step.Places(row).chosen) *to++ = from[place];
  for (const int32_t i : step.Row(row).fresh) *to++ = static_cast<int32_t>(step.Token(row, i) + 1);
  std::fill(to, end, 0);
}

// (row, head) pairs of which a task moves or writes so many bytes of a tensor's row.
int64_t Grain(const CacheTensor& keys, int64_t places) {
  return std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, 8 * places * keys.dims[3]));
}

}  // namespace

RetainStep::RetainStep(const AttentionForm& form, const SelectionSpec& spec,
                       const AttentionOperands& operands, const std::vector<CacheTensor>& past)
    : PackedStep(form, spec, operands, past) {
  for (int64_t row = 0; row < operands.batch; ++row) {
    places_.push_back(ReadPlaces(row));
    rows_[row].kept = static_cast<int64_t>(places_.back().chosen.size());
  }
  Pack();
  PackAngles();
}

void RetainStep::PackAngles() {
  const int64_t half = form.rotary_size / 2;
  cosines_.resize(operands.batch * operands.seq * half);
  sines_.resize(cosines_.size());
  float* cosine = cosines_.data();
  float* sine = sines_.data();
  for (int64_t row = 0; row < operands.batch; ++row) {
    const int64_t first = packed_.past();
    int64_t place = rows_[row].kept;
    for (int64_t i = 0; i < operands.seq; ++i, cosine += half, sine += half) {
      const int64_t at = std::min(place, spec.budget - 1);  // padding at the end may have none
      std::copy_n(Cosines(row, at), half, cosine);
      std::copy_n(Sines(row, at), half, sine);
      place += packed_.valid[row * packed_.total + first + i];
    }
  }
  packed_.cosine = cosines_.data();
  packed_.sine = sines_.data();
  packed_.angle_batch = operands.batch;
}

RetainPlaces RetainStep::ReadPlaces(int64_t row) const {
  RetainPlaces places;
  places.used = CountPlaces(row, Tokens(past[kRetainToken], row), spec.budget);
  CheckOrder(row, places.used);
  const auto count = static_cast<int64_t>(rows_[row].fresh.size());
  if (count >= spec.budget - spec.sinks) {
    throw Error("row " + std::to_string(row) + " has " + std::to_string(count) +
                " new tokens, but a step may have at most select_budget - select_sinks - 1 = " +
                std::to_string(spec.budget - spec.sinks - 1) + "; read the text in smaller parts");
  }
  if (places.used + count > spec.budget) {
    places.chosen = Choose(row, places.used, std::max(count, spec.block));
  } else {
    places.chosen.resize(places.used);
    std::iota(places.chosen.begin(), places.chosen.end(), 0);
  }
  return places;
}

void RetainStep::CheckOrder(int64_t row, int64_t used) const {
  if (used == 0) return;
  const int32_t* const numbers = Tokens(past[kRetainToken], row);
  bool ordered = numbers[0] >= 1 && numbers[used - 1] <= rows_[row].old_tokens;
  for (int64_t i = 1; i < used; ++i) ordered = ordered && numbers[i] > numbers[i - 1];
  if (ordered) return;
  throw Error("the past tokens of row " + std::to_string(row) +
              " are not in order; give the cache that a step of this node left");
}

std::vector<int32_t> RetainStep::Choose(int64_t row, int64_t used, int64_t room) const {
  const int32_t* const numbers = Tokens(past[kRetainToken], row);
  const float* const scores = operands.scores + row * operands.total + rows_[row].start;
  std::vector<int32_t> order(used);
  std::iota(order.begin(), order.end(), 0);
  for (const int32_t place : order) {
    if (!std::isnan(scores[numbers[place] - 1])) continue;
    throw Error("the score of row " + std::to_string(row) + ", slot " +
                std::to_string(rows_[row].start + numbers[place] - 1) + " is NaN; give numbers");
  }
  const int64_t scored = spec.budget - spec.sinks - spec.recent - room;
  const int64_t top = std::clamp<int64_t>(scored, 0, used);
  std::nth_element(order.begin(), order.begin() + top, order.end(), [&](int32_t a, int32_t b) {
    const float x = scores[numbers[a] - 1];
    const float y = scores[numbers[b] - 1];
    return x != y ? x > y : a > b;
  });
  std::vector<uint8_t> stays(used);
  for (int64_t i = 0; i < top; ++i) stays[order[i]] = 1;
  for (int64_t place = 0; place < used && numbers[place] <= spec.sinks; ++place) {
    stays[place] = 1;
  }
  int64_t missing = spec.budget - room - std::count(stays.begin(), stays.end(), 1);
  for (int64_t place = used - 1; place >= 0 && missing > 0; --place) {
    missing -= stays[place] ? 0 : 1;
    stays[place] = 1;
  }
  std::vector<int32_t> chosen;
  for (int64_t place = 0; place < used; ++place) {
    if (stays[place]) chosen.push_back(static_cast<int32_t>(place));
  }
  return chosen;
}

void RetainStep::LogReads() const {
  if (!LogsReads() || operands.seq != 1) return;
  for (int64_t row = 0; row < operands.batch; ++row) {
    if (rows_[row].tokens <= 0) continue;
    const int32_t* const numbers = Tokens(past[kRetainToken], row);
    std::vector<int64_t> tokens;
    for (const int32_t place : places_[row].chosen) tokens.push_back(numbers[place] - 1);
    for (const int32_t i : rows_[row].fresh) tokens.push_back(Token(row, i));
    for (int64_t head = 0; head < form.kv_heads; ++head) {
      LogRead(row, head, rows_[row].tokens, RunsOf(tokens));
    }
  }
}

TokenRows PlaceStore::Keys(int64_t row, int64_t, int64_t slot, const TokenSpan& run) const {
  if (slot >= step_.packed().past()) return run.keys;  // turned already
  const int64_t d = step_.form.head_size;
  const int64_t place = slot - step_.First(row);
  float* const turned = ThreadFloats(kTurnedKeys, kBlockTokens * d);
  if (step_.form.rotary == Rotary::kHalf) {
    pieces_.turn_halves(run.keys, run.count, d, step_.Cosines(row, place), step_.Sines(row, place),
                        step_.form.rotary_size / 2, turned);
    return {turned, Type::kFloat, d};
  }
  pieces_.widen(run.keys.data, run.keys.type, run.count * d, turned);
  for (int64_t t = 0; t < run.count; ++t) {
    RotateRow(step_.form, step_.Cosines(row, place + t), step_.Sines(row, place + t),
              turned + t * d);
  }
  return {turned, Type::kFloat, d};
}

void MakeRoom(const RetainStep& step, const std::vector<CacheTensor>& present,
              const ParallelFunction& parallel) {
  const int64_t heads = step.form.kv_heads;
  bool moves = step.past[kRetainKey].data != present[kRetainKey].data;
  for (int64_t row = 0; row < step.operands.batch; ++row)
    moves = moves || step.Places(row).evicts();
  if (!moves) return;
  const int64_t grain = Grain(present[kRetainKey], step.spec.budget);
  parallel(step.operands.batch * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const RetainPlaces& places = step.Places(at / heads);
      for (const size_t i : {kRetainKey, kRetainValue}) {
        MovePlaces(step.past[i], present[i], places, at / heads, at % heads);
      }
    }
  });
}

void AppendTokens(const Kernels& kernels, const RetainStep& step, const NewTokens& tokens,
                  const std::vector<CacheTensor>& present, const ParallelFunction& parallel) {
  const AttentionOperands& operands = step.operands;
  const int64_t heads = step.form.kv_heads;
  const int64_t d = step.form.head_size;
  const int64_t grain = Grain(present[kRetainKey], operands.seq);
  parallel(operands.batch * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / heads;
      const int64_t head = at % heads;
      int64_t place = step.Row(row).kept;
      for (const int64_t i : step.Row(row).fresh) {
        const float* const key = operands.key + ((row * operands.seq + i) * heads + head) * d;
        const auto* const value = static_cast<const float*>(tokens.Values(row, head, i).data);
        StoreToken(kernels, key, present[kRetainKey], row, head, place, i);
        StoreToken(kernels, value, present[kRetainValue], row, head, place++, i);
      }
    }
  });
  for (int64_t row = 0; row < operands.batch; ++row) {
    WriteTokens(step, present[kRetainToken], row);
  }
}

}  // namespace effc
