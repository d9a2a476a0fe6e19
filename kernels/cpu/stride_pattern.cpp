#include "cpu/stride_pattern.h"

#include <algorithm>

namespace effc {

bool StridePattern::Selects(int64_t row) const {
  return spec_.stride > 1 && operands_.seq > 0 &&
         Near(row, operands_.seq - 1) > tokens_.Start(row) + spec_.sinks;
}

int64_t StridePattern::Near(int64_t row, int64_t i) const {
  const int64_t start = tokens_.Start(row);
  const int64_t token = std::max<int64_t>(0, operands_.past() + i - start);
  const int64_t blocks = token / spec_.block - spec_.recent / spec_.block + 1;
  return start + std::max<int64_t>(0, blocks) * spec_.block;
}

bool StridePattern::Fixed(int64_t head, int64_t token) const {
  const int64_t from = token / spec_.block - head % spec_.stride;
  return token < spec_.sinks || from % spec_.stride == 0;
}

PatternRun StridePattern::Run(int64_t row, int64_t head, int64_t slot, int64_t end) const {
  const int64_t start = tokens_.Start(row);
  const bool fixed = Fixed(head, slot - start);
  int64_t token = slot - start;
  do {
    const int64_t border = (token / spec_.block + 1) * spec_.block;
    token = token < spec_.sinks ? std::min(border, spec_.sinks) : border;
  } while (start + token < end && Fixed(head, token) == fixed);
  return {std::min(end, start + token), fixed};
}

ChosenSlots StridePattern::Chosen() const {
  ChosenSlots chosen(operands_.batch, form_.kv_heads);
  for (int64_t row = 0; row < operands_.batch; ++row) {
    if (!Selects(row)) continue;
    const int64_t near = Near(row, 0);
    for (int64_t head = 0; head < form_.kv_heads; ++head) {
      std::vector<SlotRun>& runs = chosen.Runs(row, head);
      for (int64_t slot = tokens_.Start(row); slot < near;) {
        const PatternRun run = Run(row, head, slot, near);
        if (run.fixed) runs.push_back({slot, run.end});
        slot = run.end;
      }
      if (!runs.empty() && runs.back().end == near) {
        runs.back().end = operands_.total;
      } else {
        runs.push_back({near, operands_.total});
      }
    }
  }
  return chosen;
}

}  // namespace effc
