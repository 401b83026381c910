// Matrix products of tiles that lie in cache, for kernels that do something else with the result than store it.
//
// A word is what one lane of one instruction multiplies: a float, a double, or a Pair of bf16 (vdpbf16ps: two
// products, summed in fp32). A product C (M, N) = A (M, K) B (K, N) takes K / DEPTH steps of a word each, and
// keeps ROWS rows of C by up to four registers of columns in registers (register blocking of Goto and van de Geijn
// 2008). Words of A lie anywhere (a stride for rows, one for steps: the transpose costs nothing); B lies packed in
// panels of `width` columns, a panel's steps one after another.
#pragma once

#include "common.h"

namespace bertfast {

struct Pair {  // k even in the low half, k odd in the high half
  uint32_t bits;
};

#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64, MAX_VECTORS = 4;
constexpr int64_t rows_of_tile(int64_t vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int64_t REGISTER = 32, MAX_VECTORS = 2;
constexpr int64_t rows_of_tile(int64_t) { return 6; }
#endif

template <typename Word>
struct Tile {  // float and double
  using element = Word;
  using acc = Word;
  typedef acc Register __attribute__((vector_size(REGISTER)));
  static Register broadcast(Word a) { return a - Register{}; }  // a - 0 is a, whatever its sign
  static Register multiply_add(Register a, Register b, Register c) { return a * b + c; }
};
template <>
struct Tile<Pair> {
  using element = c10::BFloat16;
  using acc = float;
  typedef float Register __attribute__((vector_size(REGISTER)));
#if defined(__AVX512BF16__)
  static Register broadcast(Pair a) { return (Register)_mm512_set1_epi32(static_cast<int>(a.bits)); }
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
#endif
};

#if defined(__AVX512BF16__)
// Whether bf16 goes faster in Pairs than widened to fp32: AMD (Zen 4 on) runs a vdpbf16ps, twice the work, in the time of
// one fp32 multiply-add, Intel in that of four (Emerald Rapids: 87 and 179 GFLOP/s a core).
inline bool pairs_are_fast() {
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
}
#endif

template <typename Word> using element_t = typename Tile<Word>::element;
template <typename Word> using tile_acc_t = typename Tile<Word>::acc;
template <typename Word> constexpr int64_t DEPTH = sizeof(Word) / sizeof(element_t<Word>);
template <typename Word> constexpr int64_t WORDS = REGISTER / sizeof(Word);  // words of a register
template <typename Word> constexpr int64_t PANEL = MAX_VECTORS * WORDS<Word>;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
template <typename Word>
constexpr int64_t steps_of(int64_t k) { return (k + DEPTH<Word> - 1) / DEPTH<Word>; }
// The width of the panels that n columns are packed in: as few panels as there can be, equally wide.
template <typename Word>
constexpr int64_t panel_width(int64_t n) {
  const int64_t panels = (n + PANEL<Word> - 1) / PANEL<Word>;
  return round_up((n + panels - 1) / panels, std::max(LANES, WORDS<Word>));
}
// Words of n columns packed in panels.
template <typename Word>
constexpr int64_t packed_size(int64_t k, int64_t n) {
  const int64_t width = panel_width<Word>(n);
  return round_up(n, width) * steps_of<Word>(k);
}

template <typename Word>
inline auto load_register(const void* p) {  // any alignment
  typename Tile<Word>::Register r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
template <typename Word>
inline void store_register(void* p, typename Tile<Word>::Register r) { std::memcpy(p, &r, sizeof(r)); }

// ---- one tile of C in registers ----

template <typename Word>
struct Operands {
  const Word* a;
  int64_t a_row, a_step;
  const Word* b;
  int64_t b_step, steps;
  tile_acc_t<Word>* c;
  int64_t c_row;
  bool accumulate;
};

template <typename Word, int M, int VECTORS>
void multiply_tile(const Operands<Word>& o) {
  using T = Tile<Word>;
  typename T::Register sums[M][VECTORS] = {};
  const Word *a = o.a, *b = o.b;
  for (int64_t step = 0; step < o.steps; step++, a += o.a_step, b += o.b_step) {
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
  const auto store = [&](auto&& f) {
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) f(o.c + i * o.c_row + v * WORDS<Word>, sums[i][v]);
    }
  };
  if (o.accumulate) store([](auto* c, auto sum) { store_register<Word>(c, load_register<Word>(c) + sum); });
  else store([](auto* c, auto sum) { store_register<Word>(c, sum); });
}

template <typename Word, int VECTORS, size_t... I>
inline void multiply_rows(int64_t m, const Operands<Word>& o, std::index_sequence<I...>) {
  static constexpr void (*kernels[])(const Operands<Word>&) = {&multiply_tile<Word, I + 1, VECTORS>...};
  kernels[m - 1](o);
}
template <typename Word, int VECTORS>
void multiply_panel(int64_t m, Operands<Word> o) {
  constexpr int64_t ROWS = rows_of_tile(VECTORS);
  for (; m > 0; m -= ROWS, o.a += ROWS * o.a_row, o.c += ROWS * o.c_row)
    multiply_rows<Word, VECTORS>(std::min(m, ROWS), o, std::make_index_sequence<ROWS>());
}

// ---- the product ----

// C (m, n) = A B, or C += A B. A: word (row i, step s) at a[i * a_row + s * a_step]. B: as pack_rows or pack_columns
// left it, `b_steps` steps packed, the first `steps` multiplied. C is written up to n rounded up to whole registers.
template <typename Word>
void multiply(const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t width, int64_t b_steps,
              int64_t steps, tile_acc_t<Word>* c, int64_t c_row, int64_t m, int64_t n, bool accumulate) {
  constexpr int64_t STEPS_IN_L1 = 128;  // a panel's chunk of 32 KiB stays in L1 for all rows
  for (int64_t first = 0; first < steps; first += STEPS_IN_L1) {
    for (int64_t j = 0; j < n; j = std::min(j + PANEL<Word>, round_up(j + 1, width))) {
      const int64_t panel = j / width * width, columns = std::min({PANEL<Word>, panel + width - j, n - j});
      const Word* start = b + panel * b_steps + first * width + (j - panel);
      const Operands<Word> o{a + first * a_step, a_row, a_step, start, width, std::min(STEPS_IN_L1, steps - first),
                             c + j, c_row, accumulate || first > 0};
      switch ((columns + WORDS<Word> - 1) / WORDS<Word>) {
        case 1: multiply_panel<Word, 1>(m, o); break;
        case 2: multiply_panel<Word, 2>(m, o); break;
#if defined(__AVX512F__)
        case 3: multiply_panel<Word, 3>(m, o); break;
        default: multiply_panel<Word, 4>(m, o);
#endif
      }
    }
  }
}

#if defined(__AVX512F__)
// C (m, n) = a [b_0^T b_1^T …] + bias in the caller's threads, in fp32: a (m, k), b_i (n / their number, k); in gemm.cpp.
void gemm(float* c, const float* a, at::ArrayRef<const float*> bs, const float* bias, int64_t m, int64_t n, int64_t k);
bool gemm_takes_few_rows();  // in fp32: whether below 256 rows it is faster than PyTorch's, as measured
#endif

// ---- packing ----

template <typename T>
struct Rows {  // row i of a matrix starts at data + i * stride
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
  Rows from(int64_t i) const { return {data + i * stride, stride}; }
};

// Operands of fewer bytes were left in the L2 caches by whoever wrote them: asking for them early only costs.
constexpr int64_t NEAR = 2 << 20;

// Brings n rows of k elements into the caches. Loads all at once wait for memory together, where packing and arithmetic
// would wait row by row: no prefetcher follows rows that lie far apart. (Of prefetches so close Zen 4 drops two in three.)
template <typename T>
void touch(Rows<T> x, int64_t n, int64_t k) {
  uint8_t bytes = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < k; j += 64 / static_cast<int64_t>(sizeof(T))) bytes |= *reinterpret_cast<const uint8_t*>(x[i] + j);
  asm volatile("" : : "r"(bytes));
}

// n rows of k elements as rows of words, `stride` words apart, zeros after the last element: how A is laid.
template <typename Word, typename scalar_t>
void copy_rows(Rows<const scalar_t> x, int64_t n, int64_t k, Word* out, int64_t stride) {
  for (int64_t i = 0; i < n; i++) {
    auto* row = reinterpret_cast<element_t<Word>*>(out + i * stride);
    for_columns(k, [&](int64_t j, auto size) { Vec<tile_acc_t<Word>>::load(x[i] + j, size).store(row + j, size); });
    if (k % DEPTH<Word> != 0) row[k] = 0;
  }
}

// B = X, (k rows, n columns): float and double widened, a Pair woven of two rows.
template <typename Word, typename scalar_t>
void pack_rows(Rows<const scalar_t> x, int64_t k, int64_t n, Word* out, int64_t width) {
  const int64_t steps = steps_of<Word>(k);
  for (int64_t first = 0; first < n; first += width) {
    for (int64_t s = 0; s < steps; s++) {
      Word* words = out + first * steps + s * width;
      const int64_t columns = std::min(width, n - first);
      for_columns(columns, [&](int64_t j, auto size) {
        const int64_t from = first + j;
        if constexpr (!std::is_same_v<Word, Pair>) {
          Vec<Word>::load(x[s] + from, size).store(words + j);
        } else {
#if defined(__AVX512BF16__)
          const auto even = F32::load(x[2 * s] + from, size);
          const auto odd = 2 * s + 1 < k ? F32::load(x[2 * s + 1] + from, size) : F32();
          const auto low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
          _mm512_storeu_si512(words + j, _mm512_or_si512(low, _mm512_castps_si512(odd.v)));
#endif
        }
      });
      if (const int64_t end = round_up(columns, LANES); end < width)
        std::memset(static_cast<void*>(words + end), 0, (width - end) * sizeof(Word));
    }
  }
}

// Lane j of register i and lane i of register j change places: halves are swapped across the diagonal, then quarters.
template <typename T, int HALF, int... I>
inline void transpose(typename Tile<T>::Register* r, std::integer_sequence<int, I...> lanes) {
  constexpr int N = sizeof...(I);
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) {
    if (i & HALF) continue;
    const auto a = r[i], b = r[i + HALF];
    r[i] = __builtin_shufflevector(a, b, (I & HALF ? N + I - HALF : I)...);
    r[i + HALF] = __builtin_shufflevector(a, b, (I & HALF ? N + I : I + HALF)...);
  }
  if constexpr (HALF > 1) transpose<T, HALF / 2>(r, lanes);
}

// B = X^T, X being (n rows, k columns). `block` holds WORDS rows of steps_of(k) words rounded up to WORDS.
template <typename Word, typename scalar_t>
void pack_columns(Rows<const scalar_t> x, int64_t n, int64_t k, Word* out, int64_t width, Word* block) {
  using T = tile_acc_t<Word>;  // moved as bits
  constexpr int64_t N = WORDS<Word>;
  const int64_t steps = steps_of<Word>(k), stride = round_up(steps, N);
  for (int64_t i = 0; i < round_up(n, std::max(LANES, N)); i += N) {
    const int64_t rows = std::clamp<int64_t>(n - i, 0, N);
    Rows<const Word> from{block, stride};
    if (std::is_same_v<Word, scalar_t> && rows == N && k % N == 0) {  // words already
      from = {reinterpret_cast<const Word*>(x[i]), x.stride};
    } else {
      copy_rows(x.from(i), rows, k, block, stride);
      if (rows < N) std::memset(static_cast<void*>(block + rows * stride), 0, (N - rows) * stride * sizeof(Word));
    }
    Word* panel = out + i / width * width * steps + i % width;
    for (int64_t s = 0; s < steps; s += N) {
      typename Tile<T>::Register r[N];
#pragma GCC unroll 16
      for (int64_t j = 0; j < N; j++) r[j] = load_register<T>(from[j] + s);
      transpose<T, N / 2>(r, std::make_integer_sequence<int, N>());
#pragma GCC unroll 16
      for (int64_t j = 0; j < N; j++)
        if (s + j < steps) store_register<T>(panel + (s + j) * width, r[j]);
    }
  }
}

}  // namespace bertfast
