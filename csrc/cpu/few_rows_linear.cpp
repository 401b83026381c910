// y = x W^T + b for few rows of x, several W side by side; shapes in bertfast/ops/few_rows_linear.py.
//
// With few rows the weights are read from memory for little arithmetic, and a library's GEMM packs them first. Here they
// are read once, as they lie, by lanes along the inputs: a tile of ROWS rows by OUTPUTS outputs is that many registers
// of partial sums, whose lanes are then added up. Rows of x stay in cache. On Intel's CPUs in fp32 `gemm`, which asks for
// the next weights while it multiplies, is faster from some number of rows on.
#include "gemm_tile.h"

#include <ATen/core/List.h>
#include <torch/library.h>

#include <vector>

namespace bertfast {
namespace {

using Sums = Tile<float>::Register;
#if defined(__AVX512F__)
constexpr int ROWS = 4, OUTPUTS = 4;
#else
constexpr int ROWS = 3, OUTPUTS = 4;  // with a register for each row and one for the weights all 16
#endif

template <typename Word, typename scalar_t>
inline typename Tile<Word>::Register load_words(const scalar_t* p) {
  if constexpr (std::is_same_v<element_t<Word>, scalar_t>) return load_register<Word>(p);
#if defined(__AVX512F__)
  else return (Sums)F32::load(p).v;  // bf16 on a CPU without its instructions
#else
  else return (Sums)F32::widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

// results[i * OUTPUTS + o] = the sum of the lanes of sums[i * OUTPUTS + o], of M rows
template <int M>
inline void add_lanes(Sums* sums, float* results) {
#if defined(__AVX512F__)
  transpose<float, 8>(sums, std::make_integer_sequence<int, 16>());
#pragma GCC unroll 16
  for (int i = 1; i < 16; i++) sums[0] += sums[i];
  store_register<float>(results, sums[0]);
#else
#pragma GCC unroll 4
  for (int i = 0; i < M; i++, sums += OUTPUTS, results += OUTPUTS) {
    const auto pairs = [&](int a, int b) {
      return _mm256_add_ps(_mm256_unpacklo_ps(sums[a], sums[b]), _mm256_unpackhi_ps(sums[a], sums[b]));
    };
    const __m256 even = pairs(0, 2), odd = pairs(1, 3);
    const __m256 halves = _mm256_add_ps(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
    _mm_storeu_ps(results, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
#endif
}

// results[i * OUTPUTS + o] = x row i . w row o, over `steps` words; rows from M on are not read and give 0.
template <typename Word, int M, typename scalar_t>
inline void dot_tile(const scalar_t* x, int64_t x_row, const scalar_t* w, int64_t w_row, int64_t steps,
                     float* results) {
  using T = Tile<Word>;
  constexpr int64_t STEP = WORDS<Word> * DEPTH<Word>;  // elements of a register
  typename T::Register sums[ROWS * OUTPUTS] = {};
  for (int64_t k = 0; k < steps; k += WORDS<Word>, x += STEP, w += STEP) {
    typename T::Register rows[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) rows[i] = load_words<Word>(x + i * x_row);
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const auto column = load_words<Word>(w + o * w_row);
      // the next outputs' rows are on their way while this one's are multiplied
      if constexpr (M == ROWS) _mm_prefetch(reinterpret_cast<const char*>(w + (OUTPUTS + o) * w_row), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) sums[i * OUTPUTS + o] = T::multiply_add(rows[i], column, sums[i * OUTPUTS + o]);
    }
  }
  add_lanes<M>(sums, results);
}

template <typename Word, typename scalar_t>
void few_rows_linear(Rows<scalar_t> y, Rows<const scalar_t> x, const scalar_t* w, const scalar_t* bias, int64_t n_rows,
                     int64_t n_inputs, int64_t first, int64_t last) {
  const int64_t steps = n_inputs / DEPTH<Word>;
  for (int64_t o = first; o < last; o += OUTPUTS) {
    F32 bias_o;
    if (bias) {
      scalar_t repeated[LANES];
      for (int64_t i = 0; i < LANES; i++) repeated[i] = bias[o + i % OUTPUTS];
      bias_o = F32::load(repeated);
    }
    const auto tile = [&]<int M>(std::integral_constant<int, M>, int64_t row) {
      float results[LANES] = {};
      dot_tile<Word, M>(x[row], x.stride, w + o * n_inputs, n_inputs, steps, results);
      scalar_t rounded[LANES];
      (F32::load(results) + bias_o).store(rounded);
      for (int i = 0; i < M; i++) std::copy_n(rounded + i * OUTPUTS, OUTPUTS, y[row + i] + o);
    };
    int64_t row = 0;
    for (; row + ROWS <= n_rows; row += ROWS) tile(std::integral_constant<int, ROWS>(), row);
    switch (n_rows - row) {
      case 1: tile(std::integral_constant<int, 1>(), row); break;
      case 2: tile(std::integral_constant<int, 2>(), row); break;
      case 3: tile(std::integral_constant<int, 3>(), row); break;
    }
  }
}

// x (M, I), weights of (O, I), biases none or as many of (O,) -> y (M, n O)
at::Tensor few_rows_linear_cpu(const at::Tensor& x_, at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK(x_.dim() == 2 && !weights.empty() && weights[0].dim() == 2, "few_rows_linear: x (M, I) and weights (O, I)");
  const int64_t n_rows = x_.size(0), n_inputs = x_.size(1), n_outputs = weights[0].size(0), n = weights.size();
  TORCH_CHECK(n_inputs % 32 == 0 && n_outputs % OUTPUTS == 0, "few_rows_linear: inputs must be a multiple of 32, outputs "
              "of 4, got ", n_inputs, " and ", n_outputs);
  TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "few_rows_linear: a bias for each weight, or none");
  const at::Tensor x = x_.contiguous();
  std::vector<at::Tensor> held;
  for (int64_t i = 0; i < n; i++) {
    CHECK_SHAPE(weights[i], n_outputs, n_inputs);
    CHECK_SAME_DTYPE(x, weights[i]);
    held.push_back(weights[i].contiguous());
  }
  for (const at::Tensor& bias : biases) {
    CHECK_SHAPE(bias, n_outputs);
    CHECK_SAME_DTYPE(x, bias);
    held.push_back(bias.contiguous());
  }
  at::Tensor y = empty({n_rows, n * n_outputs}, x.options());
#if defined(__AVX512F__)
  const int64_t many = n_inputs > 1024 ? 10 : 28;  // for lanes along the inputs; rows of x that fill L1 are read from L2
  if (n_rows >= many && gemm_takes_few_rows() && x.scalar_type() == at::kFloat && n_outputs % PANEL<float> == 0) {
    std::vector<const float*> bs;
    for (int64_t i = 0; i < n; i++) bs.push_back(held[i].const_data_ptr<float>());
    float* bias = biases.empty() ? nullptr : scratch<float, 1>(n * n_outputs);
    for (int64_t i = 0; bias && i < n; i++)
      std::copy_n(held[n + i].const_data_ptr<float>(), n_outputs, bias + i * n_outputs);
    gemm(y.mutable_data_ptr<float>(), x.const_data_ptr<float>(), bs, bias, n_rows, n * n_outputs, n_inputs);
    return y;
  }
#endif
  const auto run = [&]<typename Word, typename scalar_t>(Word, scalar_t) {
    const int64_t blocks = n_outputs / OUTPUTS;
    for_parts(n * blocks, n_parts(n * blocks, n_rows * n_inputs), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first / blocks; i < n && i * blocks < last; i++) {
        const int64_t begin = std::max(first - i * blocks, int64_t{0}), end = std::min(last - i * blocks, blocks);
        few_rows_linear<Word, scalar_t>({y.mutable_data_ptr<scalar_t>() + i * n_outputs, n * n_outputs},
                                        {x.const_data_ptr<scalar_t>(), n_inputs}, held[i].const_data_ptr<scalar_t>(),
                                        biases.empty() ? nullptr : held[n + i].const_data_ptr<scalar_t>(), n_rows,
                                        n_inputs, begin * OUTPUTS, end * OUTPUTS);
      }
    });
  };
#if defined(__AVX512BF16__)
  using Bf16Word = Pair;
#else
  using Bf16Word = float;
#endif
  if (x.scalar_type() == at::kFloat) run(float(), float());
  else if (x.scalar_type() == at::kBFloat16) run(Bf16Word(), c10::BFloat16());
  else TORCH_CHECK_NOT_IMPLEMENTED(false, "few_rows_linear on CPU takes float32 or bfloat16, not ", x.scalar_type());
  return y;
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) { m.impl("few_rows_linear", &bertfast::few_rows_linear_cpu); }
