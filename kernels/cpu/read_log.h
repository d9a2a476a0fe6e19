// Which cached tokens steps of one token read: kept for those who ask, to draw and to count.
#pragma once

#include <string>
#include <vector>

#include "cpu/selection.h"

namespace effc {

// What one row and key head read in one step, slots counted from the row's first token.
struct LoggedRead {
  std::string node;
  int64_t row;
  int64_t head;
  int64_t tokens;  // of the row, the new one included
  std::vector<SlotRun> runs;
};

// While it is on, every step adds to it; turning it on empties it.
void LogReads(bool on);
std::vector<LoggedRead> LoggedReads();

// The node that the calling thread computes from now on, as long as this lives.
class LoggedNode {
 public:
  explicit LoggedNode(const std::string& name);
  ~LoggedNode();
  LoggedNode(const LoggedNode&) = delete;
  LoggedNode& operator=(const LoggedNode&) = delete;
};

// Adds what a row and key head read while the log is on; runs are counted from the row's first
// token.
bool LogsReads();
// Runs of ascending numbers.
std::vector<SlotRun> RunsOf(const std::vector<int64_t>& numbers);
void LogRead(int64_t row, int64_t head, int64_t tokens, std::vector<SlotRun> runs);

// Adds a step while the log is on. `reads` is what Attend() got.
void LogStep(const AttentionForm& form, const AttentionOperands& operands, const NewTokens& tokens,
             const Reads& reads);

}  // namespace effc
