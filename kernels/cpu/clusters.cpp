#include "cpu/clusters.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

namespace effc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Adds [begin, end) behind runs that end at `begin` or before.
void Append(std::vector<SlotRun>& runs, int64_t begin, int64_t end) {
  if (begin == end) return;
  if (!runs.empty() && runs.back().end == begin) {
    runs.back().end = end;
  } else {
    runs.push_back({begin, end});
  }
}

// Throws Error unless ends rise from 0 or more to `last` or less; the largest of them.
int64_t CheckEnds(const char* name, const int32_t* ends, int64_t count, int64_t last) {
  int64_t before = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ends[i] < before || ends[i] > last) {
      throw Error(std::string(name) + " of cluster " + std::to_string(i) + " is " +
                  std::to_string(ends[i]) + ", it must be from " + std::to_string(before) + " to " +
                  std::to_string(last) + "; is the cache that of the prefix?");
    }
    before = ends[i];
  }
  return before;
}

// The clusters of one key head.
struct HeadClusters {
  HeadClusters(const AttentionForm& form, const TokenClusters& all, int64_t head)
      : centroids(Rows(form, all, all.centroids, head * all.count)),
        ends(all.ends + head * all.count),
        radii(all.radii + head * all.count),
        count(all.count),
        parents(Rows(form, all, all.parents, head * all.parent_count)),
        parent_ends(all.parent_ends + head * all.parent_count),
        parent_radii(all.parent_radii + head * all.parent_count),
        parent_count(all.parent_count) {}

  int64_t Begin(int64_t cluster) const { return cluster == 0 ? 0 : ends[cluster - 1]; }
  int64_t ParentBegin(int64_t parent) const { return parent == 0 ? 0 : parent_ends[parent - 1]; }
  static TokenRows Rows(const AttentionForm& form, const TokenClusters& all, const char* from,
                        int64_t row) {
    return {from + row * form.head_size * ElementBytes(all.type), all.type, form.head_size};
  }

  TokenRows centroids;
  const int32_t* ends;
  const float* radii;
  int64_t count;
  TokenRows parents;
  const int32_t* parent_ends;
  const float* parent_radii;
  int64_t parent_count;
};

// The keys of clusters: how many there are, and how far beyond their mean they are taken to reach.
struct Spans {
  void Add(int64_t keys, float radius) {
    counts.push_back(static_cast<float>(keys));
    radii.push_back(radius);
  }

  std::vector<float> counts;
  std::vector<float> radii;
};

// What a key of a cluster may expect of the softmax, from centroids and radii (after Squeezed
// Attention): exp(s_j) / sum of n_i exp(s_i), the mean over the query heads of a group.
class KeyWeights {
 public:
  KeyWeights(const AttentionKernels& pieces, const AttentionForm& form, const float* queries)
      : pieces_(pieces), form_(form), queries_(queries) {
    for (int64_t g = 0; g < form.group(); ++g) {
      const float* const query = queries + g * PaddedRow(form.head_size);
      norms_.push_back(std::sqrt(std::inner_product(query, query + form.head_size, query, 0.0f)));
    }
  }

  // Of the rows of `centroids` in `runs`, which have the keys of `spans`.
  std::vector<float> Of(const TokenRows& centroids, const std::vector<SlotRun>& runs,
                        const Spans& spans) const {
    const auto total = static_cast<int64_t>(spans.counts.size());
    const int64_t blocks = (total + kBlockTokens - 1) / kBlockTokens;
    const int64_t group = form_.group();
    std::vector<float> weights(group * total);  // exp(score - maximum of the block)
    std::vector<float> maxima(group * blocks);
    std::vector<float> sums(group * blocks);
    Place place;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * kBlockTokens;
      const int64_t count = std::min(kBlockTokens, total - at);
      const float* const scores =
          Absorb(centroids, runs, place, spans, {at, at + count}, &maxima[b], blocks);
      for (int64_t g = 0; g < group; ++g) {
        const float* const row = scores + g * kScoreStride;
        std::memcpy(&weights[g * total + at], row, count * sizeof(float));
        float sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += row[i] * spans.counts[at + i];
        sums[g * blocks + b] = sum;
      }
    }
    return Mean(weights, maxima, sums, total, blocks);
  }

 private:
  struct Place {
    size_t run = 0;
    int64_t offset = 0;
  };

  // The next rows of the runs, `which` of the spans, as weights, 0 where they have no keys; maxima
  // of the group are `stride` apart.
  const float* Absorb(const TokenRows& centroids, const std::vector<SlotRun>& runs, Place& place,
                      const Spans& spans, SlotRun which, float* maxima, int64_t stride) const {
    const int64_t count = which.end - which.begin;
    const int64_t group = form_.group();
    float* const scores = Scores(centroids, runs, place, count);
    const float* const radii = &spans.radii[which.begin];
    for (int64_t g = 0; g < group; ++g) {
      float* const row = scores + g * kScoreStride;
      for (int64_t i = 0; i < count; ++i) row[i] += norms_[g] * radii[i];
    }
    std::vector<QueryRow> rows(group, {-kInfinity, 0, 0, count, nullptr});
    std::array<uint8_t, kBlockTokens> filled;
    std::transform(&spans.counts[which.begin], &spans.counts[which.begin] + count, filled.begin(),
                   [](float n) { return n > 0; });
    const bool all = std::memchr(filled.data(), 0, count) == nullptr;
    const SlotBlock block{0, count, all ? nullptr : filled.data(), form_.scale, form_.softcap};
    pieces_.absorb(rows.data(), group, block, scores, kScoreStride, nullptr, 0, 0);
    for (int64_t g = 0; g < group; ++g) maxima[g * stride] = rows[g].max;
    return scores;
  }

  // Products of the queries with the next `count` rows of the runs.
  float* Scores(const TokenRows& centroids, const std::vector<SlotRun>& runs, Place& place,
                int64_t count) const {
    const int64_t d = form_.head_size;
    const int64_t group = form_.group();
    float* const scores = ThreadFloats(kScores, group * kScoreStride);
    for (int64_t done = 0; done < count;) {
      const SlotRun& run = runs[place.run];
      const int64_t from = run.begin + place.offset;
      const int64_t part = std::min(run.end - from, count - done);
      const char* const rows = static_cast<const char*>(centroids.data);
      const TokenRows these = {rows + from * d * ElementBytes(centroids.type), centroids.type, d};
      pieces_.scores(queries_, PaddedRow(d), group, these, part, d, scores + done, kScoreStride, 0);
      done += part;
      place.offset += part;
      if (run.begin + place.offset == run.end) place = {place.run + 1, 0};
    }
    return scores;
  }

  std::vector<float> Mean(const std::vector<float>& weights, const std::vector<float>& maxima,
                          const std::vector<float>& sums, int64_t total, int64_t blocks) const {
    const int64_t group = form_.group();
    std::vector<float> mean(total);
    for (int64_t g = 0; g < group; ++g) {
      const float* const top = &maxima[g * blocks];
      const float most = *std::max_element(top, top + blocks);
      if (most == -kInfinity) continue;  // no keys at all
      double all = 0;
      for (int64_t b = 0; b < blocks; ++b) all += std::exp(top[b] - most) * sums[g * blocks + b];
      for (int64_t b = 0; b < blocks; ++b) {
        const auto factor = static_cast<float>(std::exp(top[b] - most) / (all * group));
        const int64_t end = std::min(total, (b + 1) * kBlockTokens);
        for (int64_t i = b * kBlockTokens; i < end; ++i) mean[i] += weights[g * total + i] * factor;
      }
    }
    return mean;
  }

  const AttentionKernels& pieces_;
  const AttentionForm& form_;
  const float* const queries_;
  std::vector<float> norms_;  // of the queries
};

// Clusters whose parents pass the first threshold, which all do if it is below every weight.
std::vector<SlotRun> Surviving(const HeadClusters& of, const KeyWeights& weights, float threshold) {
  if (threshold < 0) return {{0, of.count}};
  Spans spans;
  for (int64_t i = 0; i < of.parent_count; ++i) {
    spans.Add(of.Begin(of.parent_ends[i]) - of.Begin(of.ParentBegin(i)), of.parent_radii[i]);
  }
  const std::vector<float> means = weights.Of(of.parents, {{0, of.parent_count}}, spans);
  std::vector<SlotRun> runs;
  for (int64_t i = 0; i < of.parent_count; ++i) {
    if (means[i] > threshold) Append(runs, of.ParentBegin(i), of.parent_ends[i]);
  }
  return runs;
}

// Slots of the clusters in `among` that pass the second threshold.
void Read(const HeadClusters& of, const KeyWeights& weights, const std::vector<SlotRun>& among,
          float threshold, std::vector<SlotRun>& slots) {
  Spans spans;
  for (const SlotRun& run : among) {
    for (int64_t j = run.begin; j < run.end; ++j) spans.Add(of.ends[j] - of.Begin(j), of.radii[j]);
  }
  if (spans.counts.empty()) return;
  const std::vector<float> means = weights.Of(of.centroids, among, spans);
  size_t at = 0;
  for (const SlotRun& run : among) {
    for (int64_t j = run.begin; j < run.end; ++j) {
      if (means[at++] > threshold) Append(slots, of.Begin(j), of.ends[j]);
    }
  }
}

}  // namespace

void CheckClusters(const AttentionForm& form, const AttentionOperands& operands) {
  const TokenClusters& clusters = operands.clusters;
  int64_t tokens = 0;
  for (int64_t head = 0; head < form.kv_heads; ++head) {
    const HeadClusters of(form, clusters, head);
    tokens = std::max(tokens, CheckEnds("end", of.ends, of.count, operands.past()));
    if (CheckEnds("end of parents", of.parent_ends, of.parent_count, of.count) != of.count) {
      throw Error("the parents of head " + std::to_string(head) + " have not all clusters");
    }
  }
  for (int64_t row = 0; row < operands.batch && tokens > 0; ++row) {
    if (std::memchr(operands.valid + row * operands.total, 0, tokens) == nullptr) continue;
    throw Error("row " + std::to_string(row) + " hides a token of the prefix; clusters have no " +
                "order of tokens, so a prefix takes no padding");
  }
}

ChosenSlots ChooseClusters(const Kernels& kernels, const AttentionForm& form,
                           const AttentionOperands& operands, const NewTokens& tokens,
                           const ParallelFunction& parallel) {
  const TokenClusters& clusters = operands.clusters;
  if (operands.seq != 1 || clusters.count == 0) return {};
  ChosenSlots chosen(operands.batch, form.kv_heads);
  parallel(operands.batch * form.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t head = at % form.kv_heads;
      const HeadClusters of(form, clusters, head);
      const KeyWeights weights(*kernels.attention, form, tokens.Query(at / form.kv_heads, head, 0));
      std::vector<SlotRun>& slots = chosen.Runs(at / form.kv_heads, head);
      Read(of, weights, Surviving(of, weights, clusters.thresholds[0]), clusters.thresholds[1],
           slots);
      Append(slots, of.Begin(of.count), operands.total);
    }
  });
  return chosen;
}

}  // namespace effc
