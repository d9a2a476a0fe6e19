// Pointers into the bytes of a page.
#pragma once

#include "cpu/page.h"

namespace effc {

// The panel within `page`; `factor` is the offset of its factors, or -1.
template <class Byte, class Half, class Float>
PanelPointers<Byte, Half, Float> PointToPanel(const PanelLayout& panel, Byte* page,
                                              int64_t factor) {
  PanelPointers<Byte, Half, Float> p;
  p.scheme = panel.scheme;
  p.bits = panel.bits;
  p.rows = panel.rows;
  p.lanes = panel.lanes;
  p.group = panel.group;
  p.groups = panel.groups;
  p.codes = page + panel.codes;
  p.row_bytes = panel.row_bytes;
  p.unit = reinterpret_cast<Float*>(page + panel.unit);
  p.scales = reinterpret_cast<Half*>(page + panel.unit + sizeof(float));
  p.minima = p.scales + panel.parameters;
  const bool factors =
      panel.scheme == PanelScheme::kLaneFactor || panel.scheme == PanelScheme::kRowFactor;
  p.factors = factors ? reinterpret_cast<const uint16_t*>(page + factor) : nullptr;
  return p;
}

inline PanelView ViewPanel(const PanelLayout& panel, const uint8_t* page, int64_t factor) {
  return PointToPanel<const uint8_t, const uint16_t, const float>(panel, page, factor);
}

inline PanelTarget OpenPanel(const PanelLayout& panel, uint8_t* page, int64_t factor) {
  return PointToPanel<uint8_t, uint16_t, float>(panel, page, factor);
}

}  // namespace effc
