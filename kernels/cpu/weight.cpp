#include "cpu/weight.h"

#include <bit>
#include <cstring>

#include "cpu/huffman.h"
#include "cpu/parallel.h"

namespace effc {
namespace {

const char* TypeName(Type type) {
  switch (type) {
    case Type::kFloat:
      return "float32";
    case Type::kUint8:
      return "uint8";
    case Type::kUint16:
      return "uint16";
    case Type::kInt32:
      return "int32";
    case Type::kInt64:
      return "int64";
    case Type::kFloat16:
      return "float16";
    case Type::kBfloat16:
      return "bfloat16";
  }
  return "an unsupported type";
}

std::string ShapeText(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) {
    text += (i ? "," : "") + std::to_string(tensor.dims[i]);
  }
  return text + "]";
}

// One expected tensor; a negative dimension is free.
struct Expected {
  const char* name;
  Type type;
  std::vector<int64_t> dims;
};

std::vector<Expected> ExpectedTensors(const Spec& s, Layout layout) {
  std::vector<Expected> list;
  if (layout == Layout::kRaw) return {{"weight", s.dtype, {s.rows, s.columns}}};
  list.push_back({"sign_mantissa", Type::kUint8, {s.rows, s.columns}});
  if (layout == Layout::kHuffman) {
    const int64_t chunks = (s.count() + kChunk - 1) / kChunk;
    list.push_back({"code_lengths", Type::kUint8, {256}});
    list.push_back({"stream", Type::kUint8, {-1}});
    list.push_back({"chunk_offsets", Type::kInt64, {chunks + 1}});
  } else {
    list.push_back({"codes", Type::kUint8, {s.rows, RankCodeStride(layout, s.columns)}});
    list.push_back({"table", Type::kUint8, {layout == Layout::kRank4 ? 16 : 8}});
    list.push_back({"escapes", Type::kUint8, {-1}});
    list.push_back({"row_escapes", Type::kInt32, {s.rows + 1}});
  }
  if (s.dtype == Type::kFloat) list.push_back({"low", Type::kUint16, {s.rows, s.columns}});
  if (s.dtype == Type::kFloat16) {
    list.push_back({"low", Type::kUint8, {s.rows, s.low_row_bytes()}});
  }
  return list;
}

bool SameShape(const Expected& expected, const Tensor& tensor) {
  if (tensor.rank != static_cast<int32_t>(expected.dims.size())) return false;
  for (int i = 0; i < tensor.rank; ++i) {
    if (expected.dims[i] >= 0 && expected.dims[i] != tensor.dims[i]) return false;
  }
  return true;
}

int64_t CountRank4Escapes(const uint8_t* codes, int64_t bytes) {
  int64_t total = 0;
  for (int64_t i = 0; i < bytes; i += kTile / 2) {  // a row is whole tiles
    int32_t found = 0;
    for (int64_t j = i; j < i + kTile / 2; ++j) {
      found += ((codes[j] & 15) == kRank4Escape) + (codes[j] >= (kRank4Escape << 4));
    }
    total += found;
  }
  return total;
}

int64_t CountRank3Escapes(const uint8_t* codes, int64_t bytes) {
  constexpr uint64_t kFirstBits = 0x249249249249;  // bit 0 of each of 16 codes
  int64_t total = 0;
  for (int64_t i = 0; i < bytes; i += 6) {
    uint64_t word = 0;
    std::memcpy(&word, codes + i, 6);
    total += std::popcount(~(word | word >> 1 | word >> 2) & kFirstBits);
  }
  return total;
}

void CheckEscapes(const WeightView& view, int64_t escapes, int threads) {
  const int32_t* offsets = view.row_escapes;
  if (offsets[0] != 0 || offsets[view.rows] != escapes) {
    throw Error("row_escapes must run from 0 to the number of escapes (" + std::to_string(escapes) +
                "): the weight is damaged");
  }
  ParallelRanges(view.rows, 256, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* codes = view.codes + row * view.code_stride;
      const int64_t found = view.layout == Layout::kRank4
                                ? CountRank4Escapes(codes, view.code_stride)
                                : CountRank3Escapes(codes, view.code_stride);
      if (offsets[row] < 0 || int64_t{offsets[row + 1]} - offsets[row] != found) {
        throw Error("row " + std::to_string(row) + " holds " + std::to_string(found) +
                    " escape codes, but row_escapes says otherwise: the weight is damaged");
      }
    }
  });
}

}  // namespace

Layout ParseLayout(const std::string& name) {
  if (name == "raw") return Layout::kRaw;
  if (name == "huffman") return Layout::kHuffman;
  if (name == "rank4") return Layout::kRank4;
  if (name == "rank3") return Layout::kRank3;
  throw Error("unknown layout '" + name + "'; choose raw, huffman, rank4 or rank3");
}

const char* LayoutName(Layout layout) {
  switch (layout) {
    case Layout::kRaw:
      return "raw";
    case Layout::kHuffman:
      return "huffman";
    case Layout::kRank4:
      return "rank4";
    case Layout::kRank3:
      return "rank3";
  }
  return "unknown";
}

int64_t Tensor::count() const {
  int64_t product = 1;
  for (int i = 0; i < rank; ++i) product *= dims[i];
  return product;
}

int64_t Spec::low_row_bytes() const {
  if (dtype == Type::kFloat) return 2 * columns;
  if (dtype == Type::kFloat16) return (3 * columns + 7) / 8;
  return 0;
}

void CheckSpec(const Spec& spec) {
  if (spec.dtype != Type::kFloat && spec.dtype != Type::kFloat16 && spec.dtype != Type::kBfloat16) {
    throw Error("dtype " + std::to_string(static_cast<int>(spec.dtype)) +
                " is not supported; use 1 (float32), 10 (float16) or 16 (bfloat16)");
  }
  constexpr int64_t kLimit = int64_t{1} << 40;
  if (spec.rows < 0 || spec.columns < 0 || spec.rows > kLimit || spec.columns > kLimit ||
      (spec.columns > 0 && spec.rows > kLimit / spec.columns)) {
    throw Error("rows " + std::to_string(spec.rows) + " and columns " +
                std::to_string(spec.columns) + " are out of range");
  }
}

void CheckTensors(const Spec& spec, Layout layout, const Tensor* tensors, size_t count) {
  CheckSpec(spec);
  const bool ranked = layout == Layout::kRank4 || layout == Layout::kRank3;
  if (ranked && spec.dtype == Type::kFloat16) {
    throw Error("float16 weights have no rank layout; use raw or huffman");
  }
  const std::vector<Expected> expected = ExpectedTensors(spec, layout);
  if (count != expected.size()) {
    throw Error(std::string("layout ") + LayoutName(layout) + " takes " +
                std::to_string(expected.size()) + " tensors, got " + std::to_string(count));
  }
  for (size_t i = 0; i < count; ++i) {
    if (tensors[i].type != expected[i].type) {
      throw Error(std::string(expected[i].name) + " must be " + TypeName(expected[i].type) +
                  ", got " + TypeName(tensors[i].type));
    }
    if (!SameShape(expected[i], tensors[i])) {
      throw Error(std::string(expected[i].name) + " has shape " + ShapeText(tensors[i]) +
                  ", which does not fit rows " + std::to_string(spec.rows) + " and columns " +
                  std::to_string(spec.columns));
    }
    if (tensors[i].data == nullptr && tensors[i].count() > 0) {
      throw Error(std::string(expected[i].name) + " has no data");
    }
  }
}

std::unique_ptr<RuntimeWeight> OpenWeight(const Spec& spec, Layout layout, const Tensor* tensors,
                                          size_t count, int threads) {
  if (layout == Layout::kHuffman) throw Error("layout huffman has to be transcoded before use");
  CheckTensors(spec, layout, tensors, count);
  auto weight = std::make_unique<RuntimeWeight>();
  WeightView& view = weight->view;
  view.layout = layout;
  view.dtype = spec.dtype;
  view.rows = spec.rows;
  view.columns = spec.columns;
  if (layout == Layout::kRaw) {
    view.raw = tensors[0].data;
    return weight;
  }
  const int64_t escapes = tensors[3].count();
  view.sign_mantissa = tensors[0].as<uint8_t>();
  view.codes = tensors[1].as<uint8_t>();
  view.code_stride = RankCodeStride(layout, spec.columns);
  std::memcpy(view.table, tensors[2].data, layout == Layout::kRank4 ? 16 : 8);
  view.row_escapes = tensors[4].as<int32_t>();
  view.low = spec.dtype == Type::kFloat ? tensors[5].as<uint16_t>() : nullptr;
  CheckEscapes(view, escapes, threads);
  weight->padded_escapes.resize(escapes + kEscapePadding);
  if (escapes > 0) std::memcpy(weight->padded_escapes.data(), tensors[3].data, escapes);
  view.escapes = weight->padded_escapes.data();
  return weight;
}

}  // namespace effc
