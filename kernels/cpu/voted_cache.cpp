#include "cpu/voted_cache.h"

#include <algorithm>
#include <string>

#include "cpu/choice_memory.h"
#include "cpu/dense_step.h"
#include "cpu/token_votes.h"

namespace effc {
namespace {

constexpr size_t kChoice = 2;  // the tensors after keys and values

}  // namespace

std::vector<CacheTensorForm> VotedStorage::Tensors(int64_t batch) const {
  std::vector<CacheTensorForm> forms = DenseStorage::Tensors(batch);
  if (selection_.refresh == 0) return forms;
  for (const CacheTensorForm& form : ChoiceMemory::Tensors(form_, batch)) forms.push_back(form);
  return forms;
}

void VotedStorage::CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const {
  DenseStorage::CheckPast(past, tokens);
  if (selection_.refresh == 0 || past[kChoice + kFlags].dims[1] >= tokens) return;
  throw Error("past chosen has " + std::to_string(past[kChoice + kFlags].dims[1]) +
              " flags, but `valid` counts " + std::to_string(tokens) + " past tokens");
}

std::vector<int64_t> VotedStorage::Present(size_t index, const std::vector<int64_t>& past,
                                           int64_t total) const {
  if (index < kChoice) return DenseStorage::Present(index, past, total);
  std::vector<int64_t> dims = past;
  if (index == kChoice + kFlags) {
    dims[1] = past[1] < 0 || total < 0 ? -1 : std::max(past[1], total);
  }
  return dims;
}

void VotedStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                        const std::vector<CacheTensor>& past,
                        const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                        float* y) const {
  const NewTokens tokens(form_, operands, parallel);
  const DenseStore store(operands, tokens, past[0], past[1], ring_);
  const bool remembers = selection_.refresh > 0;
  const ChoiceMemory memory(form_, operands, tokens, selection_, past.data() + kChoice,
                            present.data() + kChoice);
  std::vector<uint8_t> held(operands.batch);
  for (int64_t row = 0; remembers && row < operands.batch; ++row) held[row] = memory.Holds(row);
  VotedSlots voted =
      VoteForTokens(kernels, form_, operands, tokens, store, selection_, parallel, held);
  for (int64_t row = 0; row < operands.batch; ++row) {
    if (held[row]) voted.chosen.Runs(row, 0) = memory.Runs(row);
  }
  Attend(kernels, form_, operands, tokens, store, voted.reads(), parallel, y);
  WriteDense(kernels, form_, operands, tokens, ring_, past, present, parallel);
  if (remembers) memory.Write(held, voted.chosen);
}

}  // namespace effc
