// What happens to new tokens before attention: rotation, and the check of their values.
#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "cpu/cached_attention.h"

namespace effc {
namespace {

constexpr int64_t kTaskFloats = 1 << 14;

// Index of the first number that is NaN or infinite, or -1.
int64_t FirstNotFinite(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu);
  }
  if (largest < 0x7F800000u) return -1;
  for (int64_t i = 0; i < n; ++i) {
    if ((std::bit_cast<uint32_t>(x[i]) & 0x7F800000u) == 0x7F800000u) return i;
  }
  return -1;
}

void RefuseNotFinite(const char* what, const float* x, int64_t heads, int64_t size, int64_t row,
                     int64_t token) {
  const int64_t at = FirstNotFinite(x, heads * size);
  if (at < 0) return;
  throw Error(std::string(what) + " of row " + std::to_string(row) + ", head " +
              std::to_string(at / size) + ", token " + std::to_string(token) + " is " +
              (x[at] != x[at] ? "NaN" : "infinite") +
              "; a cache keeps finite numbers only, so look for the node that made it");
}

}  // namespace

float* ThreadFloats(ThreadBuffer use, int64_t floats) {
  thread_local std::vector<float> buffers[kThreadBuffers];
  std::vector<float>& buffer = buffers[use];
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(floats);
  return buffer.data();
}

void RotateRow(const AttentionForm& form, const float* cosine, const float* sine, float* x) {
  const int64_t half = form.rotary_size / 2;
  const bool halves = form.rotary == Rotary::kHalf;
  for (int64_t j = 0; j < half; ++j) {
    float& first = halves ? x[j] : x[2 * j];
    float& second = halves ? x[j + half] : x[2 * j + 1];
    const float a = first;
    const float b = second;
    first = a * cosine[j] - b * sine[j];
    second = b * cosine[j] + a * sine[j];
  }
}

NewTokens::NewTokens(const AttentionForm& form, const AttentionOperands& operands,
                     const ParallelFunction& parallel)
    : form_(form), operands_(operands) {
  FindStarts();
  const int64_t tokens = operands.batch * operands.seq;
  const int64_t heads = form.heads + form.kv_heads;
  queries_.resize(tokens * form.heads * PaddedRow(form.head_size));
  keys_.resize(tokens * form.kv_heads * form.head_size);
  const int64_t grain = std::max<int64_t>(1, kTaskFloats / (heads * form.head_size));
  parallel(tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) PrepareToken(t / operands.seq, t % operands.seq);
  });
}

void NewTokens::FindStarts() {
  starts_.resize(operands_.batch);
  for (int64_t row = 0; row < operands_.batch; ++row) {
    const uint8_t* const valid = operands_.valid + row * operands_.total;
    starts_[row] =
        std::find_if(valid, valid + operands_.total, [](uint8_t v) { return v != 0; }) - valid;
  }
}

void NewTokens::PrepareToken(int64_t row, int64_t i) {
  const int64_t d = form_.head_size;
  const int64_t padded = PaddedRow(d);
  const int64_t token = row * operands_.seq + i;
  const float* const key = operands_.key + token * form_.kv_heads * d;
  const float* const value = operands_.value + token * form_.kv_heads * form_.value_size;
  RefuseNotFinite("value", value, form_.kv_heads, form_.value_size, row, i);
  RefuseNotFinite("key", key, form_.kv_heads, d, row, i);
  for (int64_t head = 0; head < form_.kv_heads; ++head) {
    const int64_t at = (row * form_.kv_heads + head) * operands_.seq + i;
    float* const k = keys_.data() + at * d;
    std::memcpy(k, key + head * d, d * sizeof(float));
    Rotate(k, row, i);
    RefuseNotFinite("rotated key", k, 1, d, row, i);
    for (int64_t g = 0; g < form_.group(); ++g) {
      float* const q = queries_.data() + (at * form_.group() + g) * padded;
      const int64_t h = head * form_.group() + g;
      std::memcpy(q, operands_.query + (token * form_.heads + h) * d, d * sizeof(float));
      Rotate(q, row, i);
      std::fill(q + d, q + padded, 0.0f);
    }
  }
}

void NewTokens::Rotate(float* x, int64_t row, int64_t i) const {
  if (form_.rotary == Rotary::kNone) return;
  const int64_t half = form_.rotary_size / 2;
  const int64_t at = ((operands_.angle_batch == 1 ? 0 : row) * operands_.seq + i) * half;
  RotateRow(form_, operands_.cosine + at, operands_.sine + at, x);
}

}  // namespace effc
