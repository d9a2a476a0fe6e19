// The encoder of panels, for all instruction sets: plain loops that the compiler makes vectors of.
// Included by one translation unit per instruction set.
//
// All arithmetic is on x / unit. The unit is a power of two, so that the results are those of the
// same steps on x, without overflow.
#pragma once

#include <cstring>

#include "cpu/panel.h"
#include "cpu/panel_float.h"

namespace effc {
namespace {

constexpr int64_t kStrip = 64;         // channels of keys encoded at a time
constexpr int64_t kLongestRow = 4096;  // channels of values
constexpr float kInfinity = __builtin_huge_valf();

struct Range {
  float low = kInfinity;
  float high = -kInfinity;
};

// What codes are made with; a scale of 0 becomes 1, because all x are the minimum then.
struct Parameters {
  float minimum = 0;
  float divisor = 1;
};

// Rounds and stores the parameters of a group; without a valid token they are 0.
template <int kBits>
EFFC_INLINE Parameters StoreParameters(Range range, uint16_t* scale, uint16_t* minimum) {
  if (range.low > range.high) range = {0, 0};
  constexpr float kTop = (1 << kBits) - 1;
  *minimum = HalfBelow(range.low);
  const float low = HalfToFloat(*minimum);
  *scale = HalfAbove((range.high - low) / kTop);
  const float step = HalfToFloat(*scale);
  return {low, step == 0 ? 1 : step};
}

// rint((x - minimum) / divisor) in the low byte: adding 2^23 rounds halves to even.
template <int kBits>
EFFC_INLINE uint32_t Code(float x, float minimum, float divisor) {
  constexpr float kTop = (1 << kBits) - 1;
  const float code = (x - minimum) / divisor;
  return std::bit_cast<uint32_t>((code < kTop ? code : kTop) + 0x1p23f) & ((1u << kBits) - 1);
}

EFFC_INLINE Range RangeOf(const float* x, int64_t count) {
  float low[16];
  float high[16];
  for (int i = 0; i < 16; ++i) low[i] = kInfinity, high[i] = -kInfinity;
  int64_t at = 0;
  for (; at + 16 <= count; at += 16) {
    for (int i = 0; i < 16; ++i) {
      low[i] = x[at + i] < low[i] ? x[at + i] : low[i];
      high[i] = x[at + i] > high[i] ? x[at + i] : high[i];
    }
  }
  for (; at < count; ++at) {
    low[0] = x[at] < low[0] ? x[at] : low[0];
    high[0] = x[at] > high[0] ? x[at] : high[0];
  }
  Range range;
  for (int i = 0; i < 16; ++i) {
    range.low = low[i] < range.low ? low[i] : range.low;
    range.high = high[i] > range.high ? high[i] : range.high;
  }
  return range;
}

void ChannelMaxima(const TokenPointers& tokens, int32_t* __restrict maxima) {
  for (int64_t t = 0; t < tokens.count; ++t) {
    const float* __restrict row = tokens.rows[t];
    if (row == nullptr) continue;
    for (int64_t c = 0; c < tokens.width; ++c) {
      const int32_t bits = std::bit_cast<int32_t>(row[c]) & 0x7FFFFFFF;
      maxima[c] = bits > maxima[c] ? bits : maxima[c];
    }
  }
}

// 16 rows of kStrip bytes to kStrip rows of 16 bytes, `stride` apart.
EFFC_INLINE void StoreTransposed(const uint8_t (&block)[16][kStrip], int64_t width, uint8_t* out,
                                 int64_t stride) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  for (int64_t c = 0; c < width; c += 16) {
    Bytes v[16];
    for (int i = 0; i < 16; ++i) std::memcpy(&v[i], &block[i][c], 16);
    for (int step = 0; step < 4; ++step) {
      Bytes w[16];
      for (int i = 0; i < 8; ++i) {
        w[2 * i] = __builtin_shuffle(v[i], v[i + 8],
                                     Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
        w[2 * i + 1] = __builtin_shuffle(
            v[i], v[i + 8], Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
      }
      std::memcpy(v, w, sizeof(v));
    }
    for (int i = 0; i < 16 && c + i < width; ++i) std::memcpy(out + (c + i) * stride, &v[i], 16);
  }
}

// Parameters of the channels of a strip, of each group of tokens.
struct StripParameters {
  float minimum[16][kStrip];
  float divisor[16][kStrip];
};

template <int kBits>
void StoreChannelParameters(const PanelTarget& panel, const TokenPointers& tokens, int64_t channel,
                            int64_t width, StripParameters& out) {
  const float inverse = 1 / *panel.unit;
  for (int64_t g = 0; g < panel.groups; ++g) {
    float low[kStrip];
    float high[kStrip];
    for (int64_t c = 0; c < kStrip; ++c) low[c] = kInfinity, high[c] = -kInfinity;
    const int64_t begin = g * panel.group;
    const int64_t end = begin + panel.group < panel.lanes ? begin + panel.group : panel.lanes;
    for (int64_t t = begin; t < end; ++t) {
      if (tokens.rows[t] == nullptr) continue;
      const float* __restrict x = tokens.rows[t] + channel;
      for (int64_t c = 0; c < width; ++c) {
        low[c] = x[c] < low[c] ? x[c] : low[c];
        high[c] = x[c] > high[c] ? x[c] : high[c];
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      const int64_t at = (channel + c) * panel.groups + g;
      const Range range = {low[c] * inverse, high[c] * inverse};
      const Parameters p = StoreParameters<kBits>(range, panel.scales + at, panel.minima + at);
      out.minimum[g][c] = p.minimum;
      out.divisor[g][c] = p.divisor;
    }
  }
}

// The codes of one word of kStrip channels: codes(token, word of codes) adds those of a token.
template <int kBits, class Codes>
EFFC_INLINE void StoreKeyWord(const PanelTarget& panel, int64_t channel, int64_t width,
                              int64_t word, Codes&& codes) {
  constexpr int kF = 8 / kBits;
  uint8_t block[16][kStrip];
  for (int64_t i = 0; i < 16; ++i) {
    uint32_t packed[kStrip] = {};
    for (int j = 0; j < kF; ++j) {
      const int64_t token = 16 * (kF * word + j) + i;
      if (token < panel.lanes) codes(token, kBits * j, packed);
    }
    for (int64_t c = 0; c < kStrip; ++c) block[i][c] = static_cast<uint8_t>(packed[c]);
  }
  StoreTransposed(block, width, panel.codes + channel * panel.row_bytes + 16 * word,
                  panel.row_bytes);
}

template <int kBits>
void EncodeChannelKeys(const PanelTarget& panel, const TokenPointers& tokens) {
  const float inverse = 1 / *panel.unit;
  StripParameters parameters;
  for (int64_t channel = 0; channel < panel.rows; channel += kStrip) {
    const int64_t width = panel.rows - channel < kStrip ? panel.rows - channel : kStrip;
    StoreChannelParameters<kBits>(panel, tokens, channel, width, parameters);
    for (int64_t word = 0; word * 16 < panel.row_bytes; ++word) {
      StoreKeyWord<kBits>(
          panel, channel, width, word, [&](int64_t token, int shift, uint32_t* __restrict packed) {
            if (tokens.rows[token] == nullptr) return;
            const float* __restrict x = tokens.rows[token] + channel;
            const float* minimum = parameters.minimum[token / panel.group];
            const float* divisor = parameters.divisor[token / panel.group];
            for (int64_t c = 0; c < width; ++c) {
              packed[c] |= Code<kBits>(x[c] * inverse, minimum[c], divisor[c]) << shift;
            }
          });
    }
  }
}

// out[i] = x[i] / factor[i] / unit, with factors in bfloat16 or null.
EFFC_INLINE void Balance(const float* __restrict x, const uint16_t* __restrict factors,
                         int64_t count, float inverse, float* __restrict out) {
  if (factors == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * inverse;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] / Bfloat16ToFloat(factors[i]) * inverse;
  }
}

template <int kBits>
void EncodeBalancedKeys(const PanelTarget& panel, const TokenPointers& tokens) {
  const float inverse = 1 / *panel.unit;
  Parameters parameters[256];
  for (int64_t t = 0; t < panel.lanes; ++t) {
    float row[kLongestRow];
    Range range;
    if (tokens.rows[t] != nullptr) {
      Balance(tokens.rows[t], panel.factors, panel.rows, inverse, row);
      range = RangeOf(row, panel.rows);
    }
    parameters[t] = StoreParameters<kBits>(range, panel.scales + t, panel.minima + t);
  }
  for (int64_t channel = 0; channel < panel.rows; channel += kStrip) {
    const int64_t width = panel.rows - channel < kStrip ? panel.rows - channel : kStrip;
    for (int64_t word = 0; word * 16 < panel.row_bytes; ++word) {
      StoreKeyWord<kBits>(
          panel, channel, width, word, [&](int64_t token, int shift, uint32_t* __restrict packed) {
            if (tokens.rows[token] == nullptr) return;
            float x[kStrip];
            Balance(tokens.rows[token] + channel, panel.factors + channel, width, inverse, x);
            const Parameters p = parameters[token];
            for (int64_t c = 0; c < width; ++c) {
              packed[c] |= Code<kBits>(x[c], p.minimum, p.divisor) << shift;
            }
          });
    }
  }
}

template <int kBits>
void EncodeValueRow(const PanelTarget& panel, const float* x, int64_t row) {
  constexpr int kF = 8 / kBits;
  float scaled[kLongestRow];
  uint8_t codes[kLongestRow + 16 * kF];
  Balance(x, panel.factors, panel.lanes, 1 / *panel.unit, scaled);
  for (int64_t g = 0; g < panel.groups; ++g) {
    const int64_t begin = g * panel.group;
    const int64_t end = begin + panel.group < panel.lanes ? begin + panel.group : panel.lanes;
    const int64_t at = row * panel.groups + g;
    const Parameters p = StoreParameters<kBits>(RangeOf(scaled + begin, end - begin),
                                                panel.scales + at, panel.minima + at);
    for (int64_t i = begin; i < end; ++i) {
      codes[i] = static_cast<uint8_t>(Code<kBits>(scaled[i], p.minimum, p.divisor));
    }
  }
  std::memset(codes + panel.lanes, 0, 16 * kF);
  uint8_t* out = panel.codes + row * panel.row_bytes;
  for (int64_t word = 0; word * 16 < panel.row_bytes; ++word) {
    const uint8_t* from = codes + 16 * kF * word;
    for (int i = 0; i < 16; ++i) {
      uint8_t packed = from[i];
      for (int j = 1; j < kF; ++j) packed |= static_cast<uint8_t>(from[16 * j + i] << kBits * j);
      out[16 * word + i] = packed;
    }
  }
}

template <int kBits>
void EncodeTokenValues(const PanelTarget& panel, const TokenPointers& tokens) {
  for (int64_t row = 0; row < panel.rows; ++row) {
    if (tokens.rows[row] != nullptr) {
      EncodeValueRow<kBits>(panel, tokens.rows[row], row);
      continue;
    }
    std::memset(panel.codes + row * panel.row_bytes, 0, panel.row_bytes);
    std::memset(panel.scales + row * panel.groups, 0, panel.groups * sizeof(uint16_t));
    std::memset(panel.minima + row * panel.groups, 0, panel.groups * sizeof(uint16_t));
  }
}

// Codes of 16 bits: the bfloat16 values, tokens as lanes (keys) or as rows (values).
EFFC_INLINE void EncodePlain(const PanelTarget& panel, const TokenPointers& tokens, bool keys) {
  std::memset(panel.codes, 0, panel.rows * panel.row_bytes);
  for (int64_t t = 0; t < tokens.count; ++t) {
    const float* __restrict x = tokens.rows[t];
    if (x == nullptr) continue;
    uint8_t* out = panel.codes + (keys ? 2 * t : t * panel.row_bytes);
    const int64_t step = keys ? panel.row_bytes : 2;
    for (int64_t c = 0; c < tokens.width; ++c) {
      const uint16_t word = Bfloat16Nearest(x[c]);
      std::memcpy(out + c * step, &word, 2);
    }
  }
}

template <int kBits>
void EncodeKeysOf(const PanelTarget& panel, const TokenPointers& tokens) {
  if (panel.scheme == PanelScheme::kRowFactor) {
    EncodeBalancedKeys<kBits>(panel, tokens);
  } else {
    EncodeChannelKeys<kBits>(panel, tokens);
  }
}

void EncodeKeys(const PanelTarget& panel, const TokenPointers& tokens) {
  switch (panel.bits) {
    case 2:
      return EncodeKeysOf<2>(panel, tokens);
    case 4:
      return EncodeKeysOf<4>(panel, tokens);
    case 8:
      return EncodeKeysOf<8>(panel, tokens);
    default:
      return EncodePlain(panel, tokens, true);
  }
}

void EncodeValues(const PanelTarget& panel, const TokenPointers& tokens) {
  switch (panel.bits) {
    case 2:
      return EncodeTokenValues<2>(panel, tokens);
    case 4:
      return EncodeTokenValues<4>(panel, tokens);
    case 8:
      return EncodeTokenValues<8>(panel, tokens);
    default:
      return EncodePlain(panel, tokens, false);
  }
}

}  // namespace
}  // namespace effc
