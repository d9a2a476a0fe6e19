// The plain C interface, used from Python through ctypes. Functions return a negative number or
// null on failure; effc_last_error then gives the message of the calling thread.
#include <cstring>
#include <string>

#include "cpu/bandwidth.h"
#include "cpu/codec.h"
#include "cpu/isa.h"
#include "cpu/page.h"
#include "cpu/page_cache.h"
#include "cpu/parallel.h"
#include "cpu/read_log.h"
#include "cpu/weight.h"
#include "ort/shared_weight.h"

#define EFFC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using effc::Layout;
using effc::Spec;
using effc::Tensor;
using effc::Type;

thread_local std::string last_error;

template <class Result, class Fn>
Result Guard(Result failure, Fn&& fn) {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return failure;
}

Spec MakeSpec(int32_t dtype, int64_t rows, int64_t columns) {
  const Spec spec{static_cast<Type>(dtype), rows, columns};
  effc::CheckSpec(spec);
  return spec;
}

Layout MakeLayout(int32_t layout) {
  if (layout < 0 || layout > 3) throw effc::Error("unknown layout number");
  return static_cast<Layout>(layout);
}

}  // namespace

EFFC_EXPORT int32_t effc_abi_version() { return 2; }

EFFC_EXPORT const char* effc_last_error() { return last_error.c_str(); }

// Available instruction sets, best first, separated by commas.
EFFC_EXPORT const char* effc_isa_list() {
  static const std::string names = [] {
    std::string text;
    for (const effc::Kernels* kernels : effc::AvailableKernels()) {
      text += std::string(text.empty() ? "" : ",") + kernels->name;
    }
    return text;
  }();
  return names.c_str();
}

EFFC_EXPORT const char* effc_isa() {
  return Guard<const char*>(nullptr, [] { return effc::ActiveKernels().name; });
}

EFFC_EXPORT int32_t effc_select_isa(const char* name) {
  return Guard(-1, [&] {
    effc::SelectIsa(name);
    return 0;
  });
}

EFFC_EXPORT int32_t effc_histogram(const void* words, int32_t dtype, int64_t count, int32_t threads,
                                   uint64_t* out) {
  return Guard(-1, [&] {
    const effc::Histogram histogram =
        effc::ExponentHistogram(words, static_cast<Type>(dtype), count, threads);
    std::memcpy(out, histogram.data(), sizeof(histogram));
    return 0;
  });
}

EFFC_EXPORT int32_t effc_is_bf16(const uint32_t* words, int64_t count) {
  return effc::IsBf16(words, count);
}

EFFC_EXPORT int32_t effc_huffman_lengths(const uint64_t* histogram, uint8_t* out) {
  return Guard(-1, [&] {
    effc::Histogram counts;
    std::memcpy(counts.data(), histogram, sizeof(counts));
    const effc::CodeLengths lengths = effc::HuffmanLengths(counts);
    std::memcpy(out, lengths.data(), lengths.size());
    return 0;
  });
}

// Fills `out` (room for 6) and `shared` (index of the input tensor, or -1). Returns the number of
// tensors and an owner of their memory for effc_release_tensors.
EFFC_EXPORT int32_t effc_transcode(int32_t dtype, int64_t rows, int64_t columns, int32_t from,
                                   const Tensor* tensors, size_t count, int32_t to, int32_t threads,
                                   Tensor* out, int32_t* shared, void** owner) {
  return Guard(-1, [&] {
    auto result = std::make_unique<std::vector<effc::OwnedTensor>>(effc::Transcode(
        MakeSpec(dtype, rows, columns), MakeLayout(from), tensors, count, MakeLayout(to), threads));
    for (size_t i = 0; i < result->size(); ++i) {
      out[i] = (*result)[i].view;
      shared[i] = (*result)[i].shared;
    }
    const int32_t made = static_cast<int32_t>(result->size());
    *owner = result.release();
    return made;
  });
}

EFFC_EXPORT void effc_release_tensors(void* owner) {
  delete static_cast<std::vector<effc::OwnedTensor>*>(owner);
}

EFFC_EXPORT int32_t effc_decode(int32_t dtype, int64_t rows, int64_t columns, int32_t layout,
                                const Tensor* tensors, size_t count, void* out, int32_t threads) {
  return Guard(-1, [&] {
    effc::DecodeWords(MakeSpec(dtype, rows, columns), MakeLayout(layout), tensors, count, out,
                      threads);
    return 0;
  });
}

// A weight ready for effc_product and effc_widen; its tensors must outlive it.
EFFC_EXPORT void* effc_open_weight(int32_t dtype, int64_t rows, int64_t columns, int32_t layout,
                                   const Tensor* tensors, size_t count, int32_t threads) {
  return Guard<void*>(nullptr, [&] {
    return effc::OpenWeight(MakeSpec(dtype, rows, columns), MakeLayout(layout), tensors, count,
                            threads)
        .release();
  });
}

EFFC_EXPORT void effc_close_weight(void* weight) {
  delete static_cast<effc::RuntimeWeight*>(weight);
}

// y[m, rows] = x[m, columns] times the transposed weight.
EFFC_EXPORT int32_t effc_product(const void* weight, const float* x, int64_t m, float* y,
                                 int32_t threads) {
  return Guard(-1, [&] {
    const effc::WeightView& view = static_cast<const effc::RuntimeWeight*>(weight)->view;
    const effc::Kernels& kernels = effc::ActiveKernels();
    const int64_t stride = effc::PaddedColumns(view.columns);
    std::vector<float> permuted(m * stride);
    effc::PermuteX(x, m, view.columns, kernels.lanes, permuted.data());
    const int64_t grain = std::max<int64_t>(1, (view.rows + threads - 1) / std::max(threads, 1));
    effc::ParallelRanges(view.rows, grain, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(effc::ScratchFloats(view.columns, m));
      kernels.product(view, permuted.data(), stride, m, begin, end, y, view.rows, scratch.data());
    });
    return 0;
  });
}

// Rows [begin, end) as fp32.
EFFC_EXPORT int32_t effc_widen(const void* weight, int64_t begin, int64_t end, float* out) {
  return Guard(-1, [&] {
    const effc::WeightView& view = static_cast<const effc::RuntimeWeight*>(weight)->view;
    if (begin < 0 || begin > end || end > view.rows) throw effc::Error("rows out of range");
    effc::ActiveKernels().widen(view, begin, end, out, view.columns);
    return 0;
  });
}

// Bytes per second of the best of `rounds` threaded reads; negative on failure.
EFFC_EXPORT double effc_read_bandwidth(int64_t bytes, int32_t threads, int32_t rounds) {
  return Guard(-1.0, [&] { return effc::ReadBandwidth(bytes, threads, rounds); });
}

// Weights held by kernels of open onnxruntime sessions; tied nodes count once.
EFFC_EXPORT int64_t effc_live_weights() {
  return Guard(int64_t{-1}, [] { return effc::ort::LiveWeights(); });
}

// Tokens that caches of all sessions coded into pages, each for every row and key head.
EFFC_EXPORT int64_t effc_quantized_tokens() { return effc::QuantizedTokens(); }

// Bytes of a page; negative if the spec has none.
EFFC_EXPORT int64_t effc_page_bytes(const effc::PageSpec* spec) {
  return Guard(int64_t{-1}, [&] { return effc::PageLayout(*spec).bytes; });
}

// Encodes `count` pages of keys [count][page][D] and values [count][page][E].
EFFC_EXPORT int32_t effc_encode_pages(const effc::PageSpec* spec, int64_t count, const float* keys,
                                      const float* values, const uint8_t* valid,
                                      const float* importance, const float* query_max,
                                      uint8_t* pages) {
  return Guard(-1, [&] {
    const effc::PageLayout layout(*spec);
    const int64_t page = spec->page;
    std::vector<const float*> key_rows(page);
    std::vector<const float*> value_rows(page);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = 0; i < page; ++i) {
        key_rows[i] = keys + (p * page + i) * spec->head_size;
        value_rows[i] = values + (p * page + i) * spec->value_size;
      }
      const int64_t bad = effc::EncodePage(effc::ActiveKernels(), layout, key_rows.data(),
                                           value_rows.data(), valid + p * page,
                                           importance == nullptr ? nullptr : importance + p * page,
                                           query_max, pages + p * layout.bytes);
      if (bad < 0) continue;
      throw effc::Error("token " + std::to_string(p * page + bad) +
                        " has a key or value that is not finite");
    }
    return 0;
  });
}

// Rows of `count` pages in stored order.
EFFC_EXPORT int32_t effc_decode_pages(const effc::PageSpec* spec, int64_t count,
                                      const uint8_t* pages, float* keys, float* values) {
  return Guard(-1, [&] {
    const effc::PageLayout layout(*spec);
    for (int64_t p = 0; p < count; ++p) {
      effc::DecodePage(effc::ActiveKernels(), layout, pages + p * layout.bytes,
                       keys + p * spec->page * spec->head_size,
                       values + p * spec->page * spec->value_size);
    }
    return 0;
  });
}

// scores[g][count * page] of queries [g][D].
EFFC_EXPORT int32_t effc_page_scores(const effc::PageSpec* spec, int64_t count,
                                     const uint8_t* pages, const float* queries, int64_t g,
                                     float* scores) {
  return Guard(-1, [&] {
    const effc::PageLayout layout(*spec);
    std::vector<float> scratch(effc::PageScratchFloats(layout, g));
    for (int64_t p = 0; p < count; ++p) {
      effc::PageScores(effc::ActiveKernels(), layout, pages + p * layout.bytes, queries, g,
                       scores + p * spec->page, count * spec->page, scratch.data());
    }
    return 0;
  });
}

// out[g][E] grows by the values that probabilities [g][count * page] weigh.
EFFC_EXPORT int32_t effc_page_values(const effc::PageSpec* spec, int64_t count,
                                     const uint8_t* pages, const float* probabilities, int64_t g,
                                     float* out) {
  return Guard(-1, [&] {
    const effc::PageLayout layout(*spec);
    std::vector<float> scratch(effc::PageScratchFloats(layout, g));
    for (int64_t p = 0; p < count; ++p) {
      effc::PageValues(effc::ActiveKernels(), layout, pages + p * layout.bytes,
                       probabilities + p * spec->page, count * spec->page, g, out, scratch.data());
    }
    return 0;
  });
}

// out[g][E] of attention without softmax: scores of a page are the weights of its values.
EFFC_EXPORT int32_t effc_page_linear_attention(const effc::PageSpec* spec, int64_t count,
                                               const uint8_t* pages, const float* queries,
                                               int64_t g, float* out) {
  return Guard(-1, [&] {
    const effc::PageLayout layout(*spec);
    const effc::Kernels& kernels = effc::ActiveKernels();
    std::vector<float> scratch(effc::PageScratchFloats(layout, g));
    std::vector<float> scores(g * spec->page);
    std::fill_n(out, g * spec->value_size, 0.0f);
    for (int64_t p = 0; p < count; ++p, pages += layout.bytes) {
      effc::PageScores(kernels, layout, pages, queries, g, scores.data(), spec->page,
                       scratch.data());
      effc::PageValues(kernels, layout, pages, scores.data(), spec->page, g, out, scratch.data());
    }
    return 0;
  });
}

// Starts a log of what steps of one token read, or stops it.
EFFC_EXPORT void effc_log_reads(int32_t on) { effc::LogReads(on != 0); }

// The logged reads: for each its row, key head, tokens, number of runs, and their begins and ends.
// Writes them when they fit `capacity` numbers; returns how many they are.
EFFC_EXPORT int64_t effc_logged_reads(int64_t* out, int64_t capacity) {
  return Guard<int64_t>(-1, [&] {
    std::vector<int64_t> numbers;
    for (const effc::LoggedRead& read : effc::LoggedReads()) {
      const auto runs = static_cast<int64_t>(read.runs.size());
      numbers.insert(numbers.end(), {read.row, read.head, read.tokens, runs});
      for (const effc::SlotRun& run : read.runs) {
        numbers.insert(numbers.end(), {run.begin, run.end});
      }
    }
    const auto count = static_cast<int64_t>(numbers.size());
    if (count <= capacity) std::copy(numbers.begin(), numbers.end(), out);
    return count;
  });
}

// Names of the nodes of the logged reads, each ended by a newline.
EFFC_EXPORT const char* effc_logged_nodes() {
  thread_local std::string names;
  return Guard<const char*>(nullptr, [&] {
    names.clear();
    for (const effc::LoggedRead& read : effc::LoggedReads()) names += read.node + "\n";
    return names.c_str();
  });
}
