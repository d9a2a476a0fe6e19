#include "ort/cached_attention.h"

#include <string>

#include "cpu/read_log.h"

namespace effc::ort {
namespace {

enum Operand : size_t { kQuery, kKey, kValue, kValid, kBias, kCos, kSin };
constexpr size_t kClusterInputs = 7;
constexpr size_t kLowRankInputs = 6;
constexpr const char* kNames[] = {"query", "key", "value", "valid", "bias", "cos", "sin"};

const char* TypeName(Type type) {
  switch (static_cast<int32_t>(type)) {
    case kFloat:
      return "float32";
    case 2:
      return "uint8";
    case kInt32:
      return "int32";
    case kBool:
      return "bool";
    case 10:
      return "float16";
    case 16:
      return "bfloat16";
    default:
      return "another type";
  }
}

[[noreturn]] void RefuseShape(const std::string& name, const std::vector<int64_t>& dims,
                              const std::string& wanted) {
  throw Error(name + " has shape " + ShapeText(dims) + ", but must be " + wanted);
}

bool Fits(const std::vector<int64_t>& dims, const std::vector<int64_t>& wanted) {
  if (dims.size() != wanted.size()) return false;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (wanted[i] >= 0 && dims[i] != wanted[i]) return false;
  }
  return true;
}

std::string WantedText(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i > 0) text += ",";
    text += dims[i] < 0 ? std::string("any") : std::to_string(dims[i]);
  }
  return text + "]";
}

}  // namespace

CachedAttentionKernel::CachedAttentionKernel(OrtApi* table, const OrtKernelInfo* info)
    : NodeKernel(table, info, kName), kernels_(nullptr) {
  try {
    kernels_ = &ActiveKernels();
    const NodeAttributes attributes(api_, info);
    form_ = ReadForm(attributes);
    storage_ = ReadStorage(attributes, form_);
    size_t count = 0;
    Check(api_.KernelInfoGetInputCount(info, &count));
    const size_t tensors = storage_->Tensors(-1).size();
    const size_t needed = kFirstPast + tensors + (storage_->far_positions() != 0 ? 2 : 0) +
                          (storage_->reads_scores() ? 1 : 0) +
                          (storage_->has_clusters() ? kClusterInputs : 0) +
                          (storage_->low_rank_chunk() > 0 ? kLowRankInputs : 0);
    if (count != needed) {
      throw Error("it has " + std::to_string(count) + " inputs; this storage needs " +
                  std::to_string(needed) + ", " + std::to_string(tensors) +
                  " of them the cache (absent optional inputs count)");
    }
  } catch (const Error& error) {
    throw Error(where_ + error.what());
  }
}

CachedAttentionKernel::Input CachedAttentionKernel::Operand(const OrtKernelContext* context,
                                                            size_t index, Type type) const {
  Input input;
  input.tensor = OptionalInput(context, index, &input.dims);
  if (input.tensor.data == nullptr && input.dims.empty() && input.tensor.rank == 0) return input;
  if (input.tensor.type != type) {
    throw Error(std::string(kNames[index]) + " is " + TypeName(input.tensor.type) +
                ", but must be " + TypeName(type));
  }
  return input;
}

const float* CachedAttentionKernel::Required(const OrtKernelContext* context, size_t index,
                                             const std::vector<int64_t>& wanted) const {
  const Input input = Operand(context, index, Type::kFloat);
  if (!Fits(input.dims, wanted)) RefuseShape(kNames[index], input.dims, WantedText(wanted));
  return input.tensor.as<float>();
}

AttentionOperands CachedAttentionKernel::ReadOperands(const OrtKernelContext* context) const {
  AttentionOperands operands;
  const Input query = Operand(context, kQuery, Type::kFloat);
  const int64_t width = form_.heads * form_.head_size;
  if (!Fits(query.dims, {-1, -1, width})) {
    RefuseShape("query", query.dims, WantedText({-1, -1, width}));
  }
  operands.batch = query.dims[0];
  operands.seq = query.dims[1];
  operands.query = query.tensor.as<float>();
  const int64_t keys = form_.kv_heads * form_.head_size;
  const int64_t values = form_.kv_heads * form_.value_size;
  operands.key = Required(context, kKey, {operands.batch, operands.seq, keys});
  operands.value = Required(context, kValue, {operands.batch, operands.seq, values});
  const Input valid = Operand(context, kValid, static_cast<Type>(kBool));
  if (!Fits(valid.dims, {operands.batch, -1})) {
    RefuseShape("valid", valid.dims, WantedText({operands.batch, -1}));
  }
  operands.total = valid.dims[1];
  operands.valid = valid.tensor.as<uint8_t>();
  if (operands.total < operands.seq) {
    throw Error("valid counts " + std::to_string(operands.total) +
                " tokens in all, fewer than the " + std::to_string(operands.seq) +
                " new ones of query");
  }
  ReadBias(context, operands);
  ReadAngles(context, operands);
  ReadFarAngles(context, operands);
  ReadScores(context, operands);
  ReadClusters(context, operands);
  ReadLowRank(context, operands);
  return operands;
}

void CachedAttentionKernel::ReadBias(const OrtKernelContext* context,
                                     AttentionOperands& operands) const {
  const Input bias = Operand(context, kBias, Type::kFloat);
  if (bias.dims.empty()) return;
  const std::vector<int64_t>& dims = bias.dims;
  if (!Fits(dims, {-1, -1, operands.seq, operands.total}) ||
      (dims[0] != 1 && dims[0] != operands.batch) || (dims[1] != 1 && dims[1] != form_.heads)) {
    RefuseShape("bias", dims,
                "[1 or batch,1 or heads,seq,total] with batch " + std::to_string(operands.batch) +
                    ", heads " + std::to_string(form_.heads) + ", seq " +
                    std::to_string(operands.seq) + ", total " + std::to_string(operands.total));
  }
  operands.bias = bias.tensor.as<float>();
  operands.bias_batch = dims[0];
  operands.bias_heads = dims[1];
}

void CachedAttentionKernel::ReadAngles(const OrtKernelContext* context,
                                       AttentionOperands& operands) const {
  const Input inputs[] = {Operand(context, kCos, Type::kFloat),
                          Operand(context, kSin, Type::kFloat)};
  const bool rotates = form_.rotary != Rotary::kNone && !storage_->turns_by_place();
  const int64_t half = form_.rotary_size / 2;
  for (size_t i = 0; i < 2; ++i) {
    const std::vector<int64_t>& dims = inputs[i].dims;
    if (!rotates && !dims.empty())
      throw Error("cos and sin are given, but nothing is rotated by them");
    if (!rotates) continue;
    if (!Fits(dims, {-1, operands.seq, half}) || (dims[0] != 1 && dims[0] != operands.batch) ||
        dims[0] != inputs[0].dims[0]) {
      RefuseShape(kNames[kCos + i], dims,
                  "[1 or batch,seq,rotary_size / 2] with batch " + std::to_string(operands.batch) +
                      ", seq " + std::to_string(operands.seq) + ", rotary_size / 2 " +
                      std::to_string(half) + ", cos and sin alike");
    }
  }
  if (!rotates) return;
  operands.angle_batch = inputs[0].dims[0];
  operands.cosine = inputs[0].tensor.as<float>();
  operands.sine = inputs[1].tensor.as<float>();
}

void CachedAttentionKernel::ReadFarAngles(const OrtKernelContext* context,
                                          AttentionOperands& operands) const {
  const int64_t positions = storage_->far_positions();
  if (positions == 0) return;
  const size_t first = kFirstPast + storage_->Tensors(-1).size();
  const int64_t half = form_.rotary_size / 2;
  const float* angles[2];
  for (size_t i = 0; i < 2; ++i) {
    std::vector<int64_t> dims;
    const Tensor tensor = NodeKernel::Input(context, first + i, &dims);
    const char* const name = i == 0 ? "far cos" : "far sin";
    if (tensor.type != Type::kFloat) {
      throw Error(std::string(name) + " is " + TypeName(tensor.type) + ", but must be float32");
    }
    if (!Fits(dims, {-1, positions, half}) || (dims[0] != 1 && dims[0] != operands.batch) ||
        (i == 1 && (dims[0] != operands.far_batch || dims[1] != operands.far_positions))) {
      RefuseShape(name, dims,
                  "[1 or batch," + (positions < 0 ? "any" : std::to_string(positions)) +
                      ",rotary_size / 2], cos and sin alike");
    }
    operands.far_batch = dims[0];
    operands.far_positions = dims[1];
    angles[i] = tensor.as<float>();
  }
  operands.far_cosine = angles[0];
  operands.far_sine = angles[1];
}

void CachedAttentionKernel::ReadScores(const OrtKernelContext* context,
                                       AttentionOperands& operands) const {
  if (!storage_->reads_scores()) return;
  const size_t angles = storage_->far_positions() != 0 ? 2 : 0;
  const size_t index = kFirstPast + storage_->Tensors(-1).size() + angles;
  const std::vector<int64_t> dims = {operands.batch, operands.total};
  const CacheTensor scores = ReadTensor(context, index, {"scores", {Type::kFloat}, dims});
  operands.scores = reinterpret_cast<const float*>(scores.data);
}

void CachedAttentionKernel::ReadClusters(const OrtKernelContext* context,
                                         AttentionOperands& operands) const {
  if (!storage_->has_clusters()) return;
  const size_t first = kFirstPast + storage_->Tensors(-1).size();
  const int64_t heads = form_.kv_heads;
  const std::vector<Type> floats = {Type::kFloat, Type::kFloat16, Type::kBfloat16};
  const std::vector<int64_t> vectors = {1, heads, -1, form_.head_size};
  TokenClusters& clusters = operands.clusters;
  const auto read = [&](size_t index, const char* name, const std::vector<Type>& types,
                        const std::vector<int64_t>& dims) {
    return ReadTensor(context, first + index, {name, types, dims});
  };
  const CacheTensor centroids = read(0, "centroids", floats, vectors);
  clusters.type = centroids.type;
  clusters.centroids = centroids.data;
  clusters.count = centroids.dims[2];
  const CacheTensor ends = read(1, "ends", {Type::kInt32}, {1, heads, clusters.count});
  clusters.ends = reinterpret_cast<const int32_t*>(ends.data);
  const CacheTensor radii = read(2, "radii", {Type::kFloat}, {1, heads, clusters.count});
  clusters.radii = reinterpret_cast<const float*>(radii.data);
  const CacheTensor parents = read(3, "parents", {clusters.type}, vectors);
  clusters.parents = parents.data;
  clusters.parent_count = parents.dims[2];
  const CacheTensor parent_ends =
      read(4, "parent ends", {Type::kInt32}, {1, heads, clusters.parent_count});
  clusters.parent_ends = reinterpret_cast<const int32_t*>(parent_ends.data);
  const CacheTensor parent_radii =
      read(5, "parent radii", {Type::kFloat}, {1, heads, clusters.parent_count});
  clusters.parent_radii = reinterpret_cast<const float*>(parent_radii.data);
  const CacheTensor thresholds = read(6, "thresholds", {Type::kFloat}, {2});
  clusters.thresholds = reinterpret_cast<const float*>(thresholds.data);
}

void CachedAttentionKernel::ReadLowRank(const OrtKernelContext* context,
                                        AttentionOperands& operands) const {
  const int64_t chunk = storage_->low_rank_chunk();
  if (chunk == 0) return;
  const size_t angles = storage_->far_positions() != 0 ? 2 : 0;
  const size_t first = kFirstPast + storage_->Tensors(-1).size() + angles;
  const int64_t heads = form_.kv_heads;
  const int64_t d = form_.head_size;
  LowRankTokens& prefix = operands.low_rank;
  const auto read = [&](size_t index, const char* name, const std::vector<Type>& types,
                        const std::vector<int64_t>& dims) {
    return ReadTensor(context, first + index, {name, types, dims});
  };
  const CacheTensor tokens =
      read(0, "tokens", {Type::kFloat, Type::kFloat16, Type::kBfloat16}, {1, -1, -1});
  prefix.type = tokens.type;
  prefix.tokens = tokens.data;
  prefix.count = tokens.dims[1];
  prefix.rank = tokens.dims[2];
  prefix.chunk = chunk;
  const std::vector<Type> floats = {prefix.type};
  prefix.basis = read(1, "basis", floats, {1, heads, d, prefix.rank}).data;
  prefix.values = read(2, "values", floats, {1, heads, prefix.count, form_.value_size}).data;
  const CacheTensor landmarks = read(3, "landmarks", floats, {1, heads, -1, d});
  prefix.landmarks = landmarks.data;
  prefix.chunks = landmarks.dims[2];
  const CacheTensor outliers = read(4, "outliers", {Type::kInt32}, {1, heads, -1});
  prefix.outliers = reinterpret_cast<const int32_t*>(outliers.data);
  prefix.outlier_count = outliers.dims[2];
  prefix.outlier_keys =
      read(5, "outlier keys", floats, {1, heads, prefix.outlier_count, chunk, d}).data;
  if (operands.far_batch != 1) throw Error("far cos and far sin must be the same for all rows");
}

CacheTensor CachedAttentionKernel::ReadTensor(const OrtKernelContext* context, size_t index,
                                              const CacheTensorForm& form) const {
  CacheTensor found;
  const Tensor tensor = NodeKernel::Input(context, index, &found.dims);
  if (!Fits(found.dims, form.dims)) RefuseShape(form.name, found.dims, WantedText(form.dims));
  std::string types;
  bool known = false;
  for (const Type type : form.types) {
    known = known || type == tensor.type;
    if (!types.empty()) types += ", ";
    types += TypeName(type);
  }
  if (!known) {
    throw Error(std::string(form.name) + " is " + TypeName(tensor.type) + "; it must be " +
                (form.types.size() > 1 ? "one of " : "") + types);
  }
  found.data = static_cast<char*>(const_cast<void*>(tensor.data));
  found.type = tensor.type;
  return found;
}

std::vector<CacheTensor> CachedAttentionKernel::ReadPast(const OrtKernelContext* context,
                                                         const AttentionOperands& operands) const {
  std::vector<CacheTensor> past;
  for (const CacheTensorForm& form : storage_->Tensors(operands.batch)) {
    past.push_back(ReadTensor(context, kFirstPast + past.size(), form));
  }
  storage_->CheckPast(past, operands.past());
  return past;
}

void CachedAttentionKernel::Compute(OrtKernelContext* context) const {
  const AttentionOperands operands = ReadOperands(context);
  const std::vector<CacheTensor> past = ReadPast(context, operands);
  const std::vector<int64_t> shape = {operands.batch, operands.seq, form_.heads * form_.value_size};
  float* const y = static_cast<float*>(Output(context, 0, shape));
  std::vector<CacheTensor> present = past;
  for (size_t i = 0; i < past.size(); ++i) {
    present[i].dims = storage_->Present(i, past[i].dims, operands.total);
    present[i].data = static_cast<char*>(Output(context, i + 1, present[i].dims));
  }
  const ParallelFunction parallel = [&](int64_t count, int64_t grain, const RangeFunction& fn) {
    Parallel(context, count, grain, fn);
  };
  const LoggedNode logged(name_);
  storage_->Step(*kernels_, operands, past, present, parallel, y);
}

}  // namespace effc::ort
