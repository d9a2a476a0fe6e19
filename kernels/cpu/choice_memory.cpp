#include "cpu/choice_memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace effc {
namespace {

// The cosine of the angle between two vectors; 0 where one has no direction.
double Cosine(const float* a, const float* b, int64_t n) {
  double dot = 0;
  double aa = 0;
  double bb = 0;
  for (int64_t i = 0; i < n; ++i) {
    dot += static_cast<double>(a[i]) * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += static_cast<double>(b[i]) * b[i];
  }
  return aa > 0 && bb > 0 ? dot / std::sqrt(aa * bb) : 0;
}

}  // namespace

std::vector<CacheTensorForm> ChoiceMemory::Tensors(const AttentionForm& form, int64_t batch) {
  return {{"past chosen", {Type::kUint8}, {batch, -1}},
          {"past voter", {Type::kFloat}, {batch, form.heads * form.head_size}},
          {"past age", {Type::kInt32}, {batch, 2}}};
}

bool ChoiceMemory::Holds(int64_t row) const {
  const int32_t* const age = Age(past_, row);
  const int64_t tokens = operands_.past() - tokens_.Start(row);
  if (operands_.seq != 1 || age[0] <= 0 || age[0] > tokens || age[1] + 1 >= spec_.refresh) {
    return false;
  }
  const int64_t size = form_.heads * form_.head_size;
  return Cosine(Query(row), Voter(past_, row), size) >= spec_.similarity;
}

std::vector<SlotRun> ChoiceMemory::Runs(int64_t row) const {
  const int64_t start = tokens_.Start(row);
  const int64_t begin = start + spec_.sinks;
  const int64_t end = begin + spec_.Blocks(Age(past_, row)[0]);
  const uint8_t* const flags = Flags(past_, row);
  std::vector<SlotRun> runs;
  if (start < begin) runs.push_back({start, begin});
  for (int64_t slot = begin; slot < end; ++slot) {
    if (!flags[slot]) continue;
    if (slot > begin && flags[slot - 1]) {
      ++runs.back().end;
    } else {
      runs.push_back({slot, slot + 1});
    }
  }
  runs.push_back({end, operands_.total});
  return runs;
}

void ChoiceMemory::Write(const std::vector<uint8_t>& held, const ChosenSlots& chosen) const {
  for (int64_t row = 0; row < operands_.batch; ++row) {
    int32_t* const age = Age(present_, row);
    if (held[row]) {
      const int32_t* const before = Age(past_, row);
      age[0] = before[0];
      age[1] = before[1] + 1;
      if (past_[kFlags].data == present_[kFlags].data) continue;
      std::memcpy(Voter(present_, row), Voter(past_, row), present_[kVoter].dims[1] * 4);
      std::memset(Flags(present_, row), 0, present_[kFlags].dims[1]);
      std::memcpy(Flags(present_, row), Flags(past_, row), operands_.past());
    } else if (operands_.seq == 1 && chosen.Selects(row)) {
      Remember(row, chosen);
    } else {
      age[0] = age[1] = 0;
      if (past_[kFlags].data == present_[kFlags].data) continue;
      std::memset(Voter(present_, row), 0, present_[kVoter].dims[1] * 4);
      std::memset(Flags(present_, row), 0, present_[kFlags].dims[1]);
    }
  }
}

void ChoiceMemory::Remember(int64_t row, const ChosenSlots& chosen) const {
  int32_t* const age = Age(present_, row);
  age[0] = static_cast<int32_t>(operands_.past() - tokens_.Start(row));
  age[1] = 0;
  std::memcpy(Voter(present_, row), Query(row), present_[kVoter].dims[1] * 4);
  uint8_t* const flags = Flags(present_, row);
  std::memset(flags, 0, present_[kFlags].dims[1]);
  for (const SlotRun& run : chosen.Runs(row, 0)) {
    std::fill(flags + run.begin, flags + run.end, uint8_t{1});
  }
}

}  // namespace effc
