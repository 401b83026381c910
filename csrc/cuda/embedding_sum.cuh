// y = dropout(LayerNorm(word[ids] + position[ids] + token_type[ids])) and its backward; formulas and shapes in
// bertfast/ops/embedding_sum.py.
//
// The backward gathers z again and leaves dz and partial column sums. One kernel, the segment sum, makes the gradients
// of the three tables out of dz and those of LayerNorm's parameters out of the partial sums: rows in the order of their
// ids, in pieces of fixed length. What a piece sees whole it adds to the table; what the piece's ends cut is handed on
// as a shorter list of rows to the same kernel. So a word that fills half the batch is shared by many blocks, nothing
// is added by atomics, and the same input gives the same bits.
#pragma once

#include "common.cuh"

namespace bertfast {

struct Ids {
  const int64_t *word, *position, *token_type;  // (T,)
};

template <typename T>
struct Tables {
  const T *word, *position, *token_type;  // (V, H), (positions, H), (types, H)
};

// z (this lane's values) of one row; returns their sum. Values outside the row are 0.
template <typename S, typename T>
__device__ __forceinline__ float gather(float (&z)[S::VALUES], const Ids& ids, const Tables<T>& tables, int64_t row,
                                        int n_columns) {
  using P = Pack<T, S::VECTOR>;
  const T* word = tables.word + ids.word[row] * n_columns;
  const T* position = tables.position + ids.position[row] * n_columns;
  const T* token_type = tables.token_type + ids.token_type[row] * n_columns;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < S::VALUES; i++) z[i] = 0.f;
  S::for_packs(n_columns, [&](int column, int first) {
    const P a = P::load(word + column), b = P::load(position + column), c = P::load(token_type + column);
#pragma unroll
    for (int i = 0; i < S::VECTOR; i++) {
      z[first + i] = to_float(a.values[i]) + to_float(b.values[i]) + to_float(c.values[i]);
      total += z[first + i];
    }
  });
  return total;
}

// Sets this lane's bits of the row's dropout mask, one for each value; all ones without dropout.
template <typename S>
__device__ __forceinline__ uint32_t keep_bits(const Dropout& dropout, int64_t row) {
  if (!dropout.seed) return 0xffffffffu;
  const KeepRow keep(dropout, row);
  uint32_t mask = 0;
#pragma unroll
  for (int chunk = 0; chunk < S::CHUNKS; chunk++) {
    const int first = chunk * S::CHUNK + static_cast<int>(threadIdx.x) / WARP * WARP * S::VECTOR;
    mask |= (keep.template bits<S::VECTOR>(first) & ((1u << S::VECTOR) - 1)) << (chunk * S::VECTOR);
  }
  return mask;
}

template <typename S, typename T>
__global__ void __launch_bounds__(S::THREADS* S::ROWS)
    embedding_sum_fwd_kernel(T* y, float* mean, float* rstd,  // (T, H), (T,), (T,)
                             Ids ids, Tables<T> tables, const T* weight, const T* bias, float eps, Dropout dropout,
                             int64_t n_rows, int n_columns) {
  using P = Pack<T, S::VECTOR>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * S::ROWS + threadIdx.y;
  if (row >= n_rows) return;  // all threads of the row together
  float z[S::VALUES];
  const float mu = S::row_sum(gather<S>(z, ids, tables, row, n_columns)) / n_columns;
  float squares = 0.f;
  S::for_packs(n_columns, [&](int, int first) {
#pragma unroll
    for (int i = 0; i < S::VECTOR; i++) squares += (z[first + i] - mu) * (z[first + i] - mu);
  });
  const float reciprocal = rsqrtf(S::row_sum(squares) / n_columns + eps);
  if (threadIdx.x == 0) mean[row] = mu, rstd[row] = reciprocal;
  const uint32_t kept = keep_bits<S>(dropout, row);
  S::for_packs(n_columns, [&](int column, int first) {
    const P w = P::load(weight + column), b = P::load(bias + column);
    P out;
#pragma unroll
    for (int i = 0; i < S::VECTOR; i++) {
      const float x_hat = (z[first + i] - mu) * reciprocal;
      const float value = x_hat * to_float(w.values[i]) + to_float(b.values[i]);
      from_float(kept >> (first + i) & 1 ? value * dropout.scale : 0.f, out.values[i]);
    }
    out.store(y + row * n_columns + column);
  });
}

// dz, and for each of the gridDim.x * ROWS groups of threads the sums of dy * x_hat and dy over the rows it had.
template <typename S, typename T>
__global__ void __launch_bounds__(S::THREADS* S::ROWS)
    embedding_sum_bwd_kernel(float* dz, float* dweight_parts, float* dbias_parts,  // (T, H), (groups, H) twice
                             const T* dy, Ids ids, Tables<T> tables, const T* weight, const float* mean,
                             const float* rstd, Dropout dropout, int64_t n_rows, int n_columns) {
  using P = Pack<T, S::VECTOR>;
  using F = Pack<float, S::VECTOR < 4 ? S::VECTOR : 4>;
  constexpr int FLOATS = S::VECTOR < 4 ? S::VECTOR : 4;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * S::ROWS + threadIdx.y;
  float dweight[S::VALUES] = {}, dbias[S::VALUES] = {};
  for (int64_t row = group; row < n_rows; row += static_cast<int64_t>(gridDim.x) * S::ROWS) {
    float x_hat[S::VALUES], g[S::VALUES];
    gather<S>(x_hat, ids, tables, row, n_columns);
    const float mu = mean[row], reciprocal = rstd[row];
    const uint32_t kept = keep_bits<S>(dropout, row);
    float sum_g = 0.f, sum_gx = 0.f;
    S::for_packs(n_columns, [&](int column, int first) {
      const P dy_pack = P::load(dy + row * n_columns + column), w = P::load(weight + column);
#pragma unroll
      for (int i = 0; i < S::VECTOR; i++) {
        const int at = first + i;
        const float dy_i = kept >> at & 1 ? to_float(dy_pack.values[i]) * dropout.scale : 0.f;
        x_hat[at] = (x_hat[at] - mu) * reciprocal;
        g[at] = dy_i * to_float(w.values[i]);
        sum_g += g[at];
        sum_gx += g[at] * x_hat[at];
        dweight[at] += dy_i * x_hat[at];
        dbias[at] += dy_i;
      }
    });
    const float c1 = S::row_sum(sum_g) / n_columns, c2 = S::row_sum(sum_gx) / n_columns;
    S::for_packs(n_columns, [&](int column, int first) {
#pragma unroll
      for (int i = 0; i < S::VECTOR; i += FLOATS) {
        F out;
#pragma unroll
        for (int k = 0; k < FLOATS; k++) {
          out.values[k] = (g[first + i + k] - c1 - c2 * x_hat[first + i + k]) * reciprocal;
        }
        out.store(dz + row * n_columns + column + i);
      }
    });
  }
  S::for_packs(n_columns, [&](int column, int first) {
#pragma unroll
    for (int i = 0; i < S::VECTOR; i += FLOATS) {
      F of_weight, of_bias;
#pragma unroll
      for (int k = 0; k < FLOATS; k++) {
        of_weight.values[k] = dweight[first + i + k], of_bias.values[k] = dbias[first + i + k];
      }
      of_weight.store(dweight_parts + group * n_columns + column + i);
      of_bias.store(dbias_parts + group * n_columns + column + i);
    }
  });
}

constexpr int PIECE = 64;             // rows of a piece of the segment sum
constexpr int AHEAD = 8;              // of which a thread loads so many at once: one by one each waits for memory
constexpr int64_t NO_SEGMENT = -1;    // the id of a cut row that holds nothing
constexpr int SEGMENT_THREADS = 128;  // of a block

// table[id] += the sum of the rows with that id. rows (n, H) and their ids (n,), null if all are 0, in the order given
// by `order` (n,), null for their own: there the ids ascend; `skipped`, an id whose rows count nowhere, or NO_SEGMENT.
// A launch of several pieces leaves what they cut in cuts (2 * pieces, H) and cut_ids (2 * pieces,).
template <typename T, int VECTOR>
__global__ void __launch_bounds__(SEGMENT_THREADS)
    segment_sum_kernel(T* table, float* cuts, int64_t* cut_ids, const float* rows, const int64_t* order,
                       const int64_t* ids, int64_t skipped, int64_t n, int n_columns) {
  using F = Pack<float, VECTOR>;
  const int64_t piece = blockIdx.x, begin = piece * PIECE, end = begin + PIECE < n ? begin + PIECE : n;
  const int column = (blockIdx.y * SEGMENT_THREADS + threadIdx.x) * VECTOR;
  if (column >= n_columns) return;
  const bool whole = gridDim.x == 1;
  F total;
  int64_t id = NO_SEGMENT;
  int cut = 0;  // cut rows written: the first segment of the piece is one, and its last
  const auto leave = [&] {
    total.store(cuts + (2 * piece + cut) * n_columns + column);
    if (column == 0) cut_ids[2 * piece + cut] = id;
    cut++;
  };
  const auto add_to_table = [&] {
    using P = Pack<T, VECTOR>;
    if (id == skipped) return;
    P to = P::load(table + id * n_columns + column);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) from_float(to_float(to.values[i]) + total.values[i], to.values[i]);
    to.store(table + id * n_columns + column);
  };
  for (int64_t first = begin; first < end; first += AHEAD) {
    int64_t next_id[AHEAD];
    F next[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int64_t i = first + k < end ? first + k : end - 1, at = order ? order[i] : i;
      next_id[k] = first + k >= end ? NO_SEGMENT : ids ? ids[at] : 0;
      next[k] = F::load(rows + at * n_columns + column);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      if (next_id[k] == NO_SEGMENT) continue;
      if (next_id[k] == id) {
#pragma unroll
        for (int c = 0; c < VECTOR; c++) total.values[c] += next[k].values[c];
        continue;
      }
      if (id != NO_SEGMENT) {
        if (whole || cut == 1) {
          add_to_table();
        } else {
          leave();
        }
      }
      id = next_id[k], total = next[k];
    }
  }
  if (whole) {
    if (id != NO_SEGMENT) add_to_table();
    return;
  }
  if (id != NO_SEGMENT) leave();
  if (column == 0) {
    for (; cut < 2; cut++) cut_ids[2 * piece + cut] = NO_SEGMENT;
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many cut rows all launches of a segment sum over n rows need.
inline int64_t cut_rows(int64_t n) {
  int64_t total = 0;
  for (int64_t pieces = divide_up(n, PIECE); pieces > 1; pieces = divide_up(2 * pieces, PIECE)) total += 2 * pieces;
  return total;
}

template <typename T, typename Stream>
void segment_sum(T* table, float* cuts, int64_t* cut_ids, const float* rows, const int64_t* order, const int64_t* ids,
                 int64_t skipped, int64_t n, int n_columns, Stream stream) {
  while (n > 0) {
    const int64_t pieces = divide_up(n, PIECE);
    const int vector = n_columns % 4 ? 1 : 4;
    const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(divide_up(n_columns, SEGMENT_THREADS * vector)));
    const dim3 block(SEGMENT_THREADS);
    if (vector == 4) {
      LAUNCH((segment_sum_kernel<T, 4>), grid, block, stream, table, cuts, cut_ids, rows, order, ids, skipped, n, n_columns);
    } else {
      LAUNCH((segment_sum_kernel<T, 1>), grid, block, stream, table, cuts, cut_ids, rows, order, ids, skipped, n, n_columns);
    }
    if (pieces == 1) break;
    rows = cuts, ids = cut_ids, order = nullptr, n = 2 * pieces;
    cuts += n * n_columns, cut_ids += n;
  }
}

constexpr int MAX_COLUMNS = 8192;
constexpr int MAX_ODD_COLUMNS = 5120;  // that do not fill packs of 16 bytes: more of them would spill

// Calls f(Shape) with the narrowest shape that holds a row of n_columns.
template <typename T, typename F>
void with_shape(int n_columns, F&& f) {
  constexpr int VECTOR = 16 / sizeof(T);
  if (n_columns % VECTOR) return n_columns <= 512 ? f(Shape<1, 16, 1>{}) : f(Shape<1, 10, 16>{});
  if (n_columns <= 256) return f(Shape<VECTOR, 8, 1>{});
  if (n_columns <= 512) return f(Shape<VECTOR, 16, 1>{});
  if (n_columns <= 768) return f(Shape<VECTOR, 24, 1>{});
  if (n_columns <= 1024) return f(Shape<VECTOR, 32, 1>{});
  if (n_columns <= 2048) return f(Shape<VECTOR, 32, 2>{});
  if (n_columns <= 4096) return f(Shape<VECTOR, 32, 4>{});
  return f(Shape<VECTOR, 32, 8>{});
}

template <typename T, typename Stream>
void embedding_sum_fwd(T* y, float* mean, float* rstd, Ids ids, Tables<T> tables, const T* weight, const T* bias,
                       float eps, Dropout dropout, int64_t n_rows, int n_columns, Stream stream) {
  if (!n_rows) return;
  with_shape<T>(n_columns, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid(static_cast<unsigned>(divide_up(n_rows, S::ROWS))), block(S::THREADS, S::ROWS);
    LAUNCH((embedding_sum_fwd_kernel<S, T>), grid, block, stream, y, mean, rstd, ids, tables, weight, bias, eps, dropout,
           n_rows, n_columns);
  });
}

// How many groups of threads, each with partial sums of its own, share the rows of a backward on n_blocks blocks.
template <typename T>
int64_t backward_groups(int n_columns, int64_t n_blocks) {
  int64_t groups = 0;
  with_shape<T>(n_columns, [&](auto shape) { groups = n_blocks * decltype(shape)::ROWS; });
  return groups;
}

template <typename T, typename Stream>
void embedding_sum_bwd(float* dz, float* dweight_parts, float* dbias_parts, const T* dy, Ids ids, Tables<T> tables,
                       const T* weight, const float* mean, const float* rstd, Dropout dropout, int64_t n_rows,
                       int n_columns, int64_t n_blocks, Stream stream) {
  with_shape<T>(n_columns, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid(static_cast<unsigned>(n_blocks)), block(S::THREADS, S::ROWS);
    LAUNCH((embedding_sum_bwd_kernel<S, T>), grid, block, stream, dz, dweight_parts, dbias_parts, dy, ids, tables, weight,
           mean, rstd, dropout, n_rows, n_columns);
  });
}

}  // namespace bertfast
