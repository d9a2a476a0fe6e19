#include "cpu/page_cache.h"

#include <algorithm>
#include <string>

#include "cpu/page_bounds.h"
#include "cpu/page_step.h"
#include "cpu/token_votes.h"

namespace effc {

PageStorage::PageStorage(const AttentionForm& form, const PageCacheSpec& spec,
                         const SelectionSpec& selection)
    : form_(form), spec_(spec), selection_(selection), layout_(spec.page) {
  if (selection.kind == SelectionKind::kAll) return;
  const bool pages = selection.kind == SelectionKind::kPages;
  if (!pages && selection.kind != SelectionKind::kTopK) {
    throw Error("storage 'pages' has the selections 'all', 'pages' and 'topk'");
  }
  if (pages && !HasBounds(spec.page)) {
    throw Error("selection 'pages' needs keys that are coded by channel in less than 16 bits");
  }
  if (selection.refresh > 0) {
    throw Error("storage 'pages' does not remember what was chosen; select_refresh must be 0");
  }
  if (selection.sinks != spec.sinks || selection.recent != spec.recent ||
      (pages && selection.block != spec.page.page)) {
    throw Error("the selection has other sinks, recent tokens or blocks than the pages");
  }
}

std::vector<CacheTensorForm> PageStorage::Tensors(int64_t batch) const {
  const std::vector<Type> types = {Type::kFloat, Type::kFloat16, Type::kBfloat16};
  const int64_t heads = form_.kv_heads;
  const int64_t places = spec_.places();
  const int64_t pages = form_.window > 0 ? form_.window / spec_.page.page + 2 : int64_t{-1};
  std::vector<CacheTensorForm> forms = {
      {"past exact_key", types, {batch, heads, places, form_.head_size}},
      {"past exact_value", types, {batch, heads, places, form_.value_size}},
      {"past pages", {Type::kUint8}, {batch, heads, pages, layout_.bytes}}};
  if (spec_.has_statistics()) {
    forms.push_back(
        {"past statistics", {Type::kFloat}, {batch, heads, 2 * places + form_.head_size}});
  }
  return forms;
}

void PageStorage::CheckPast(const std::vector<CacheTensor>& past, int64_t tokens) const {
  const int64_t needed = spec_.Pages(tokens);
  if (form_.window > 0 || past[kPages].dims[2] >= needed) return;
  throw Error("the past has " + std::to_string(past[kPages].dims[2]) +
              " pages, but `valid` counts " + std::to_string(tokens) + " past tokens, which fill " +
              std::to_string(needed));
}

std::vector<int64_t> PageStorage::Present(size_t index, const std::vector<int64_t>& past,
                                          int64_t total) const {
  std::vector<int64_t> dims = past;
  if (index != kPages || form_.window > 0) return dims;
  dims[2] = past[2] < 0 || total < 0 ? -1 : std::max(past[2], total / spec_.page.page);
  return dims;
}

VotedSlots PageStorage::Choose(const Kernels& kernels, const PageStep& step, const PageStore& store,
                               const ParallelFunction& parallel) const {
  if (selection_.kind == SelectionKind::kTopK) {
    return VoteForTokens(kernels, form_, step.operands, step.tokens, store, selection_, parallel);
  }
  if (selection_.kind == SelectionKind::kAll) return {};
  const PageBounds bounds(kernels, selection_, step);
  return {ChooseSlots(kernels, form_, step.operands, step.tokens, selection_, bounds, parallel),
          {}};
}

void PageStorage::Step(const Kernels& kernels, const AttentionOperands& operands,
                       const std::vector<CacheTensor>& past,
                       const std::vector<CacheTensor>& present, const ParallelFunction& parallel,
                       float* y) const {
  const NewTokens tokens(form_, operands, parallel);
  const PageStep step(form_, spec_, layout_, operands, tokens, past);
  const PageStore store(step);
  std::vector<Normaliser> normalisers;
  if (spec_.two_classes()) normalisers.resize(operands.batch * operands.seq * form_.heads);
  const VotedSlots voted = Choose(kernels, step, store, parallel);
  Attend(kernels, form_, operands, tokens, store, voted.reads(), parallel, y,
         normalisers.empty() ? nullptr : normalisers.data());
  parallel(operands.batch * form_.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / form_.kv_heads;
      const int64_t head = at % form_.kv_heads;
      if (!spec_.has_statistics()) {
        WritePages(kernels, step, nullptr, present, row, head);
        continue;
      }
      const Statistics statistics = AddProbes(kernels, step, store, normalisers.data(), row, head);
      WritePages(kernels, step, &statistics, present, row, head);
    }
  });
}

}  // namespace effc
