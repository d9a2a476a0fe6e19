#include "cpu/packed_step.h"

#include <algorithm>
#include <string>

namespace effc {
namespace {

PackedRow ReadRow(const AttentionOperands& operands, int64_t row) {
  const uint8_t* const valid = operands.valid + row * operands.total;
  PackedRow r{};
  r.start = std::find_if(valid, valid + operands.total, [](uint8_t v) { return v != 0; }) - valid;
  r.old_tokens = std::max<int64_t>(0, operands.past() - r.start);
  r.tokens = operands.total - r.start;
  for (int64_t i = 0; i < operands.seq; ++i) {
    if (valid[operands.past() + i]) r.fresh.push_back(static_cast<int32_t>(i));
  }
  return r;
}

}  // namespace

PackedStep::PackedStep(const AttentionForm& form, const SelectionSpec& spec,
                       const AttentionOperands& operands, const std::vector<CacheTensor>& past)
    : form(form), spec(spec), operands(operands), past(past), packed_(operands) {
  for (int64_t row = 0; row < operands.batch; ++row) rows_.push_back(ReadRow(operands, row));
}

int64_t PackedStep::CountPlaces(int64_t row, const int32_t* numbers, int64_t places) const {
  if (rows_[row].old_tokens == 0) return 0;
  const int64_t count = std::find(numbers, numbers + places, 0) - numbers;
  if (count > 0) return count;
  throw Error("`valid` counts " + std::to_string(rows_[row].old_tokens) + " past tokens of row " +
              std::to_string(row) + ", but its cache is empty");
}

void PackedStep::Pack() {
  int64_t most = 0;
  for (const PackedRow& r : rows_) most = std::max(most, r.kept);
  packed_.total = most + operands.seq;
  valid_.assign(operands.batch * packed_.total, 0);
  uint8_t* valid = valid_.data();
  for (const PackedRow& r : rows_) {
    std::fill(valid + most - r.kept, valid + most, uint8_t{1});
    for (const int32_t i : r.fresh) valid[most + i] = 1;
    valid += packed_.total;
  }
  packed_.valid = valid_.data();
}

int64_t PackedStore::BlockBegin(int64_t, int64_t slot) const { return slot; }

int64_t PackedStore::BlockEnd(int64_t, int64_t begin, int64_t end) const {
  return std::min(end, begin + kBlockTokens);
}

TokenSpan PackedStore::Run(int64_t row, int64_t head, int64_t slot, int64_t end) const {
  const int64_t old = step_.packed().past();
  if (slot >= old) {
    const int64_t i = slot - old;
    return {end - slot, tokens_.Keys(row, head, i), tokens_.Values(row, head, i), nullptr};
  }
  const int64_t place = slot - step_.First(row);
  return {std::min(end, old) - slot, Place(keys_, row, head, place),
          Place(values_, row, head, place), nullptr};
}

}  // namespace effc
