// C = A B in bf16, summed in fp32, or in fp32, either operand or none transposed; shapes in bertfast/ops/gemm.py.
//
// Columns of C are cut into panels of 64. B's panels are packed in groups that stay in the L2 cache while all rows of A
// pass, and a tile of 6 rows by a panel stays in registers over the inner dimension, in bf16 over all of it, so that C is
// written once, in fp32 over stretches. A is read as it lies; only where both operands run along the rows of C's sum (A
// transposed) is it woven first, in bf16; in fp32 that product is PyTorch's. Where A has few rows reading B is what takes
// the time: then each panel is multiplied as soon as it is packed, and the next one is asked for meanwhile.
// Every element is summed in one order, so the result is the same for any number of threads.
#include "gemm_tile.h"

#if defined(__AVX512F__)

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>
#include <unistd.h>

namespace bertfast {
namespace {

#if defined(__AVX512BF16__)
constexpr bool BF16_BUILT = true;
#else
constexpr bool BF16_BUILT = false;
#endif
constexpr int64_t TILE = 6;
constexpr int64_t WOVEN = 96;  // rows of a transposed A that are woven at a time
constexpr int64_t FEW_ROWS = 256;  // in fp32, fewer
// Steps of A and B that pass at a time: in bf16 all of them, for C is rounded when it is written.
template <typename Word>
int64_t longest_stretch(int64_t m) {
  if (std::is_same_v<Word, Pair>) return std::numeric_limits<int64_t>::max();
  return m >= FEW_ROWS ? 768 : m > 64 ? 384 : 128;
}

// Bytes of a group of packed B: the best of 200 to 640 KiB on an L2 of 1 MiB, of 400 to 800 on one of 2 MiB.
int64_t group_bytes() {
  static const int64_t bytes = [] {
    constexpr int64_t MIB = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    return std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), MIB, 2 * MIB) * 2 / 5;
#else
    return MIB * 2 / 5;
#endif
  }();
  return bytes;
}

// Cache lines of a matrix of `rows` rows, to be on their way while something else is multiplied.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, width = 0, rows = 0, at = 0;  // bytes

  template <typename T>
  static Ahead of(const T* data, int64_t stride, int64_t width, int64_t rows) {
    constexpr int64_t SIZE = sizeof(T);
    return {reinterpret_cast<const char*>(data), stride * SIZE, width * SIZE, rows};
  }
  template <bool WRITTEN>
  void ask(int64_t lines) {
    for (; lines > 0 && rows > 0; lines--) {
      __builtin_prefetch(row + at, WRITTEN, 2);
      if ((at += 64) >= width) at = 0, row += stride, rows--;
    }
  }
};

template <typename Word>
struct Product {
  const Word* a;  // word (row i, step s) at a[i * a_row + s * a_step]
  int64_t a_row, a_step;
  const Word* b;  // panels, `steps` words of each column
  int64_t steps;
  const element_t<Word>* bias;  // of the columns, or nullptr
  element_t<Word>* c;
  int64_t c_row;
  bool accumulate = false;
  bool far_a = false, far_c = false;  // whether rows of A and tiles of C are to be asked for before their turn
};

// next_a and next_c: the rows of A and the tile of C that come after these.
template <int M, typename Word>
void tile(const Product<Word>& o, Ahead& next_a, int64_t lines, Ahead next_c) {
  using T = Tile<Word>;
  constexpr int64_t VECTORS = MAX_VECTORS, BLOCK = 16;
  typename T::Register sums[M][VECTORS] = {};
  const Word *a = o.a, *b = o.b;
  for (int64_t left = o.steps; left > 0; left -= BLOCK) {
    next_a.ask<false>(lines);
    next_c.ask<true>(2);
    for (int64_t n = std::min(BLOCK, left); n > 0; n--, a += o.a_step, b += PANEL<Word>) {
      typename T::Register columns[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) columns[v] = load_register<Word>(b + v * WORDS<Word>);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        const auto row = T::broadcast(a[i * o.a_row]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[i][v] = T::multiply_add(row, columns[v], sums[i][v]);
      }
    }
  }
  const auto finish = [&, c = o.c, c_row = o.c_row, bias = o.bias](auto&& added) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      const F32 of_column = bias ? F32::load(bias + v * LANES) : F32();
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        auto* to = c + i * c_row + v * LANES;
        (F32((__m512)sums[i][v]) + added(to, of_column)).store(to);
      }
    }
  };
  if (o.accumulate) finish([](const auto* before, F32) { return F32::load(before); });
  else finish([](const auto*, F32 bias) { return bias; });
}

template <int M = TILE, typename Word>
void tile_of(int64_t m, const Product<Word>& o, Ahead& next_a, int64_t lines, const Ahead& next_c) {
  if (m >= M) return tile<M>(o, next_a, lines, next_c);
  if constexpr (M > 1) tile_of<M - 1>(m, o, next_a, lines, next_c);
}

// m rows of C by `panels` panels: a tile's rows of A stay in L1 while B's panels pass. next_b: what will be packed then.
template <typename Word>
void multiply_group(const Product<Word>& o, int64_t m, int64_t panels, Ahead next_b = {}) {
  const int64_t tiles = (m + TILE - 1) / TILE;
  const auto bound = [&](int64_t t) { return m * std::min(t, tiles) / tiles; };  // rows as equal as can be
  // between 16 steps, to have a tile's rows of A in time, or all of a panel of B
  const int64_t lines = next_b.rows ? (PANEL<Word> + tiles - 1) / tiles : (TILE + panels - 1) / panels;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t first = bound(t), end = bound(t + 1), later = bound(t + 2) - end;
    Product<Word> part = o;
    part.a += first * o.a_row, part.c += first * o.c_row;
    Ahead next_a = o.far_a ? Ahead::of(o.a + end * o.a_row, o.a_row, o.steps, later) : Ahead();
    for (int64_t p = 0; p < panels; p++, part.b += o.steps * PANEL<Word>, part.c += PANEL<Word>) {
      const bool last = p == panels - 1;
      const auto* c = last ? o.c + end * o.c_row : part.c + PANEL<Word>;
      tile_of(end - first, part, next_b.rows ? next_b : next_a, lines,
              o.far_c ? Ahead::of(c, o.c_row, PANEL<Word>, last ? later : end - first) : Ahead());
      if (part.bias) part.bias += PANEL<Word>;
    }
  }
}

template <typename Word>
int64_t group_of(int64_t steps) { return std::max<int64_t>(1, group_bytes() / (steps * PANEL<Word> * 4 + 1)); }

// A as it lies. Threads share out columns and rows; some steps of a panel of B, the rows or, transposed, the columns of
// panel_of(panel, first step), are packed once for each part of rows.
template <typename Word, typename PanelOf>
void multiply_rows(const Product<Word>& o, int64_t m, int64_t n_panels, bool transpose_b, PanelOf&& panel_of) {
  constexpr int64_t PACKING = 64;  // a panel's packing takes the time of so many rows
  const bool few = std::is_same_v<Word, float> && m < FEW_ROWS;
  const int64_t longest = longest_stretch<Word>(m), stretches = std::max<int64_t>(1, (o.steps - 1) / longest + 1);
  const int64_t stretch = round_up(std::max<int64_t>(1, (o.steps + stretches - 1) / stretches), WORDS<Word>);
  const int64_t threads = at::get_num_threads(), G = few ? 1 : group_of<Word>(stretch);
  int64_t column_parts = 1, row_parts = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t c = 1; c <= std::min(n_panels, threads); c++) {
    const int64_t r = std::min(threads / c, std::max<int64_t>(1, m / PACKING));
    const int64_t cost = (n_panels + c - 1) / c * ((m + r - 1) / r + PACKING);
    if (cost < least) least = cost, column_parts = c, row_parts = r;
  }
  const auto pack = [&](int64_t p, int64_t first, int64_t steps, Word* packed) {
    const int64_t inner = steps * DEPTH<Word>;
    if (transpose_b) {
      Word* block = scratch<Word, 2>(WORDS<Word> * round_up(steps, WORDS<Word>));
      pack_columns<Word>(panel_of(p, first), PANEL<Word>, inner, packed, PANEL<Word>, block);
    } else {
      pack_rows<Word>(panel_of(p, first), inner, PANEL<Word>, packed, PANEL<Word>);
    }
  };
  const auto ahead = [&](int64_t p, int64_t first) {
    const auto b = panel_of(p, first);
    const int64_t inner = std::min(stretch, o.steps - first) * DEPTH<Word>;
    return transpose_b ? Ahead::of(b.data, b.stride, inner, PANEL<Word>) : Ahead::of(b.data, b.stride, PANEL<Word>, inner);
  };
  at::parallel_for(0, column_parts * row_parts, 1, [&](int64_t begin, int64_t end) {
    Word* packed = scratch<Word, 0>(G * stretch * PANEL<Word>);
    for (int64_t part = begin; part < end; part++) {
      const int64_t c = part / row_parts, r = part % row_parts, last = n_panels * (c + 1) / column_parts;
      const int64_t first_row = m * r / row_parts, rows = m * (r + 1) / row_parts - first_row;
      for (int64_t p = n_panels * c / column_parts; p < last; p += G) {
        const int64_t panels = std::min(G, last - p), at = p * PANEL<Word>;
        for (int64_t first = 0; first == 0 || first < o.steps; first += stretch) {
          Product<Word> part_of = o;
          part_of.a += first_row * o.a_row + first;
          part_of.b = packed;
          part_of.steps = std::min(stretch, o.steps - first);
          part_of.c += first_row * o.c_row + at;
          part_of.accumulate = first > 0;
          if (o.bias) part_of.bias += at;
          for (int64_t i = 0; i < panels; i++) pack(p + i, first, part_of.steps, packed + i * part_of.steps * PANEL<Word>);
          const bool goes_on = first + stretch < o.steps, ends = !goes_on && p + 1 == last;
          multiply_group(part_of, rows, panels,
                         !few || ends ? Ahead() : goes_on ? ahead(p, first + stretch) : ahead(p + 1, 0));
        }
      }
    }
  });
}

// C (m, n) = a [b_0 b_1 …] + bias of a (m, k) and several b, all (k, n / their number) or, transposed, (n / number, k).
template <typename Word>
void multiply(element_t<Word>* c, const element_t<Word>* a, at::ArrayRef<const element_t<Word>*> bs,
              const element_t<Word>* bias, int64_t m, int64_t n, int64_t k, bool transpose_b) {
  using element = element_t<Word>;
  // what the last writer left in the caches that are near need not be asked for; in bf16 C is half, and never was
  constexpr int64_t FAR = std::is_same_v<Word, Pair> ? NEAR : NEAR / 8;
  const auto beyond = [m](int64_t columns) { return m * columns * static_cast<int64_t>(sizeof(element)) > FAR; };
  Product<Word> product{reinterpret_cast<const Word*>(a), k / DEPTH<Word>, 1, nullptr, k / DEPTH<Word>, bias, c, n};
  product.far_a = beyond(k);
  product.far_c = std::is_same_v<Word, float> && beyond(n);
  const int64_t width = n / static_cast<int64_t>(bs.size());
  multiply_rows(product, m, n / PANEL<Word>, transpose_b, [&](int64_t p, int64_t first) {
    const int64_t column = p * PANEL<Word>, at = column % width, from = first * DEPTH<Word>;
    const element* b = bs[column / width];
    return transpose_b ? Rows<const element>{b + at * k + from, k} : Rows<const element>{b + from * width + at, width};
  });
}

}  // namespace

bool gemm_takes_few_rows() {
  static const bool intel = __builtin_cpu_is("intel");
  return intel;
}

void gemm(float* c, const float* a, at::ArrayRef<const float*> bs, const float* bias, int64_t m, int64_t n, int64_t k) {
  multiply<float>(c, a, bs, bias, m, n, k, true);
}

namespace {

#if defined(__AVX512BF16__)
using BF16 = c10::BFloat16;

// C (m, n) = a^T b of a (k, m), b (k, n): b is packed once for all, each thread weaves its own columns of a.
void multiply_transposed(BF16* c, const BF16* a, const BF16* b, int64_t m, int64_t n, int64_t k) {
  const int64_t steps = steps_of<Pair>(k), n_panels = n / PANEL<Pair>, size = steps * PANEL<Pair>, G = group_of<Pair>(steps);
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
        multiply_group<Pair>({woven, 1, WOVEN, packed + p * size, steps, nullptr, c + i * n + p * PANEL<Pair>, n}, rows,
                             std::min(G, n_panels - p));
    }
  });
}
#endif

// a (M, K) or, transposed, (K, M); b (K, N) or, transposed, (N, K); bias (N,) -> (M, N)
at::Tensor gemm_cpu(const at::Tensor& a_, const at::Tensor& b_, const std::optional<at::Tensor>& bias_,
                    bool transpose_a, bool transpose_b) {
  TORCH_CHECK(a_.dim() == 2 && b_.dim() == 2, "gemm: a and b must be matrices, got ", a_.sizes(), " and ", b_.sizes());
  const bool bf16 = a_.scalar_type() == at::kBFloat16;
  TORCH_CHECK_NOT_IMPLEMENTED(bf16 || a_.scalar_type() == at::kFloat, "gemm on CPU takes float32 and bfloat16, not ",
                              a_.scalar_type());
  CHECK_SAME_DTYPE(a_, b_);
  const int64_t m = a_.size(transpose_a ? 1 : 0), k = a_.size(transpose_a ? 0 : 1), n = b_.size(transpose_b ? 0 : 1);
  TORCH_CHECK(b_.size(transpose_b ? 1 : 0) == k, "gemm: ", a_.sizes(), " and ", b_.sizes(), " do not fit");
  TORCH_CHECK(n % PANEL<float> == 0 && (transpose_a || k % 2 == 0), "gemm: N must be a multiple of 64, K of 2, got ", n,
              " and ", k);
  TORCH_CHECK(!(transpose_a && (transpose_b || bias_)), "gemm: a transposed a takes neither a transposed b nor a bias");
  if (bf16 ? !BF16_BUILT : transpose_a) {
    const at::Tensor left = transpose_a ? a_.t() : a_, right = transpose_b ? b_.t() : b_;
    return bias_ ? at::addmm(*bias_, left, right) : at::mm(left, right);
  }
  const at::Tensor a = a_.contiguous(), b = b_.contiguous(), c = empty({m, n}, a.options());
  at::Tensor bias;
  if (bias_) {
    CHECK_SHAPE(*bias_, n);
    CHECK_SAME_DTYPE(a, *bias_);
    bias = bias_->contiguous();
  }
  const auto run = [&]<typename Word>(Word) {
    using element = element_t<Word>;
    const auto pointer = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<element>() : nullptr; };
    element* out = c.mutable_data_ptr<element>();
    if constexpr (std::is_same_v<Word, Pair>)
      if (transpose_a) return multiply_transposed(out, pointer(a), pointer(b), m, n, k);
    multiply<Word>(out, pointer(a), {pointer(b)}, pointer(bias), m, n, k, transpose_b);
  };
#if defined(__AVX512BF16__)
  if (bf16) return run(Pair{}), c;
#endif
  run(float{});
  return c;
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) { m.impl("gemm", &bertfast::gemm_cpu); }
TORCH_LIBRARY_FRAGMENT(bertfast, m) {
  m.def("gemm_multiplies_bf16() -> bool", [] { return bertfast::BF16_BUILT; });
  m.def("gemm_takes_few_rows() -> bool", [] { return bertfast::gemm_takes_few_rows(); });
}

#endif
