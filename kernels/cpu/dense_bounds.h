// What ranks blocks of a dense cache: means of their keys, or the least and the largest element of
// every channel.
#pragma once

#include "cpu/cache_storage.h"
#include "cpu/selection.h"

namespace effc {

// Tensor of means [B, K, N, D], or of bounds [B, K, N, 2 * D]: the minima of a block, then its
// maxima.
class DenseBounds : public BlockBounds {
 public:
  DenseBounds(const Kernels& kernels, const AttentionForm& form, const SelectionSpec& spec,
              const CacheTensor& bounds)
      : kernels_(kernels), form_(form), spec_(spec), bounds_(bounds) {}

  void Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t begin, int64_t end,
             float* scores, int64_t stride) const override;

 private:
  const Kernels& kernels_;
  const AttentionForm& form_;
  const SelectionSpec& spec_;
  const CacheTensor& bounds_;
};

// Full blocks of a row with this many tokens; all of them have bounds.
inline int64_t BoundedBlocks(const SelectionSpec& spec, int64_t tokens) {
  return std::max<int64_t>(0, tokens - spec.sinks) / spec.block;
}

// The bounds of `past` and of the blocks that this step completed, into `present`; `keys` are those
// after the step.
void WriteBounds(const Kernels& kernels, const AttentionOperands& operands, int64_t start,
                 const SelectionSpec& spec, const CacheTensor& keys, const CacheTensor& past,
                 const CacheTensor& present, int64_t row, int64_t head);

}  // namespace effc
