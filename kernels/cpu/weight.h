// A 2-D weight in one of its layouts: how its tensors are checked and viewed.
// The byte layouts are specified in docs/coded-weights.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace effc {

// ONNX element types of the tensors a weight is made of.
enum class Type : int32_t {
  kFloat = 1,
  kUint8 = 2,
  kUint16 = 4,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
};

enum class Layout : int32_t { kRaw = 0, kHuffman = 1, kRank4 = 2, kRank3 = 3 };

// A failure with a message for the user.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

Layout ParseLayout(const std::string& name);
const char* LayoutName(Layout layout);

// A tensor owned by someone else.
struct Tensor {
  const void* data = nullptr;
  Type type = Type::kUint8;
  int32_t rank = 0;
  int64_t dims[4] = {0, 0, 0, 0};

  int64_t count() const;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// What identifies a weight besides its tensors.
struct Spec {
  Type dtype = Type::kBfloat16;
  int64_t rows = 0;
  int64_t columns = 0;

  int64_t count() const { return rows * columns; }
  int64_t low_row_bytes() const;  // bytes of the `low` plane in one row, 0 without that plane
};

void CheckSpec(const Spec& spec);

constexpr int64_t kTile = 128;          // weights in one block of rank4 codes
constexpr int64_t kGroup = 64;          // weights in one block of rank3 codes
constexpr int64_t kEscapePadding = 64;  // bytes a kernel may read after the last escape
constexpr int kRank4Escape = 15;        // code that stands for "exponent in `escapes`"
constexpr int kRank3Escape = 0;

inline int64_t RankCodeStride(Layout layout, int64_t columns) {
  return layout == Layout::kRank4 ? (columns + kTile - 1) / kTile * (kTile / 2)
                                  : (columns + kGroup - 1) / kGroup * (kGroup * 3 / 8);
}

// Pointers a product kernel needs. Plain data: shared with every ISA's translation unit.
struct WeightView {
  Layout layout;
  Type dtype;
  int64_t rows;
  int64_t columns;
  const void* raw;               // raw layout: [rows, columns] in dtype
  const uint8_t* sign_mantissa;  // rank layouts: [rows, columns]
  const uint8_t* codes;          // [rows, code_stride]
  int64_t code_stride;
  uint8_t table[16];           // exponent of each code
  const uint8_t* escapes;      // followed by kEscapePadding readable bytes
  const int32_t* row_escapes;  // [rows + 1]
  const uint16_t* low;         // fp32: low halves, [rows, columns]
};

// A weight ready for the kernels: a view plus the memory that only the view needs.
struct RuntimeWeight {
  WeightView view{};
  std::vector<uint8_t> padded_escapes;
  std::vector<std::vector<uint8_t>> owned;  // transcoded tensors
};

// Throws Error unless `tensors` is exactly the tuple of `layout` for `spec`, sizes included.
void CheckTensors(const Spec& spec, Layout layout, const Tensor* tensors, size_t count);

// Checks a raw, rank4 or rank3 weight, escape counts included, and makes it ready to run.
// Only the escapes are copied; the other tensors must outlive the result.
std::unique_ptr<RuntimeWeight> OpenWeight(const Spec& spec, Layout layout, const Tensor* tensors,
                                          size_t count, int threads);

}  // namespace effc
