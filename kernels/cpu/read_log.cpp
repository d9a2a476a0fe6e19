#include "cpu/read_log.h"

#include <atomic>
#include <mutex>

#include "cpu/far_sinks.h"

namespace effc {
namespace {

std::atomic<bool> logging{false};
std::mutex mutex;
std::vector<LoggedRead> log;
thread_local const std::string* node = nullptr;

std::vector<SlotRun> RunsOf(const AttentionForm& form, const AttentionOperands& operands,
                            const Reads& reads, int64_t row, int64_t head, int64_t start) {
  if (reads.chosen != nullptr && reads.chosen->Selects(row)) return reads.chosen->Runs(row, head);
  const VisibleSlots seen = Visible(form, operands, start, 0);
  std::vector<SlotRun> runs;
  const int64_t sinks = reads.sinks == nullptr ? 0 : reads.sinks->Count(row, 0);
  if (sinks > 0) runs.push_back({start, start + sinks});
  runs.push_back({seen.begin, seen.end});
  return runs;
}

}  // namespace

void LogReads(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (on) log.clear();
  logging = on;
}

std::vector<LoggedRead> LoggedReads() {
  const std::lock_guard<std::mutex> lock(mutex);
  return log;
}

LoggedNode::LoggedNode(const std::string& name) { node = &name; }
LoggedNode::~LoggedNode() { node = nullptr; }

bool LogsReads() { return logging; }

std::vector<SlotRun> RunsOf(const std::vector<int64_t>& numbers) {
  std::vector<SlotRun> runs;
  for (const int64_t number : numbers) {
    if (!runs.empty() && runs.back().end == number) {
      ++runs.back().end;
    } else {
      runs.push_back({number, number + 1});
    }
  }
  return runs;
}

void LogRead(int64_t row, int64_t head, int64_t tokens, std::vector<SlotRun> runs) {
  const std::lock_guard<std::mutex> lock(mutex);
  log.push_back({node == nullptr ? "" : *node, row, head, tokens, std::move(runs)});
}

void LogStep(const AttentionForm& form, const AttentionOperands& operands, const NewTokens& tokens,
             const Reads& reads) {
  if (!logging || operands.seq != 1) return;
  for (int64_t row = 0; row < operands.batch; ++row) {
    const int64_t start = tokens.Start(row);
    if (start >= operands.total) continue;
    for (int64_t head = 0; head < form.kv_heads; ++head) {
      std::vector<SlotRun> runs = RunsOf(form, operands, reads, row, head, start);
      for (SlotRun& run : runs) run = {run.begin - start, run.end - start};
      LogRead(row, head, operands.total - start, std::move(runs));
    }
  }
}

}  // namespace effc
