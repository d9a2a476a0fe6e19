// Canonical length-limited Huffman code of exponents, in independent chunks.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace effc {

constexpr int kMaxCodeLength = 12;
constexpr int64_t kChunk = 16384;  // symbols in a chunk

using Histogram = std::array<uint64_t, 256>;
using CodeLengths = std::array<uint8_t, 256>;

// Optimal lengths up to kMaxCodeLength (package-merge); 0 for absent symbols, 1 for a lone one.
CodeLengths HuffmanLengths(const Histogram& histogram);

// Writes codes least significant bit first.
class HuffmanEncoder {
 public:
  explicit HuffmanEncoder(const CodeLengths& lengths);
  // Upper bound of the bytes Encode writes for `count` symbols.
  static int64_t Bound(int64_t count) { return count * kMaxCodeLength / 8 + 16; }
  // Encodes one chunk into `out` and returns the bytes used.
  int64_t Encode(const uint8_t* symbols, int64_t count, uint8_t* out) const;

 private:
  bool empty_stream_;
  std::array<uint32_t, 256> codes_;  // code | length << 16
};

// Table decoder: one lookup of kMaxCodeLength bits yields up to six symbols.
class HuffmanDecoder {
 public:
  // Throws Error unless the lengths form a complete prefix code.
  explicit HuffmanDecoder(const uint8_t* lengths);
  // Decodes exactly `count` symbols from exactly `bytes` bytes, or throws Error.
  void Decode(const uint8_t* stream, int64_t bytes, uint8_t* out, int64_t count) const;

 private:
  int symbols_ = 0;
  uint8_t only_ = 0;
  std::vector<uint64_t> table_;   // six symbols, number of symbols, bits
  std::vector<uint16_t> single_;  // symbol | bits << 8
};

}  // namespace effc
