// Pages of a quantized cache of keys and values: layout, encoder, decoder, products.
// The bytes are specified in docs/cached-attention.md, section "A page".
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "cpu/panel.h"

namespace effc {

struct Kernels;

enum class KeyScheme : int32_t { kChannel = 0, kBalanced = 1 };
enum class ValueScheme : int32_t { kToken = 0, kSeparable = 1 };

// What the attributes of effc.CachedAttention say about a page; class 0 are the salient tokens.
struct PageSpec {
  int64_t head_size = 0;   // D
  int64_t value_size = 0;  // E
  int64_t page = 0;        // tokens
  int32_t key_bits[2] = {8, 8};
  int32_t value_bits[2] = {8, 8};
  int64_t salient = 0;  // tokens of class 0
  KeyScheme key_scheme = KeyScheme::kChannel;
  ValueScheme value_scheme = ValueScheme::kToken;
  int64_t key_group = 0;    // tokens that share parameters, 0: all
  int64_t value_group = 0;  // channels that share parameters, 0: all
};

// Where the parts of a coded panel lie in the bytes of a page.
struct PanelLayout {
  int64_t rows = 0;
  int64_t lanes = 0;
  int32_t bits = 16;
  PanelScheme scheme = PanelScheme::kPlain;
  int64_t group = 0;   // lanes that share parameters
  int64_t groups = 1;  // of a row
  int64_t row_bytes = 0;
  int64_t parameters = 0;  // scales of the panel, as many minima
  int64_t unit = 0;        // offset of the unit; scales and minima follow
  int64_t codes = 0;       // offset of the codes
};

constexpr int64_t kMaxPage = 256;       // places fit a byte
constexpr int64_t kMaxHeadSize = 4096;  // of keys and values

// Offsets of all parts of a page. Throws Error for a spec that no page can have.
class PageLayout {
 public:
  explicit PageLayout(const PageSpec& spec);

  PageSpec spec;
  int64_t bytes = 0;          // of a page, a multiple of 16
  int64_t tokens[2];          // of each class
  int64_t first[2];           // stored place of the first token of each class
  int64_t marks = -1;         // offset of the bits that say who is in class 0, -1 with one class
  int64_t value_factor = -1;  // offset of the channel factors of separable values, or -1
  int64_t key_factor = -1;    // offset of the channel factors of balanced keys, or -1
  PanelLayout keys[2];
  PanelLayout values[2];

  bool two_classes() const { return marks >= 0; }

 private:
  int64_t Reserve(int64_t size);  // the offset of a new part at the end
};

// Floats of scratch memory that PageScores and PageValues need for up to `g` queries.
int64_t PageScratchFloats(const PageLayout& layout, int64_t g);

// scores[i * stride + t] = dot(query i, key at stored place t) for g queries [g][D] and the places
// [0, page). Invalid tokens get finite scores of no meaning.
void PageScores(const Kernels& kernels, const PageLayout& layout, const uint8_t* page,
                const float* queries, int64_t g, float* scores, int64_t stride, float* scratch);

// out[i * E + e] += sum over stored places t of probabilities[i * stride + t] * value(t, e).
// The probabilities of invalid tokens must be 0.
void PageValues(const Kernels& kernels, const PageLayout& layout, const uint8_t* page,
                const float* probabilities, int64_t stride, int64_t g, float* out, float* scratch);

// Widened rows in stored order: keys [page][D], values [page][E]; either may be null.
void DecodePage(const Kernels& kernels, const PageLayout& layout, const uint8_t* page, float* keys,
                float* values);

// Element t is the place within the page (token order) of the token at stored place t.
using StoredOrder = std::array<uint8_t, kMaxPage>;
StoredOrder PageOrder(const PageLayout& layout, const uint8_t* page);

// The stored place of the token at a place within the page.
int64_t StoredPlace(const PageLayout& layout, const uint8_t* page, int64_t place);

// The value at a stored place, widened: [E].
void DecodeValue(const Kernels& kernels, const PageLayout& layout, const uint8_t* page,
                 int64_t stored, float* value);
void PrefetchValue(const PageLayout& layout, const uint8_t* page, int64_t stored);

// Encodes a page; every one of its bytes is written. `keys` and `values` are `page` pointers to
// rows of D and E floats in token order, valid[i] != 0 marks tokens that can be seen; rows of the
// others are not read. `importance` [page] is read with two classes, `query_max` [D] (maxima of
// |q|) with balanced keys. Returns -1, or the place of the first valid token whose key or value is
// not finite; the bytes then mean nothing.
int64_t EncodePage(const Kernels& kernels, const PageLayout& layout, const float* const* keys,
                   const float* const* values, const uint8_t* valid, const float* importance,
                   const float* query_max, uint8_t* page);

}  // namespace effc
