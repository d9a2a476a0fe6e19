// One step of a cache that keeps the tokens that surprised the model most.
//
// SirLLM (Yao et al. 2024, arXiv 2405.12528, section 3): before new tokens come, those with the
// largest scores stay; positions are places of the cache, so that they never grow.
#pragma once

#include <vector>

#include "cpu/packed_step.h"

namespace effc {

// Tensors of the cache.
enum RetainTensor : size_t { kRetainKey, kRetainValue, kRetainToken };

// The places of one row before the step.
struct RetainPlaces {
  int64_t used;
  std::vector<int32_t> chosen;  // those that stay, ascending

  bool evicts() const { return static_cast<int64_t>(chosen.size()) < used; }
};

// The angles of its packed operands are those of the places that the new tokens get.
class RetainStep : public PackedStep {
 public:
  // Chooses what stays. Throws Error for a cache that no step left, scores that are no numbers, and
  // more new tokens than there can be room for.
  RetainStep(const AttentionForm& form, const SelectionSpec& spec,
             const AttentionOperands& operands, const std::vector<CacheTensor>& past);

  const RetainPlaces& Places(int64_t row) const { return places_[row]; }
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

 private:
  RetainPlaces ReadPlaces(int64_t row) const;
  void CheckOrder(int64_t row, int64_t used) const;
  // Of so many places, those that stay when there is to be room.
  std::vector<int32_t> Choose(int64_t row, int64_t used, int64_t room) const;
  void PackAngles();
  int64_t Angle(int64_t row, int64_t place) const {
    const int64_t table = operands.far_batch == 1 ? 0 : row;
    return (table * spec.budget + place) * (form.rotary_size / 2);
  }

  std::vector<RetainPlaces> places_;
  std::vector<float> cosines_;  // [B, S, R / 2]
  std::vector<float> sines_;
};

// The packed slots: places of `present`, whose keys are turned when they are read.
class PlaceStore : public PackedStore {
 public:
  PlaceStore(const Kernels& kernels, const RetainStep& step, const NewTokens& tokens,
             const std::vector<CacheTensor>& present)
      : PackedStore(step, tokens, present[kRetainKey], present[kRetainValue]),
        pieces_(*kernels.attention),
        step_(step) {}

  TokenRows Keys(int64_t row, int64_t head, int64_t slot, const TokenSpan& run) const override;

 private:
  const AttentionKernels& pieces_;
  const RetainStep& step_;
};

// The places that stay, at the beginning of `present`. They only move towards the start, so that
// `past` and `present` may be one.
void MakeRoom(const RetainStep& step, const std::vector<CacheTensor>& present,
              const ParallelFunction& parallel);

// The new tokens behind them.
void AppendTokens(const Kernels& kernels, const RetainStep& step, const NewTokens& tokens,
                  const std::vector<CacheTensor>& present, const ParallelFunction& parallel);

}  // namespace effc
