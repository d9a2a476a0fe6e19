#include "cpu/codec.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>

#include "cpu/parallel.h"

namespace effc {
namespace {

constexpr int64_t kChunksPerTask = 16;

// Where exponents come from: plain words, a Huffman stream, or rank codes.
class ExponentReader {
 public:
  virtual ~ExponentReader() = default;
  // Writes the exponents of `count` weights from flat index `begin`.
  virtual void Read(int64_t begin, int64_t count, uint8_t* out) const = 0;
};

class WordReader : public ExponentReader {
 public:
  WordReader(const void* words, Type dtype) : words_(words), dtype_(dtype) {}

  void Read(int64_t begin, int64_t count, uint8_t* out) const override {
    if (dtype_ == Type::kFloat) {
      const uint32_t* words = static_cast<const uint32_t*>(words_) + begin;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(words[i] >> 23);
    } else if (dtype_ == Type::kBfloat16) {
      const uint16_t* words = static_cast<const uint16_t*>(words_) + begin;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(words[i] >> 7);
    } else {
      const uint16_t* words = static_cast<const uint16_t*>(words_) + begin;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(words[i] >> 10 & 31);
    }
  }

 private:
  const void* words_;
  Type dtype_;
};

class HuffmanReader : public ExponentReader {
 public:
  HuffmanReader(const Spec& spec, const Tensor* tensors)
      : total_(spec.count()),
        decoder_(tensors[1].as<uint8_t>()),
        stream_(tensors[2].as<uint8_t>()),
        offsets_(tensors[3].as<int64_t>()) {
    const int64_t chunks = tensors[3].count() - 1;
    bool ok = offsets_[0] == 0 && offsets_[chunks] == tensors[2].count();
    for (int64_t i = 0; i < chunks; ++i) ok = ok && offsets_[i] <= offsets_[i + 1];
    if (!ok) {
      throw Error("chunk_offsets must rise from 0 to the length of stream: the weight is damaged");
    }
  }

  void Read(int64_t begin, int64_t count, uint8_t* out) const override {
    std::vector<uint8_t> partial;
    for (int64_t at = begin; at < begin + count;) {
      const int64_t chunk = at / kChunk;
      const int64_t first = chunk * kChunk;
      const int64_t size = std::min(kChunk, total_ - first);
      const int64_t used = std::min(first + size, begin + count) - at;
      uint8_t* target = out + (at - begin);
      if (used == size) {
        DecodeChunk(chunk, target, size);
      } else {
        partial.resize(kChunk);
        DecodeChunk(chunk, partial.data(), size);
        std::memcpy(target, partial.data() + (at - first), used);
      }
      at += used;
    }
  }

 private:
  void DecodeChunk(int64_t chunk, uint8_t* out, int64_t size) const {
    decoder_.Decode(stream_ + offsets_[chunk], offsets_[chunk + 1] - offsets_[chunk], out, size);
  }

  int64_t total_;
  HuffmanDecoder decoder_;
  const uint8_t* stream_;
  const int64_t* offsets_;
};

class RankReader : public ExponentReader {
 public:
  RankReader(const Spec& spec, Layout layout, const Tensor* tensors, size_t count, int threads)
      : weight_(OpenWeight(spec, layout, tensors, count, threads)) {}

  void Read(int64_t begin, int64_t count, uint8_t* out) const override {
    const int64_t columns = weight_->view.columns;
    std::vector<uint8_t> row_buffer(columns);
    for (int64_t at = begin; at < begin + count;) {
      const int64_t row = at / columns;
      const int64_t skip = at - row * columns;
      const int64_t used = std::min(columns - skip, begin + count - at);
      if (used == columns) {
        ReadRow(row, out + (at - begin));
      } else {
        ReadRow(row, row_buffer.data());
        std::memcpy(out + (at - begin), row_buffer.data() + skip, used);
      }
      at += used;
    }
  }

 private:
  void ReadRow(int64_t row, uint8_t* out) const {
    const WeightView& v = weight_->view;
    const uint8_t* codes = v.codes + row * v.code_stride;
    const uint8_t* escape = v.escapes + v.row_escapes[row];
    const bool wide = v.layout == Layout::kRank4;
    for (int64_t k = 0; k < v.columns; ++k) {
      const int code = wide ? Code4(codes, k) : Code3(codes, k);
      out[k] = code == (wide ? kRank4Escape : kRank3Escape) ? *escape++ : v.table[code];
    }
  }

  static int Code4(const uint8_t* codes, int64_t k) {
    const int64_t in_tile = k % kTile;
    const uint8_t byte = codes[k / kTile * (kTile / 2) + in_tile % (kTile / 2)];
    return in_tile < kTile / 2 ? byte & 15 : byte >> 4;
  }

  static int Code3(const uint8_t* codes, int64_t k) {
    const uint8_t* group = codes + k / 8 * 3;
    const uint32_t word = group[0] | group[1] << 8 | group[2] << 16;
    return word >> (k % 8 * 3) & 7;
  }

  std::unique_ptr<RuntimeWeight> weight_;
};

std::unique_ptr<ExponentReader> MakeReader(const Spec& spec, Layout layout, const Tensor* tensors,
                                           size_t count, int threads) {
  CheckTensors(spec, layout, tensors, count);
  if (layout == Layout::kRaw) return std::make_unique<WordReader>(tensors[0].data, spec.dtype);
  if (layout == Layout::kHuffman) return std::make_unique<HuffmanReader>(spec, tensors);
  return std::make_unique<RankReader>(spec, layout, tensors, count, threads);
}

void CountBytes(const uint8_t* bytes, int64_t count, Histogram& histogram) {
  uint32_t tables[4][256] = {};  // four, so that equal neighbours do not wait for each other
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    for (int j = 0; j < 8; ++j) ++tables[j & 3][word >> (8 * j) & 0xFF];
  }
  for (; i < count; ++i) ++tables[0][bytes[i]];
  for (int s = 0; s < 256; ++s) {
    histogram[s] += uint64_t{tables[0][s]} + tables[1][s] + tables[2][s] + tables[3][s];
  }
}

Histogram CountAll(const ExponentReader& reader, int64_t count, int threads) {
  Histogram total{};
  std::mutex mutex;
  ParallelRanges(count, kChunk * kChunksPerTask, threads, [&](int64_t begin, int64_t end) {
    Histogram local{};
    std::vector<uint8_t> exponents(kChunk);
    for (int64_t at = begin; at < end; at += kChunk) {
      const int64_t size = std::min(kChunk, end - at);
      reader.Read(at, size, exponents.data());
      CountBytes(exponents.data(), size, local);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int s = 0; s < 256; ++s) total[s] += local[s];
  });
  return total;
}

OwnedTensor MakeTensor(Type type, std::vector<int64_t> dims, int64_t item) {
  OwnedTensor tensor;
  tensor.view.type = type;
  tensor.view.rank = static_cast<int32_t>(dims.size());
  std::copy(dims.begin(), dims.end(), tensor.view.dims);
  tensor.memory.resize(tensor.view.count() * item);
  tensor.view.data = tensor.memory.data();
  return tensor;
}

OwnedTensor MakeTensor(std::vector<uint8_t> bytes) {
  OwnedTensor tensor;
  tensor.view.rank = 1;
  tensor.view.dims[0] = static_cast<int64_t>(bytes.size());
  tensor.memory = std::move(bytes);
  tensor.view.data = tensor.memory.data();
  return tensor;
}

OwnedTensor Share(const Tensor* tensors, int index) {
  OwnedTensor tensor;
  tensor.view = tensors[index];
  tensor.shared = index;
  return tensor;
}

void SplitRow(const Spec& spec, const void* words, int64_t row, uint8_t* sm, uint8_t* low) {
  const int64_t columns = spec.columns;
  if (spec.dtype == Type::kBfloat16) {
    const uint16_t* w = static_cast<const uint16_t*>(words) + row * columns;
    for (int64_t i = 0; i < columns; ++i) sm[i] = (w[i] >> 8 & 0x80) | (w[i] & 0x7F);
  } else if (spec.dtype == Type::kFloat) {
    const uint32_t* w = static_cast<const uint32_t*>(words) + row * columns;
    uint16_t* halves = reinterpret_cast<uint16_t*>(low);
    for (int64_t i = 0; i < columns; ++i) {
      sm[i] = (w[i] >> 24 & 0x80) | (w[i] >> 16 & 0x7F);
      halves[i] = static_cast<uint16_t>(w[i]);
    }
  } else {
    const uint16_t* w = static_cast<const uint16_t*>(words) + row * columns;
    std::memset(low, 0, spec.low_row_bytes());
    for (int64_t i = 0; i < columns; ++i) {
      sm[i] = (w[i] >> 8 & 0x80) | (w[i] >> 3 & 0x7F);
      const uint32_t bits = (w[i] & 7) << (3 * i % 8);
      low[3 * i / 8] |= static_cast<uint8_t>(bits);
      if (bits >> 8) low[3 * i / 8 + 1] |= static_cast<uint8_t>(bits >> 8);
    }
  }
}

void JoinRow(const Spec& spec, const uint8_t* exponents, const uint8_t* sm, const uint8_t* low,
             void* words, int64_t row) {
  const int64_t columns = spec.columns;
  if (spec.dtype == Type::kBfloat16) {
    uint16_t* w = static_cast<uint16_t*>(words) + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      w[i] = static_cast<uint16_t>((sm[i] & 0x80) << 8 | exponents[i] << 7 | (sm[i] & 0x7F));
    }
  } else if (spec.dtype == Type::kFloat) {
    uint32_t* w = static_cast<uint32_t*>(words) + row * columns;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(low);
    for (int64_t i = 0; i < columns; ++i) {
      w[i] = uint32_t{sm[i] & 0x80u} << 24 | uint32_t{exponents[i]} << 23 |
             uint32_t{sm[i] & 0x7Fu} << 16 | halves[i];
    }
  } else {
    uint16_t* w = static_cast<uint16_t*>(words) + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t at = 3 * i / 8;
      const uint32_t pair = low[at] | (3 * i % 8 > 5 ? low[at + 1] << 8 : 0);
      w[i] = static_cast<uint16_t>((sm[i] & 0x80) << 8 | (exponents[i] & 31) << 10 |
                                   (sm[i] & 0x7F) << 3 | (pair >> (3 * i % 8) & 7));
    }
  }
}

int64_t RowsPerTask(const Spec& spec) {
  return std::max<int64_t>(1, kChunk * kChunksPerTask / std::max<int64_t>(spec.columns, 1));
}

// The sign_mantissa and low planes: split from raw words, or shared with a coded source.
struct Planes {
  OwnedTensor sign_mantissa;
  std::vector<OwnedTensor> low;  // none or one
};

Planes MakePlanes(const Spec& spec, Layout from, const Tensor* tensors, size_t count, int threads) {
  Planes planes;
  const bool has_low = spec.dtype != Type::kBfloat16;
  if (from != Layout::kRaw) {
    planes.sign_mantissa = Share(tensors, 0);
    if (has_low) planes.low.push_back(Share(tensors, static_cast<int>(count) - 1));
    return planes;
  }
  planes.sign_mantissa = MakeTensor(Type::kUint8, {spec.rows, spec.columns}, 1);
  if (spec.dtype == Type::kFloat) {
    planes.low.push_back(MakeTensor(Type::kUint16, {spec.rows, spec.columns}, 2));
  } else if (has_low) {
    planes.low.push_back(MakeTensor(Type::kUint8, {spec.rows, spec.low_row_bytes()}, 1));
  }
  ParallelRanges(spec.rows, RowsPerTask(spec), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      SplitRow(spec, tensors[0].data, row, planes.sign_mantissa.memory.data() + row * spec.columns,
               has_low ? planes.low[0].memory.data() + row * spec.low_row_bytes() : nullptr);
    }
  });
  return planes;
}

std::vector<OwnedTensor> ToHuffman(const Spec& spec, const ExponentReader& reader, Planes planes,
                                   int threads) {
  const CodeLengths lengths = HuffmanLengths(CountAll(reader, spec.count(), threads));
  const HuffmanEncoder encoder(lengths);
  const int64_t chunks = (spec.count() + kChunk - 1) / kChunk;
  const int64_t tasks = (chunks + kChunksPerTask - 1) / kChunksPerTask;
  std::vector<std::vector<uint8_t>> parts(tasks);
  OwnedTensor offsets = MakeTensor(Type::kInt64, {chunks + 1}, 8);
  int64_t* sizes = reinterpret_cast<int64_t*>(offsets.memory.data());
  ParallelRanges(chunks, kChunksPerTask, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> exponents(kChunk);
    std::vector<uint8_t> buffer((end - begin) * HuffmanEncoder::Bound(kChunk));
    int64_t used = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t size = std::min(kChunk, spec.count() - chunk * kChunk);
      reader.Read(chunk * kChunk, size, exponents.data());
      sizes[chunk + 1] = encoder.Encode(exponents.data(), size, buffer.data() + used);
      used += sizes[chunk + 1];
    }
    parts[begin / kChunksPerTask].assign(buffer.begin(), buffer.begin() + used);
  });
  std::partial_sum(sizes, sizes + chunks + 1, sizes);
  std::vector<uint8_t> stream;
  stream.reserve(sizes[chunks]);
  for (std::vector<uint8_t>& part : parts) {
    stream.insert(stream.end(), part.begin(), part.end());
    part = {};
  }
  std::vector<OwnedTensor> out;
  out.push_back(std::move(planes.sign_mantissa));
  out.push_back(MakeTensor(std::vector<uint8_t>(lengths.begin(), lengths.end())));
  out.push_back(MakeTensor(std::move(stream)));
  out.push_back(std::move(offsets));
  for (OwnedTensor& low : planes.low) out.push_back(std::move(low));
  return out;
}

// Code of every exponent; exponents outside the table get the escape code.
std::array<uint8_t, 256> CodeOfExponent(const Histogram& histogram, Layout layout,
                                        const uint8_t* table) {
  const bool wide = layout == Layout::kRank4;
  std::array<uint8_t, 256> codes;
  codes.fill(wide ? kRank4Escape : kRank3Escape);
  for (int i = 0; i < (wide ? 15 : 7); ++i) {
    const int code = wide ? i : i + 1;
    if (histogram[table[code]] > 0) codes[table[code]] = static_cast<uint8_t>(code);
  }
  return codes;
}

void PackRow4(const uint8_t* __restrict codes, uint8_t* __restrict out, int64_t stride) {
  constexpr int64_t kHalf = kTile / 2;
  for (int64_t tile = 0; tile < stride; tile += kHalf, codes += kTile) {
    for (int64_t j = 0; j < kHalf; ++j) {
      out[tile + j] = static_cast<uint8_t>(codes[j] | codes[j + kHalf] << 4);
    }
  }
}

void PackRow3(const uint8_t* codes, uint8_t* out, int64_t stride) {
  for (int64_t i = 0; i < stride; i += 3, codes += 8) {
    uint32_t word = 0;
    for (int j = 0; j < 8; ++j) word |= uint32_t{codes[j]} << (3 * j);
    out[i] = static_cast<uint8_t>(word);
    out[i + 1] = static_cast<uint8_t>(word >> 8);
    out[i + 2] = static_cast<uint8_t>(word >> 16);
  }
}

// Codes of a block of rows, and the escapes in row-major order.
class RankWriter {
 public:
  RankWriter(const Spec& spec, Layout layout, const std::array<uint8_t, 256>& code_of)
      : spec_(spec),
        wide_(layout == Layout::kRank4),
        stride_(RankCodeStride(layout, spec.columns)),
        code_of_(code_of),
        padded_(wide_ ? stride_ * 2 : stride_ / 3 * 8, wide_ ? 0 : 1) {}

  // Returns the number of escapes of the row.
  int32_t Write(const uint8_t* exponents, uint8_t* out, std::vector<uint8_t>& escapes) {
    const uint8_t escape = wide_ ? kRank4Escape : kRank3Escape;
    uint8_t* const codes = padded_.data();
    const uint8_t* const code_of = code_of_.data();
    const int64_t columns = spec_.columns;
    for (int64_t i = 0; i < columns; ++i) codes[i] = code_of[exponents[i]];
    const size_t before = escapes.size();
    AppendEscapes(exponents, escape, escapes);
    wide_ ? PackRow4(padded_.data(), out, stride_) : PackRow3(padded_.data(), out, stride_);
    return static_cast<int32_t>(escapes.size() - before);
  }

 private:
  void AppendEscapes(const uint8_t* exponents, uint8_t escape, std::vector<uint8_t>& escapes) {
    const uint8_t* const codes = padded_.data();
    const int64_t columns = spec_.columns;
    for (int64_t begin = 0; begin < columns; begin += 32) {
      const int64_t end = std::min(begin + 32, columns);
      uint8_t any = 0;
      for (int64_t i = begin; i < end; ++i) any |= codes[i] == escape;
      if (!any) continue;
      for (int64_t i = begin; i < end; ++i) {
        if (codes[i] == escape) escapes.push_back(exponents[i]);
      }
    }
  }

  const Spec& spec_;
  bool wide_;
  int64_t stride_;
  const std::array<uint8_t, 256>& code_of_;
  std::vector<uint8_t> padded_;
};

std::vector<OwnedTensor> ToRank(const Spec& spec, const ExponentReader& reader, Planes planes,
                                Layout to, int threads) {
  const Histogram histogram = CountAll(reader, spec.count(), threads);
  OwnedTensor table = MakeTensor(Type::kUint8, {to == Layout::kRank4 ? 16 : 8}, 1);
  RankTable(histogram, to, table.memory.data());
  const std::array<uint8_t, 256> code_of = CodeOfExponent(histogram, to, table.memory.data());
  const int64_t stride = RankCodeStride(to, spec.columns);
  const int64_t grain = RowsPerTask(spec);
  OwnedTensor codes = MakeTensor(Type::kUint8, {spec.rows, stride}, 1);
  OwnedTensor row_escapes = MakeTensor(Type::kInt32, {spec.rows + 1}, 4);
  int32_t* counts = reinterpret_cast<int32_t*>(row_escapes.memory.data());
  std::vector<std::vector<uint8_t>> parts((spec.rows + grain - 1) / grain);
  ParallelRanges(spec.rows, grain, threads, [&](int64_t begin, int64_t end) {
    RankWriter writer(spec, to, code_of);
    std::vector<uint8_t> exponents((end - begin) * spec.columns);
    reader.Read(begin * spec.columns, (end - begin) * spec.columns, exponents.data());
    for (int64_t row = begin; row < end; ++row) {
      counts[row + 1] = writer.Write(exponents.data() + (row - begin) * spec.columns,
                                     codes.memory.data() + row * stride, parts[begin / grain]);
    }
  });
  int64_t total = 0;
  for (const std::vector<uint8_t>& part : parts) total += static_cast<int64_t>(part.size());
  if (total > std::numeric_limits<int32_t>::max()) {
    throw Error("the weight has too many rare exponents for a rank layout; use raw or huffman");
  }
  std::partial_sum(counts, counts + spec.rows + 1, counts);
  std::vector<uint8_t> escapes;
  escapes.reserve(total);
  for (const std::vector<uint8_t>& part : parts) {
    escapes.insert(escapes.end(), part.begin(), part.end());
  }
  std::vector<OwnedTensor> out;
  out.push_back(std::move(planes.sign_mantissa));
  out.push_back(std::move(codes));
  out.push_back(std::move(table));
  out.push_back(MakeTensor(std::move(escapes)));
  out.push_back(std::move(row_escapes));
  for (OwnedTensor& low : planes.low) out.push_back(std::move(low));
  return out;
}

}  // namespace

Histogram ExponentHistogram(const void* words, Type dtype, int64_t count, int threads) {
  CheckSpec({dtype, 1, count});
  return CountAll(WordReader(words, dtype), count, threads);
}

bool IsBf16(const uint32_t* words, int64_t count) {
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    uint32_t bits = 0;
    for (int64_t i = begin; i < end; ++i) bits |= words[i];
    if (bits & 0xFFFF) return false;
  }
  return true;
}

void RankTable(const Histogram& histogram, Layout layout, uint8_t* table) {
  std::array<int, 256> order;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return histogram[a] > histogram[b]; });
  const bool wide = layout == Layout::kRank4;
  std::memset(table, 0, wide ? 16 : 8);
  for (int i = 0; i < (wide ? 15 : 7); ++i) {
    if (histogram[order[i]] > 0) table[wide ? i : i + 1] = static_cast<uint8_t>(order[i]);
  }
}

std::vector<OwnedTensor> Transcode(const Spec& spec, Layout from, const Tensor* tensors,
                                   size_t count, Layout to, int threads) {
  if (spec.dtype == Type::kFloat16 && (to == Layout::kRank4 || to == Layout::kRank3)) {
    throw Error("float16 weights have no rank layout; use raw or huffman");
  }
  const std::unique_ptr<ExponentReader> reader = MakeReader(spec, from, tensors, count, threads);
  if (from == to) {
    std::vector<OwnedTensor> out;
    for (size_t i = 0; i < count; ++i) out.push_back(Share(tensors, static_cast<int>(i)));
    return out;
  }
  if (to == Layout::kRaw) {
    std::vector<OwnedTensor> out;
    out.push_back(
        MakeTensor(spec.dtype, {spec.rows, spec.columns}, spec.dtype == Type::kFloat ? 4 : 2));
    DecodeWords(spec, from, tensors, count, out[0].memory.data(), threads);
    return out;
  }
  Planes planes = MakePlanes(spec, from, tensors, count, threads);
  return to == Layout::kHuffman ? ToHuffman(spec, *reader, std::move(planes), threads)
                                : ToRank(spec, *reader, std::move(planes), to, threads);
}

void DecodeWords(const Spec& spec, Layout layout, const Tensor* tensors, size_t count, void* out,
                 int threads) {
  const std::unique_ptr<ExponentReader> reader = MakeReader(spec, layout, tensors, count, threads);
  if (spec.count() == 0) return;
  if (layout == Layout::kRaw) {
    std::memcpy(out, tensors[0].data, spec.count() * (spec.dtype == Type::kFloat ? 4 : 2));
    return;
  }
  const uint8_t* low = tensors[count - 1].as<uint8_t>();
  ParallelRanges(spec.rows, RowsPerTask(spec), threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> exponents((end - begin) * spec.columns);
    reader->Read(begin * spec.columns, (end - begin) * spec.columns, exponents.data());
    for (int64_t row = begin; row < end; ++row) {
      JoinRow(spec, exponents.data() + (row - begin) * spec.columns,
              tensors[0].as<uint8_t>() + row * spec.columns, low + row * spec.low_row_bytes(), out,
              row);
    }
  });
}

}  // namespace effc
