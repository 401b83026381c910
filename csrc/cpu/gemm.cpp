// C = A B in bf16, summed in fp32, either operand or none transposed; shapes in bertfast/ops/gemm.py.
//
// Columns of C are cut into panels of 64. B's panels are packed in groups that stay in the L2 cache while all rows of A
// pass, and a tile of 6 rows by a panel stays in registers over the whole inner dimension, so that C is written once, in
// bf16. A is read as it lies; only where both operands run along the rows of C's sum (A transposed) is it woven first.
// Every element is summed in one order, so the result is the same for any number of threads.
#include "gemm_tile.h"

#if defined(__AVX512BF16__)

#include <torch/library.h>

namespace bertfast {
namespace {

using BF16 = c10::BFloat16;
constexpr int64_t TILE = 6, VECTORS = PANEL<Pair> / LANES;
constexpr int64_t GROUP_BYTES = 400 << 10;  // of packed B: the best of 200 to 640 KiB on an L2 of 1 MiB
constexpr int64_t WOVEN = 96;               // rows of a transposed A that are woven at a time

struct Product {
  const Pair* a;  // word (row i, step s) at a[i * a_row + s * a_step]
  int64_t a_row, a_step;
  const Pair* b;  // panels, `steps` words of each column
  int64_t steps;
  const BF16* bias;  // of the columns, or nullptr
  BF16* c;
  int64_t c_row;
  const Pair* next = nullptr;  // the rows of A that come after these, to be on their way meanwhile
};

template <int M>
void tile(const Product& o) {
  using T = Tile<Pair>;
  T::Register sums[M][VECTORS] = {};
  const Pair *a = o.a, *b = o.b;
  constexpr int64_t LINE = 64 / sizeof(Pair);  // of the cache
  const int64_t block = o.next ? LINE : o.steps;
  for (int64_t first = 0; first < o.steps; first += block) {
    if (o.next)
      for (int i = 0; i < M; i++) __builtin_prefetch(o.next + i * o.a_row + first, 0, 2);
    for (int64_t n = std::min(block, o.steps - first); n > 0; n--, a += o.a_step, b += PANEL<Pair>) {
      T::Register columns[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) columns[v] = load_register<Pair>(b + v * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        const auto row = T::broadcast(a[i * o.a_row]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[i][v] = T::multiply_add(row, columns[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++) {
    const F32 bias = o.bias ? F32::load(o.bias + v * LANES) : F32();
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) (F32((__m512)sums[i][v]) + bias).store(o.c + i * o.c_row + v * LANES);
  }
}

template <int M = TILE>
void tile_of(int64_t m, const Product& o) {
  if (m >= M) return tile<M>(o);
  if constexpr (M > 1) tile_of<M - 1>(m, o);
}

// m rows of C by `panels` panels: a tile's rows of A stay in L1 while B's panels pass.
void multiply_group(Product o, int64_t m, int64_t panels) {
  const bool ahead = o.a_step == 1 && m * o.steps * static_cast<int64_t>(sizeof(Pair)) > NEAR;
  for (; m > 0; m -= TILE, o.a += TILE * o.a_row, o.c += TILE * o.c_row) {
    Product t = o;
    for (int64_t p = 0; p < panels; p++, t.b += t.steps * PANEL<Pair>, t.c += PANEL<Pair>) {
      if (ahead && p == panels - 1 && m >= 2 * TILE) t.next = o.a + TILE * o.a_row;
      tile_of(m, t);
      if (t.bias) t.bias += PANEL<Pair>;
    }
  }
}

int64_t group_of(int64_t steps) { return std::max<int64_t>(1, GROUP_BYTES / (steps * PANEL<Pair> * 4 + 1)); }

// A as it lies. Threads share out columns and rows; pack(panel, out) packs a panel of B, once for each part of rows.
template <typename Pack>
void multiply_rows(const Product& o, int64_t m, int64_t n_panels, Pack&& pack) {
  constexpr int64_t PACKING = 64;  // a panel's packing takes the time of so many rows
  const int64_t threads = at::get_num_threads(), G = group_of(o.steps);
  int64_t column_parts = 1, row_parts = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t c = 1; c <= std::min(n_panels, threads); c++) {
    const int64_t r = std::min(threads / c, std::max<int64_t>(1, m / PACKING));
    const int64_t cost = (n_panels + c - 1) / c * ((m + r - 1) / r + PACKING);
    if (cost < least) least = cost, column_parts = c, row_parts = r;
  }
  at::parallel_for(0, column_parts * row_parts, 1, [&](int64_t begin, int64_t end) {
    Pair* packed = scratch<Pair, 0>(G * o.steps * PANEL<Pair>);
    for (int64_t part = begin; part < end; part++) {
      const int64_t c = part / row_parts, r = part % row_parts, last = n_panels * (c + 1) / column_parts;
      const int64_t first_row = m * r / row_parts, rows = m * (r + 1) / row_parts - first_row;
      for (int64_t p = n_panels * c / column_parts; p < last; p += G) {
        const int64_t panels = std::min(G, last - p), at = p * PANEL<Pair>;
        for (int64_t i = 0; i < panels; i++) pack(p + i, packed + i * o.steps * PANEL<Pair>);
        multiply_group({o.a + first_row * o.a_row, o.a_row, o.a_step, packed, o.steps, o.bias ? o.bias + at : nullptr,
                        o.c + first_row * o.c_row + at, o.c_row}, rows, panels);
      }
    }
  });
}

// C (m, n) = a^T b of a (k, m), b (k, n): b is packed once for all, each thread weaves its own columns of a.
void multiply_transposed(BF16* c, const BF16* a, const BF16* b, int64_t m, int64_t n, int64_t k) {
  const int64_t steps = steps_of<Pair>(k), n_panels = n / PANEL<Pair>, size = steps * PANEL<Pair>, G = group_of(steps);
  Pair* packed = scratch<Pair, 1>(n_panels * size);
  at::parallel_for(0, n_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      pack_rows<Pair>(Rows<const BF16>{b + p * PANEL<Pair>, n}, k, PANEL<Pair>, packed + p * size, PANEL<Pair>);
  });
  for_parts(m, std::min<int64_t>(at::get_num_threads(), (m + TILE - 1) / TILE), [&](int64_t, int64_t begin, int64_t end) {
    Pair* woven = scratch<Pair, 0>(steps * WOVEN);
    for (int64_t i = begin; i < end; i += WOVEN) {
      const int64_t rows = std::min(WOVEN, end - i);
      pack_rows<Pair>(Rows<const BF16>{a + i, m}, k, rows, woven, WOVEN);
      for (int64_t p = 0; p < n_panels; p += G)
        multiply_group({woven, 1, WOVEN, packed + p * size, steps, nullptr, c + i * n + p * PANEL<Pair>, n}, rows,
                       std::min(G, n_panels - p));
    }
  });
}

// a (M, K) or, transposed, (K, M); b (K, N) or, transposed, (N, K); bias (N,) -> (M, N)
at::Tensor gemm_cpu(const at::Tensor& a_, const at::Tensor& b_, const std::optional<at::Tensor>& bias_,
                    bool transpose_a, bool transpose_b) {
  TORCH_CHECK(a_.dim() == 2 && b_.dim() == 2, "gemm: a and b must be matrices, got ", a_.sizes(), " and ", b_.sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(a_.scalar_type() == at::kBFloat16, "gemm on CPU takes bfloat16, not ", a_.scalar_type());
  CHECK_SAME_DTYPE(a_, b_);
  const int64_t m = a_.size(transpose_a ? 1 : 0), k = a_.size(transpose_a ? 0 : 1), n = b_.size(transpose_b ? 0 : 1);
  TORCH_CHECK(b_.size(transpose_b ? 1 : 0) == k, "gemm: ", a_.sizes(), " and ", b_.sizes(), " do not fit");
  TORCH_CHECK(n % PANEL<Pair> == 0 && (transpose_a || k % 2 == 0), "gemm: N must be a multiple of 64, K of 2, got ", n,
              " and ", k);
  TORCH_CHECK(!(transpose_a && (transpose_b || bias_)), "gemm: a transposed a takes neither a transposed b nor a bias");
  const at::Tensor a = a_.contiguous(), b = b_.contiguous(), c = empty({m, n}, a.options());
  at::Tensor bias;
  if (bias_) {
    CHECK_SHAPE(*bias_, n);
    CHECK_SAME_DTYPE(a, *bias_);
    bias = bias_->contiguous();
  }
  const BF16 *left = a.const_data_ptr<BF16>(), *right = b.const_data_ptr<BF16>();
  BF16* out = c.mutable_data_ptr<BF16>();
  if (transpose_a) {
    multiply_transposed(out, left, right, m, n, k);
    return c;
  }
  const Product product{reinterpret_cast<const Pair*>(left), k / 2, 1, nullptr, k / 2,
                        bias.defined() ? bias.const_data_ptr<BF16>() : nullptr, out, n};
  multiply_rows(product, m, n / PANEL<Pair>, [&](int64_t p, Pair* packed) {
    if (transpose_b) {
      Pair* block = scratch<Pair, 2>(WORDS<Pair> * round_up(k / 2, WORDS<Pair>));
      pack_columns<Pair>(Rows<const BF16>{right + p * PANEL<Pair> * k, k}, PANEL<Pair>, k, packed, PANEL<Pair>, block);
    } else {
      pack_rows<Pair>(Rows<const BF16>{right + p * PANEL<Pair>, n}, k, PANEL<Pair>, packed, PANEL<Pair>);
    }
  });
  return c;
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) { m.impl("gemm", &bertfast::gemm_cpu); }

#endif
