#include "cpu/huffman.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/weight.h"

namespace effc {
namespace {

constexpr uint32_t kTableSize = 1u << kMaxCodeLength;
constexpr int kSymbolsPerEntry = 6;

uint32_t Reverse(uint32_t code, int length) {
  uint32_t reversed = 0;
  for (int i = 0; i < length; ++i) reversed |= (code >> i & 1) << (length - 1 - i);
  return reversed;
}

// Canonical codes in order of (length, symbol), bit-reversed for a stream read from bit 0.
std::array<uint32_t, 256> CanonicalCodes(const uint8_t* lengths) {
  std::array<uint32_t, 256> codes{};
  uint32_t next = 0;
  for (int length = 1; length <= kMaxCodeLength; ++length) {
    for (int symbol = 0; symbol < 256; ++symbol) {
      if (lengths[symbol] == length) codes[symbol] = Reverse(next++, length);
    }
    next <<= 1;
  }
  return codes;
}

struct Leaf {
  uint64_t weight;
  int symbol;
};

// One level of package-merge: leaves and pairs of the level below, by weight.
struct Level {
  std::vector<uint64_t> weights;
  std::vector<bool> is_leaf;
};

Level MergeLevel(const std::vector<Leaf>& leaves, const Level& below) {
  Level level;
  size_t leaf = 0;
  size_t pair = 0;
  const size_t pairs = below.weights.size() / 2;
  while (leaf < leaves.size() || pair < pairs) {
    const uint64_t pair_weight =
        pair < pairs ? below.weights[2 * pair] + below.weights[2 * pair + 1] : 0;
    const bool take = pair == pairs || (leaf < leaves.size() && leaves[leaf].weight <= pair_weight);
    level.weights.push_back(take ? leaves[leaf].weight : pair_weight);
    level.is_leaf.push_back(take);
    ++(take ? leaf : pair);
  }
  return level;
}

}  // namespace

CodeLengths HuffmanLengths(const Histogram& histogram) {
  CodeLengths lengths{};
  std::vector<Leaf> leaves;
  for (int symbol = 0; symbol < 256; ++symbol) {
    if (histogram[symbol] > 0) leaves.push_back({histogram[symbol], symbol});
  }
  if (leaves.size() == 1) lengths[leaves[0].symbol] = 1;
  if (leaves.size() < 2) return lengths;
  std::stable_sort(leaves.begin(), leaves.end(),
                   [](const Leaf& a, const Leaf& b) { return a.weight < b.weight; });
  std::vector<Level> levels(1);
  for (int i = 0; i < kMaxCodeLength; ++i) levels.push_back(MergeLevel(leaves, levels.back()));
  size_t wanted = 2 * leaves.size() - 2;
  for (int i = kMaxCodeLength; i >= 1; --i) {
    size_t taken = 0;
    for (size_t j = 0; j < wanted; ++j) taken += levels[i].is_leaf[j];
    for (size_t j = 0; j < taken; ++j) ++lengths[leaves[j].symbol];
    wanted = 2 * (wanted - taken);
  }
  return lengths;
}

HuffmanEncoder::HuffmanEncoder(const CodeLengths& lengths) {
  empty_stream_ = std::count_if(lengths.begin(), lengths.end(), [](int x) { return x > 0; }) <= 1;
  codes_ = CanonicalCodes(lengths.data());
  for (int symbol = 0; symbol < 256; ++symbol) codes_[symbol] |= lengths[symbol] << 16;
}

int64_t HuffmanEncoder::Encode(const uint8_t* symbols, int64_t count, uint8_t* out) const {
  if (empty_stream_) return 0;
  uint8_t* const start = out;
  uint64_t buffer = 0;
  uint32_t bits = 0;
  auto push = [&](uint8_t symbol) {
    const uint32_t entry = codes_[symbol];
    buffer |= uint64_t{entry & 0xFFFF} << bits;
    bits += entry >> 16;
  };
  auto flush = [&] {
    std::memcpy(out, &buffer, 8);
    out += bits >> 3;
    buffer >>= bits & ~7u;
    bits &= 7;
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int j = 0; j < 4; ++j) push(symbols[i + j]);
    flush();
  }
  for (; i < count; ++i) {
    push(symbols[i]);
    flush();
  }
  if (bits > 0) *out++ = static_cast<uint8_t>(buffer);
  return out - start;
}

HuffmanDecoder::HuffmanDecoder(const uint8_t* lengths) {
  uint64_t kraft = 0;
  for (int symbol = 0; symbol < 256; ++symbol) {
    if (lengths[symbol] == 0) continue;
    if (lengths[symbol] > kMaxCodeLength) {
      throw Error("code_lengths holds " + std::to_string(lengths[symbol]) +
                  ", more than 12: the weight is damaged");
    }
    ++symbols_;
    only_ = static_cast<uint8_t>(symbol);
    kraft += kTableSize >> lengths[symbol];
  }
  if (symbols_ < 2) return;
  if (kraft != kTableSize) {
    throw Error("code_lengths is not a complete prefix code: the weight is damaged");
  }
  const std::array<uint32_t, 256> codes = CanonicalCodes(lengths);
  single_.resize(kTableSize);
  for (uint32_t symbol = 0; symbol < 256; ++symbol) {
    if (lengths[symbol] == 0) continue;
    for (uint32_t v = codes[symbol]; v < kTableSize; v += 1u << lengths[symbol]) {
      single_[v] = static_cast<uint16_t>(symbol | lengths[symbol] << 8);
    }
  }
  table_.resize(kTableSize);
  for (uint32_t v = 0; v < kTableSize; ++v) {
    uint64_t entry = 0;
    uint64_t bits = 0;
    uint64_t found = 0;
    while (found < kSymbolsPerEntry) {
      const uint16_t next = single_[v >> bits];
      if (bits + (next >> 8) > kMaxCodeLength) break;
      entry |= uint64_t{next & 0xFFu} << (8 * found++);
      bits += next >> 8;
    }
    table_[v] = entry | found << 48 | bits << 56;
  }
}

void HuffmanDecoder::Decode(const uint8_t* stream, int64_t bytes, uint8_t* out,
                            int64_t count) const {
  if (symbols_ < 2) {
    if (bytes != 0 || (symbols_ == 0 && count > 0)) {
      throw Error("stream and code_lengths disagree: the weight is damaged");
    }
    if (count > 0) std::memset(out, only_, count);
    return;
  }
  uint8_t* const end = out + count;
  const uint64_t* const table = table_.data();
  int64_t position = 0;  // in bits
  while (end - out >= 4 * 8 && (position >> 3) + 8 <= bytes) {
    uint64_t word;
    std::memcpy(&word, stream + (position >> 3), 8);
    word >>= position & 7;
    for (int i = 0; i < 4; ++i) {
      const uint64_t entry = table[word & (kTableSize - 1)];
      std::memcpy(out, &entry, 8);
      out += entry >> 48 & 0xFF;
      word >>= entry >> 56;
      position += static_cast<int64_t>(entry >> 56);
    }
  }
  while (out < end && (position >> 3) < bytes) {
    uint64_t word = 0;
    const int64_t at = position >> 3;
    std::memcpy(&word, stream + at, std::min<int64_t>(8, bytes - at));
    const uint16_t entry = single_[word >> (position & 7) & (kTableSize - 1)];
    *out++ = static_cast<uint8_t>(entry);
    position += entry >> 8;
  }
  if (out != end || (position + 7) >> 3 != bytes) {
    throw Error("a chunk of the stream does not hold the symbols it should: the weight is damaged");
  }
}

}  // namespace effc
