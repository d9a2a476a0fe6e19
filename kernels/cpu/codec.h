// Encoding, decoding and transcoding of weights, on any machine.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/huffman.h"
#include "cpu/weight.h"

namespace effc {

// A tensor that owns its memory, or that is input tensor `shared` of the call that made it.
struct OwnedTensor {
  Tensor view;
  std::vector<uint8_t> memory;
  int shared = -1;
};

// Counts exponents of `count` words; float32 counts the exponent of its upper half.
Histogram ExponentHistogram(const void* words, Type dtype, int64_t count, int threads);

// True when the low 16 bits of every word are zero.
bool IsBf16(const uint32_t* words, int64_t count);

// The exponents of codes 0..14 (rank4) or 1..7 (rank3), most frequent first, ties to the smaller.
void RankTable(const Histogram& histogram, Layout layout, uint8_t* table);

// Turns a weight from one layout into another; tensors that stay the same are shared.
std::vector<OwnedTensor> Transcode(const Spec& spec, Layout from, const Tensor* tensors,
                                   size_t count, Layout to, int threads);

// Writes the original words, bit-exact, to `out` ([rows, columns] in dtype).
void DecodeWords(const Spec& spec, Layout layout, const Tensor* tensors, size_t count, void* out,
                 int threads);

}  // namespace effc
