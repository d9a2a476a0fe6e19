// Bounds of coded pages, from their parameters alone.
#pragma once

#include "cpu/page_step.h"
#include "cpu/selection.h"

namespace effc {

class PageBounds : public BlockBounds {
 public:
  PageBounds(const Kernels& kernels, const SelectionSpec& spec, const PageStep& step)
      : kernels_(kernels), spec_(spec), step_(step) {}

  void Score(int64_t row, int64_t head, const float* queries, int64_t m, int64_t begin, int64_t end,
             float* scores, int64_t stride) const override;

 private:
  void RaisePanel(const PanelLayout& panel, const uint8_t* pages, const float* queries, int64_t m,
                  int64_t count, float* scores, int64_t stride) const;

  const Kernels& kernels_;
  const SelectionSpec& spec_;
  const PageStep& step_;
};

// Whether the parameters of a page bound its keys: coded, by channel.
bool HasBounds(const PageSpec& spec);

}  // namespace effc
