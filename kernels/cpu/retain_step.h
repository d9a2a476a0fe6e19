// One step of a cache that keeps the tokens that surprised the model most.
//
// SirLLM (Yao et al. 2024, arXiv 2405.12528, section 3): before new tokens come, those with the
// largest scores stay; positions are places of the cache, so that they never grow.
//
// Attention runs over packed slots: the tokens that a row has kept, ending where those of the row
// with the most end, then the new tokens.
#pragma once

#include <vector>

#include "cpu/dense_step.h"
#include "cpu/selection.h"

namespace effc {

// Tensors of the cache.
enum RetainTensor : size_t { kRetainKey, kRetainValue, kRetainToken };

// One row. Its tokens are counted from its first valid slot.
struct RetainRow {
  int64_t start;                // slot of token 0
  int64_t tokens;               // after the step, those that left the cache included
  int64_t places;               // in use before the step
  std::vector<int32_t> chosen;  // places that stay, ascending, where not all of them do
  std::vector<int32_t> fresh;   // new tokens that are valid, as indices of the step

  bool evicts() const { return static_cast<int64_t>(chosen.size()) < places; }
  // Places in use once there is room for the new tokens.
  int64_t kept() const { return static_cast<int64_t>(chosen.size()); }
};

class RetainStep {
 public:
  // Chooses what stays. Throws Error for a cache that no step left, scores that are no numbers, and
  // more new tokens than there can be room for.
  RetainStep(const AttentionForm& form, const SelectionSpec& spec,
             const AttentionOperands& operands, const std::vector<CacheTensor>& past);
  RetainStep(const RetainStep&) = delete;

  // The operands over packed slots, with the angles of the places that the new tokens get.
  const AttentionOperands& packed() const { return packed_; }
  const RetainRow& Row(int64_t row) const { return rows_[row]; }
  // The packed slot of place 0.
  int64_t First(int64_t row) const { return packed_.past() - rows_[row].kept(); }
  // By place: 1 + the number of the token there, 0 for none.
  int32_t* Tokens(const CacheTensor& tensor, int64_t row) const {
    return reinterpret_cast<int32_t*>(tensor.data) + row * spec.budget;
  }
  // Angles of a place.
  const float* Cosines(int64_t row, int64_t place) const {
    return operands.far_cosine + Angle(row, place);
  }
  const float* Sines(int64_t row, int64_t place) const {
    return operands.far_sine + Angle(row, place);
  }

  // Adds to the log of reads, which counts tokens of the text.
  void LogReads() const;

  const AttentionForm& form;
  const SelectionSpec& spec;
  const AttentionOperands& operands;
  const std::vector<CacheTensor>& past;

 private:
  RetainRow ReadRow(int64_t row) const;
  int64_t CountPlaces(int64_t row, int64_t old_tokens) const;
  // Of so many places, those that stay when there is to be room.
  std::vector<int32_t> Choose(int64_t row, const RetainRow& r, int64_t room) const;
  void PackAngles();
  int64_t Angle(int64_t row, int64_t place) const {
    const int64_t table = operands.far_batch == 1 ? 0 : row;
    return (table * spec.budget + place) * (form.rotary_size / 2);
  }

  std::vector<RetainRow> rows_;
  std::vector<uint8_t> valid_;  // of packed slots
  std::vector<float> cosines_;  // [B, S, R / 2]
  std::vector<float> sines_;
  AttentionOperands packed_;
};

// The packed slots: places of `present`, then the new tokens.
class PlaceStore : public TokenStore {
 public:
  PlaceStore(const Kernels& kernels, const RetainStep& step, const NewTokens& tokens,
             const std::vector<CacheTensor>& present)
      : pieces_(*kernels.attention), step_(step), tokens_(tokens), present_(present) {}

  int64_t BlockBegin(int64_t row, int64_t slot) const override;
  int64_t BlockEnd(int64_t row, int64_t begin, int64_t end) const override;
  TokenSpan Run(int64_t row, int64_t head, int64_t slot, int64_t end) const override;
  TokenRows Keys(int64_t row, int64_t head, int64_t slot, const TokenSpan& run) const override;

 private:
  const AttentionKernels& pieces_;
  const RetainStep& step_;
  const NewTokens& tokens_;
  const std::vector<CacheTensor>& present_;
};

// The places that stay, at the beginning of `present`. They only move towards the start, so that
// `past` and `present` may be one.
void MakeRoom(const RetainStep& step, const std::vector<CacheTensor>& present,
              const ParallelFunction& parallel);

// The new tokens behind them.
void AppendTokens(const Kernels& kernels, const RetainStep& step, const NewTokens& tokens,
                  const std::vector<CacheTensor>& present, const ParallelFunction& parallel);

}  // namespace effc
