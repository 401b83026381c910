// embedding_sum on CUDA tensors: checks, memory, sorting, launches (the kernels are in embedding_sum.cuh). Written
// against libtorch's stable ABI: one build serves every torch from 2.13 on, and compiles beside a CPU torch.

#include "embedding_sum.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

namespace bertfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The kernels load and store 16 bytes at a time; a view may begin anywhere.
bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

Tensor packed(const Tensor& t) {
  const Tensor whole = torch::stable::contiguous(t);
  return is_aligned(whole) ? whole : torch::stable::clone(whole);
}

void check_device(const Tensor& t, const Tensor& word, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == word.get_device_index(), name,
                  " must be on the GPU of the word table");
}

// (T,) ids as contiguous int64. Unlike on CPUs their range is not checked: that would wait for the device.
Tensor row_ids(const Tensor& ids, const Tensor& word, int64_t n_rows, const char* name) {
  check_device(ids, word, name);
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == n_rows, name, " must have shape (", n_rows, ",)");
  return torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
}

// row_key becomes contiguous.
Dropout make_dropout(double p, const OptionalTensor& seed, OptionalTensor& row_key, int64_t stream, const Tensor& word,
                     int64_t n_rows) {
  STD_TORCH_CHECK(0.0 <= p && p < 1.0, "dropout probability must be in [0, 1), got ", p);
  if (p == 0.0) return {nullptr, nullptr, 0, 0, 1.f};
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "dropout (p > 0) needs a seed: an int64 tensor with one element");
  STD_TORCH_CHECK(!row_key || (row_key->scalar_type() == ScalarType::Long && row_key->dim() == 1 &&
                               row_key->size(0) == n_rows),
                  "row_key must be int64 of shape (", n_rows, ",)");
  check_device(*seed, word, "seed");
  if (row_key) {
    check_device(*row_key, word, "row_key");
    row_key = torch::stable::contiguous(*row_key);
  }
  const double threshold = std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1);
  return {data<const int64_t>(*seed), row_key ? data<const int64_t>(*row_key) : nullptr,
          static_cast<uint32_t>(threshold), static_cast<uint32_t>(stream),
          static_cast<float>(0x1p32 / (0x1p32 - threshold))};
}

// The arguments that both directions share, checked and contiguous.
struct Inputs {
  Tensor word_ids, position_ids, type_ids, word, position, token_type, weight;
  int64_t n_rows, n_columns;

  Inputs(const Tensor& word_ids_, const Tensor& position_ids_, const Tensor& type_ids_, const Tensor& word_,
         const Tensor& position_, const Tensor& token_type_, const Tensor& weight_)
      : word_ids(row_ids(word_ids_, word_, word_ids_.numel(), "input_ids")),
        position_ids(row_ids(position_ids_, word_, word_ids_.numel(), "position_ids")),
        type_ids(row_ids(type_ids_, word_, word_ids_.numel(), "token_type_ids")),
        word(packed(word_)),
        position(packed(position_)),
        token_type(packed(token_type_)),
        weight(packed(weight_)),
        n_rows(word_ids_.numel()),
        n_columns(word_.size(1)) {
    check_device(weight, word, "weight");
    for (const Tensor* t : {&position, &token_type}) {
      check_device(*t, word, "each table");
      STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == n_columns, "the tables differ in width");
      STD_TORCH_CHECK(t->scalar_type() == word.scalar_type(), "the tables differ in dtype");
    }
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == n_columns && weight.scalar_type() == word.scalar_type(),
                    "weight must be (H,) in the tables' dtype");
    const int most = n_columns % 8 ? MAX_ODD_COLUMNS : MAX_COLUMNS;
    STD_TORCH_CHECK(n_columns <= most, "embedding_sum takes up to ", most, " columns here, got ", n_columns);
  }
  Ids ids() const {
    return {data<const int64_t>(word_ids), data<const int64_t>(position_ids), data<const int64_t>(type_ids)};
  }
  template <typename T>
  Tables<T> tables() const {
    return {data<const T>(word), data<const T>(position), data<const T>(token_type)};
  }
};

// f(a null pointer of the element type) for float, bfloat16 or half.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float) return f(static_cast<float*>(nullptr));
  if (dtype == ScalarType::BFloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  if (dtype == ScalarType::Half) return f(static_cast<__half*>(nullptr));
  STD_TORCH_CHECK(false, "embedding_sum on CUDA takes fp32, bf16 and fp16");
}

cudaStream_t stream_of(const Tensor& t) {
  return static_cast<cudaStream_t>(
      torch::stable::accelerator::getCurrentStream(t.get_device_index()).nativeHandle());
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "embedding_sum: ", cudaGetErrorString(error));
}

// Where each of ids (T,) in [0, n_ids) is when they ascend; stable, so that sums are. A radix sort takes a pass a byte.
Tensor ascending(const Tensor& ids, int64_t n_ids) {
  const ScalarType narrow = n_ids <= 256 ? ScalarType::Byte : n_ids <= 32768 ? ScalarType::Short : ScalarType::Int;
  std::array<StableIValue, 4> stack{torch::stable::detail::from(torch::stable::to(ids, narrow)),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the sorted ids
  return torch::stable::detail::to<Tensor>(stack[1]);
}

// table[id] += sum of the rows (n, H) float32 with that id; ids: (n,), or none if there is one segment only.
void add_segments(const Tensor& table, const Tensor& rows, const OptionalTensor& ids, int64_t skipped) {
  const int64_t n = rows.size(0), n_columns = rows.size(1), n_cuts = cut_rows(n);
  const Tensor cuts = empty(rows, {n_cuts, n_columns}, ScalarType::Float);
  const Tensor cut_ids = empty(rows, {n_cuts}, ScalarType::Long);
  OptionalTensor order;
  if (ids) order = ascending(*ids, table.size(0));
  dispatch(table.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    segment_sum(data<T>(table), data<float>(cuts), data<int64_t>(cut_ids), data<const float>(rows),
                order ? data<const int64_t>(*order) : nullptr, ids ? data<const int64_t>(*ids) : nullptr, skipped,
                n, static_cast<int>(n_columns), stream_of(rows));
  });
  check_launch();
}

std::tuple<Tensor, Tensor, Tensor> embedding_sum_fwd_cuda(
    Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, Tensor token_type,
    Tensor weight, Tensor bias, double eps, std::optional<int64_t>, double p, OptionalTensor seed,
    OptionalTensor row_key, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(word.get_device_index());
  const Inputs in(input_ids, position_ids, token_type_ids, word, position, token_type, weight);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == in.n_columns && bias.scalar_type() == word.scalar_type(),
                  "bias must be (H,) in the tables' dtype");
  const Tensor beta = packed(bias);
  const Dropout dropout = make_dropout(p, seed, row_key, stream, word, in.n_rows);
  const Tensor y = empty(in.word, {in.n_rows, in.n_columns}, in.word.scalar_type());
  const Tensor mean = empty(in.word, {in.n_rows}, ScalarType::Float);
  const Tensor rstd = empty(in.word, {in.n_rows}, ScalarType::Float);
  dispatch(in.word.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    embedding_sum_fwd(data<T>(y), data<float>(mean), data<float>(rstd), in.ids(), in.tables<T>(),
                      data<const T>(in.weight), data<const T>(beta), static_cast<float>(eps), dropout, in.n_rows,
                      static_cast<int>(in.n_columns), stream_of(y));
  });
  check_launch();
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> embedding_sum_bwd_into_cuda(
    Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position,
    Tensor token_type, Tensor weight, Tensor mean, Tensor rstd, std::optional<int64_t> padding_idx, double p,
    OptionalTensor seed, OptionalTensor row_key, int64_t stream, Tensor dword) {
  const torch::stable::accelerator::DeviceGuard guard(word.get_device_index());
  const Inputs in(input_ids, position_ids, token_type_ids, word, position, token_type, weight);
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == in.n_rows && dy.size(1) == in.n_columns &&
                      dy.scalar_type() == word.scalar_type(),
                  "dy must be (T, H) in the tables' dtype");
  STD_TORCH_CHECK(dword.is_contiguous() && is_aligned(dword) && dword.dim() == 2 && dword.size(0) == word.size(0) &&
                      dword.size(1) == in.n_columns,
                  "dword must be contiguous, begin at a multiple of 16 bytes and have the word table's shape");
  for (const Tensor* t : {&mean, &rstd}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == in.n_rows && t->scalar_type() == ScalarType::Float,
                    "mean and rstd must be float32 of shape (", in.n_rows, ",)");
  }
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  const Tensor gradient = packed(dy);
  const Dropout dropout = make_dropout(p, seed, row_key, stream, word, in.n_rows);
  const Tensor dz = empty(in.word, {in.n_rows, in.n_columns}, ScalarType::Float);
  Tensor weight_parts = dz, bias_parts = dz;
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, word.get_device_index());
  const int64_t n_blocks = 2 * processors;
  dispatch(in.word.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t groups = backward_groups<T>(static_cast<int>(in.n_columns), n_blocks);
    weight_parts = empty(dz, {groups, in.n_columns}, ScalarType::Float);
    bias_parts = empty(dz, {groups, in.n_columns}, ScalarType::Float);
    embedding_sum_bwd(data<float>(dz), data<float>(weight_parts), data<float>(bias_parts), data<const T>(gradient),
                      in.ids(), in.tables<T>(), data<const T>(in.weight), data<const float>(means),
                      data<const float>(rstds), dropout, in.n_rows, static_cast<int>(in.n_columns), n_blocks,
                      stream_of(dz));
  });
  check_launch();
  const auto zeros = [](const Tensor& like) {
    Tensor t = torch::stable::empty_like(like);
    return torch::stable::zero_(t);
  };
  const Tensor dposition = zeros(in.position), dtype = zeros(in.token_type);
  const Tensor dweight = zeros(in.weight), dbias = zeros(in.weight);
  add_segments(dword, dz, in.word_ids, padding_idx.value_or(NO_SEGMENT));
  add_segments(dposition, dz, in.position_ids, NO_SEGMENT);
  add_segments(dtype, dz, in.type_ids, NO_SEGMENT);
  add_segments(dweight, weight_parts, std::nullopt, NO_SEGMENT);
  add_segments(dbias, bias_parts, std::nullopt, NO_SEGMENT);
  return {dposition, dtype, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_sum_bwd_cuda(
    Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position,
    Tensor token_type, Tensor weight, Tensor mean, Tensor rstd, std::optional<int64_t> padding_idx, double p,
    OptionalTensor seed, OptionalTensor row_key, int64_t stream) {
  Tensor dword = torch::stable::new_zeros(word, {word.size(0), word.size(1)});
  return std::tuple_cat(std::make_tuple(dword),
                        embedding_sum_bwd_into_cuda(dy, input_ids, position_ids, token_type_ids, word, position,
                                                    token_type, weight, mean, rstd, padding_idx, p, seed, row_key,
                                                    stream, dword));
}

}  // namespace
}  // namespace bertfast

STABLE_TORCH_LIBRARY_IMPL(bertfast, CUDA, m) {
  m.impl("embedding_sum_fwd", TORCH_BOX(&bertfast::embedding_sum_fwd_cuda));
  m.impl("embedding_sum_bwd", TORCH_BOX(&bertfast::embedding_sum_bwd_cuda));
  m.impl("embedding_sum_bwd_into", TORCH_BOX(&bertfast::embedding_sum_bwd_into_cuda));
}
