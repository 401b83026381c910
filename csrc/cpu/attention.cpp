// softmax(scale Q K^T + mask) V over packed sequences, and its gradients: bertfast/ops/attention.py is the law.
//
// A task is one head of one sequence. Its K and V are packed once, as the matrix products want them; then blocks of
// query rows go through: scores of a block (BLOCK x keys, in cache), softmax in place, product with V. A mask is one
// number a row: the keys that a query sees are always the first `visible` ones.
// The backward recomputes the probabilities of a block from lse, forms P and dS in place of the scores and of
// dout V^T, and adds P^T dout and dS^T Q to sums that belong to the task: no atomics, the same result every time.
#include "gemm_tile.h"

#include <torch/library.h>

#include <atomic>
#include <bit>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace bertfast {
namespace {

constexpr int64_t BLOCK = 48;  // query rows; a multiple of every tile's rows, and even
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

inline Mask lanes(Whole) { return mask_of(0xffff); }
inline Mask lanes(Tail t) { return t.mask(); }

inline F32 exp2(F32 x) {  // within 1 ulp for x <= 128: 2^n times a polynomial in the rest, minimax on [-1/2, 1/2]
  x = max(F32(-160.0f), x);  // 0 anyway; and so that minus infinity has a rest
  const F32 n = round(x), r = x - n;
  F32 q = fma(r, F32(0.00015353362f), F32(0.0013398875f));
  q = fma(r, q, F32(0.00961843692f));
  q = fma(r, q, F32(0.0555033237f));
  q = fma(r, q, F32(0.240226477f));
  q = fma(r, q, F32(0.693147182f));
  return times_two_to(fma(r, q, F32(1.0f)), n);
}
inline F64 exp2(const F64& x) { return each_lane([&](int64_t i) { return std::exp2(x.v[i]); }); }

inline float log2(float x) {  // of a normal number, within 2 ulp; without a call or a branch, so that loops vectorise
  const int32_t bits = std::bit_cast<int32_t>(x), n = (bits - std::bit_cast<int32_t>(0.75f)) >> 23;
  const float m = std::bit_cast<float>(bits - (n << 23)), s = (m - 1) / (m + 1), z = s * s;  // 3/4 <= m < 3/2
  const float series = ((((z / 9 + 1.0f / 7) * z + 0.2f) * z + 1.0f / 3) * z + 1) * s;       // atanh(s)
  return static_cast<float>(n) + series * static_cast<float>(2 * LOG2_E) + (x - x);           // a NaN stays one
}
inline double log2(double x) { return std::log2(x); }

struct Problem {
  const int32_t *cu_q, *cu_k;
  int64_t n_sequences, n_heads, head_dim, n_queries, n_keys;
  double scale;
  int64_t mask_mode;
  const int32_t* prefix_lens;  // or nullptr
  const int64_t* row_keys;     // or nullptr: counted from the sequence's start
  Dropout dropout;
  bool from_memory;  // where q, k, v are larger than the caches

  int64_t queries(int64_t b) const { return cu_q[b + 1] - cu_q[b]; }
  int64_t keys(int64_t b) const { return cu_k[b + 1] - cu_k[b]; }
  int64_t row_key(int64_t b, int64_t i) const { return row_keys ? row_keys[cu_q[b] + i] : (b << 32) + i; }
  int64_t visible(int64_t b, int64_t i) const {
    if (mask_mode == 0) return keys(b);
    int64_t n = (row_key(b, i) & 0xffffffff) + 1;
    if (mask_mode == 2) n = std::max<int64_t>(n, prefix_lens[b]);
    return std::min(n, keys(b));
  }
};

template <typename T>
struct Heads {  // a (rows, n_heads, head_dim) tensor with contiguous head_dim
  T* data;
  int64_t row_stride, head_stride;
  Rows<T> at(int64_t row, int64_t head) const { return {data + row * row_stride + head * head_stride, row_stride}; }
};

// Part `part` of `parts` of the query blocks of one head of one sequence.
struct Task {
  int64_t b, head, part, parts;

  template <typename F>  // f(first row, rows)
  void for_blocks(const Problem& p, F&& f) const {
    const int64_t n = p.queries(b), blocks = (n + BLOCK - 1) / BLOCK;
    for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; i++)
      f(i * BLOCK, std::min(BLOCK, n - i * BLOCK));
  }
};

// How often a head's queries are split so that every thread has work: once, unless there are few heads.
int64_t parts_of(const Problem& p) {
  const int64_t threads = at::get_num_threads(), heads = std::max<int64_t>(1, p.n_sequences * p.n_heads);
  return threads == 1 ? 1 : std::clamp<int64_t>((4 * threads + heads - 1) / heads, 1, 4 * threads);
}

// Runs f(task) for all, the longest sequences first, each thread taking the next when it is done: who computes a
// task doesn't change its result.
template <typename F>
void for_tasks(const Problem& p, int64_t parts, F&& f) {
  std::vector<int64_t> order(p.n_sequences);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return p.queries(a) * p.keys(a) > p.queries(b) * p.keys(b);
  });
  const int64_t each = p.n_heads * parts, n = p.n_sequences * each;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < n;) f(Task{order[i / each], i % each / parts, i % parts, parts});
  });
}

template <typename T, typename acc>
void zero_columns(T* row, int64_t from, int64_t to) {
  for (int64_t j = round_up(from, LANES); j < to; j += LANES) Vec<acc>().store(row + j);
}

template <typename acc>
acc scaled_max(const acc* scores, int64_t n, acc scale) {
  const Vec<acc> factor(scale), lowest(-std::numeric_limits<acc>::infinity());
  Vec<acc> highest = lowest;
  for_columns(n, [&](int64_t j, auto size) {
    highest = max(highest, select(lanes(size), Vec<acc>::load(scores + j) * factor, lowest));
  });
  return max(highest);
}

// One row of scores becomes scale * score - max, the highest exactly 0: what no rounding of a large max can spoil.
template <typename acc>
void centre(acc* scores, int64_t n, acc scale, acc max) {
  for_columns(n, [&](int64_t j, auto) {
    (unfused(Vec<acc>::load(scores + j) * Vec<acc>(scale)) - Vec<acc>(max)).store(scores + j);
  });
}

// One row of scores becomes 2^(scale * score - max), dropped ones 0, as elements of words, in place. Returns the sum,
// dropped ones included.
template <typename Word, bool DROP, typename acc = tile_acc_t<Word>>
acc exponentiate(acc* scores, int64_t n, int64_t width, acc scale, acc max, const Dropout& dropout, int64_t row_key,
                 int64_t head) {
  const Vec<acc> factor(scale), minus_max(-max);
  if (std::abs(max) > acc(0x1p24)) {  // max was rounded by more than 1, so that the highest score might give 0 or inf
    centre(scores, n, scale, max);
    return exponentiate<Word, DROP>(scores, n, width, acc(1), acc(0), dropout, row_key, head);
  }
  Vec<acc> total;
  auto* out = reinterpret_cast<element_t<Word>*>(scores);  // never ahead of what is still to be read
  for_columns_dropped<DROP>(n, dropout, row_key, [&](int64_t j, auto size, const Mask& kept) {
    const Vec<acc> e = keep(size, exp2(fma(Vec<acc>::load(scores + j), factor, minus_max)));
    total += e;
    (DROP ? keep(kept, e) : e).store(out + j);
  }, head);
  zero_columns<element_t<Word>, acc>(out, n, width);
  return sum(total);
}

// One row of scores and of dP = dout V^T becomes P with dropped elements 0, and P (dP M - delta), in place.
template <typename Word, bool DROP, typename acc = tile_acc_t<Word>>
void softmax_gradient_row(const Problem& p, acc* scores, acc* dp, int64_t n, int64_t width, acc scale_, acc lse2,
                          acc delta, int64_t row_key, int64_t head) {
  if (n > 0 && std::abs(lse2) > acc(64)) {  // rounded so far that P would be off in its 18th bit: from the scores again
    centre(scores, n, scale_, scaled_max(scores, n, scale_));
    Vec<acc> total;
    for_columns(n, [&](int64_t j, auto size) { total += keep(size, exp2(Vec<acc>::load(scores + j))); });
    return softmax_gradient_row<Word, DROP>(p, scores, dp, n, width, acc(1), log2(sum(total)), delta, row_key, head);
  }
  const Vec<acc> scale(scale_), keep_scale(static_cast<acc>(p.dropout.scale));
  const Vec<acc> minus_lse(-lse2), minus_delta(-delta);
  auto* out = reinterpret_cast<element_t<Word>*>(scores);
  auto* ds_out = reinterpret_cast<element_t<Word>*>(dp);
  for_columns_dropped<DROP>(n, p.dropout, row_key, [&](int64_t j, auto size, const Mask& kept) {
    const Vec<acc> e = keep(size, exp2(fma(Vec<acc>::load(scores + j), scale, minus_lse)));
    const Vec<acc> g = keep(size, Vec<acc>::load(dp + j));
    const Vec<acc> ds = e * (DROP ? fma(keep(kept, g), keep_scale, minus_delta) : g + minus_delta);
    (DROP ? keep(kept, e) : e).store(out + j);
    ds.store(ds_out + j);
  }, head);
  zero_columns<element_t<Word>, acc>(out, n, width);
  zero_columns<element_t<Word>, acc>(ds_out, n, width);
}

// out (n, k) = factor * sums, and zeros.
template <typename acc, typename scalar_t>
void store_row(scalar_t* out, const acc* sums, int64_t k, acc factor) {
  for_columns(k, [&](int64_t j, auto size) { (Vec<acc>::load(sums + j) * Vec<acc>(factor)).store(out + j, size); });
}
template <typename scalar_t>
void zero_rows(Heads<scalar_t> x, const Problem& p, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i++)
    for (int64_t head = 0; head < p.n_heads; head++) std::fill_n(x.at(i, head).data, p.head_dim, scalar_t(0));
}

// Carves the buffers of a task out of the thread's scratch.
struct Carver {
  char* base = nullptr;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(n * static_cast<int64_t>(sizeof(T)), 64) + 64;  // a line apart: no two on the same cache sets
    return p;
  }
};
// Gives the members of Buffers(carver, problem, keys) their place: measured first, then carved.
template <typename Buffers>
Buffers carve(const Problem& p, int64_t n_keys) {
  Carver carver;
  Buffers(carver, p, n_keys);
  carver = {scratch<char>(carver.used), 0};
  return Buffers(carver, p, n_keys);
}

// ---- forward ----

template <typename Word>
struct ForwardBuffers {
  using acc = tile_acc_t<Word>;
  int64_t steps, dim, score_stride;
  Word *keys, *values, *block, *queries;
  acc *scores, *out;

  ForwardBuffers(Carver& c, const Problem& p, int64_t n_keys)
      : steps(round_up(steps_of<Word>(p.head_dim), WORDS<Word>)),
        dim(round_up(p.head_dim, LANES)),
        score_stride(round_up(n_keys, LANES) + LANES),  // odd in cache lines, so that a column isn't one set
        keys(c.take<Word>(packed_size<Word>(p.head_dim, n_keys))),
        values(c.take<Word>(packed_size<Word>(n_keys, p.head_dim))),
        block(c.take<Word>(LANES * steps)),
        queries(c.take<Word>(BLOCK * steps)),
        scores(c.take<acc>(BLOCK * score_stride)),
        out(c.take<acc>(BLOCK * dim)) {}
};

template <typename Word, bool DROP, typename scalar_t>
void forward_task(const Problem& p, const Task& task, Heads<const scalar_t> q, Heads<const scalar_t> k,
                  Heads<const scalar_t> v, Heads<scalar_t> out, tile_acc_t<Word>* lse) {
  using acc = tile_acc_t<Word>;
  const int64_t b = task.b, head = task.head, n_keys = p.keys(b), dim = p.head_dim;
  const auto buffers = carve<ForwardBuffers<Word>>(p, n_keys);
  const int64_t steps = steps_of<Word>(dim), key_width = panel_width<Word>(n_keys), dim_width = panel_width<Word>(dim);
  const auto keys = k.at(p.cu_k[b], head), values = v.at(p.cu_k[b], head);
  if (p.from_memory) touch(keys, n_keys, dim), touch(values, n_keys, dim);
  pack_columns<Word>(keys, n_keys, dim, buffers.keys, key_width, buffers.block);
  pack_rows<Word>(values, n_keys, dim, buffers.values, dim_width);
  task.for_blocks(p, [&](int64_t first, int64_t rows) {
    const int64_t row = p.cu_q[b] + first;
    int64_t seen = 0;
    for (int64_t i = 0; i < rows; i++) seen = std::max(seen, p.visible(b, first + i));
    if (p.from_memory) touch(q.at(row, head), rows, dim);
    copy_rows<Word>(q.at(row, head), rows, dim, buffers.queries, buffers.steps);
    multiply<Word>(buffers.queries, buffers.steps, 1, buffers.keys, key_width, steps, steps, buffers.scores,
                   buffers.score_stride, rows, seen, false);
    acc maxima[BLOCK], sums[BLOCK];
    const int64_t width = round_up(seen, LANES);
    const acc scale = static_cast<acc>(p.scale * LOG2_E);
    for (int64_t group = 0; group < rows; group += 4) {  // four rows at a time: one's reduction hides behind another's
      const int64_t end = std::min(rows, group + 4);
      for (int64_t i = group; i < end; i++)
        maxima[i] = scaled_max(buffers.scores + i * buffers.score_stride, p.visible(b, first + i), scale);
      for (int64_t i = group; i < end; i++)
        sums[i] = exponentiate<Word, DROP>(buffers.scores + i * buffers.score_stride, p.visible(b, first + i), width,
                                           scale, maxima[i], p.dropout, p.row_key(b, first + i), head);
    }
    for (int64_t i = 0; i < rows; i++) {  // a row without keys has max -inf and sum 0
      lse[head * p.n_queries + row + i] = sums[i] == 0 ? std::numeric_limits<acc>::infinity()
                                                       : static_cast<acc>((maxima[i] + log2(sums[i])) * LN_2);
      sums[i] = sums[i] == 0 ? acc(0) : static_cast<acc>(p.dropout.scale / sums[i]);
    }
    multiply<Word>(reinterpret_cast<const Word*>(buffers.scores), buffers.score_stride, 1, buffers.values, dim_width,
                   steps_of<Word>(n_keys), steps_of<Word>(seen), buffers.out, buffers.dim, rows, dim, false);
    for (int64_t i = 0; i < rows; i++)
      store_row(out.at(row + i, head).data, buffers.out + i * buffers.dim, dim, sums[i]);
  });
}

template <typename Word, typename scalar_t>
void forward(const Problem& p, Heads<const scalar_t> q, Heads<const scalar_t> k, Heads<const scalar_t> v,
             Heads<scalar_t> out, tile_acc_t<Word>* lse) {
  const auto task = p.dropout.active ? &forward_task<Word, true, scalar_t> : &forward_task<Word, false, scalar_t>;
  for_tasks(p, parts_of(p), [&](const Task& t) {
    if (p.keys(t.b) > 0) return task(p, t, q, k, v, out, lse);
    t.for_blocks(p, [&](int64_t first, int64_t rows) {
      const int64_t row = p.cu_q[t.b] + first;
      for (int64_t i = row; i < row + rows; i++) std::fill_n(out.at(i, t.head).data, p.head_dim, scalar_t(0));
      std::fill_n(lse + t.head * p.n_queries + row, rows, std::numeric_limits<tile_acc_t<Word>>::infinity());
    });
  });
  const int64_t end = p.cu_q[p.n_sequences];
  zero_rows(out, p, end, p.n_queries);
  for (int64_t head = 0; head < p.n_heads; head++)
    std::fill_n(lse + head * p.n_queries + end, p.n_queries - end, std::numeric_limits<tile_acc_t<Word>>::infinity());
}

// ---- backward ----

template <typename Word>
struct BackwardBuffers {
  using acc = tile_acc_t<Word>;
  int64_t steps, dim, score_stride;
  Word *keys, *values, *key_rows, *block, *queries, *douts, *query_rows, *dout_rows, *woven;
  acc *scores, *dp, *dq, *dkv;

  BackwardBuffers(Carver& c, const Problem& p, int64_t n_keys)
      : steps(round_up(steps_of<Word>(p.head_dim), WORDS<Word>)),
        dim(round_up(p.head_dim, LANES)),
        score_stride(round_up(n_keys, LANES) + LANES),
        keys(c.take<Word>(packed_size<Word>(p.head_dim, n_keys))),
        values(c.take<Word>(packed_size<Word>(p.head_dim, n_keys))),
        key_rows(c.take<Word>(packed_size<Word>(n_keys, p.head_dim))),
        block(c.take<Word>(LANES * steps)),
        queries(c.take<Word>(BLOCK * steps)),
        douts(c.take<Word>(BLOCK * steps)),
        query_rows(c.take<Word>(packed_size<Word>(BLOCK, p.head_dim))),
        dout_rows(c.take<Word>(packed_size<Word>(BLOCK, p.head_dim))),
        woven(c.take<Word>(DEPTH<Word> == 1 ? 0 : BLOCK / 2 * score_stride)),
        scores(c.take<acc>(BLOCK * score_stride)),
        dp(c.take<acc>(BLOCK * score_stride)),
        dq(c.take<acc>(BLOCK * dim)),
        dkv(c.take<acc>(2 * n_keys * dim)) {}
};

template <typename scalar_t>
struct Saved {
  Heads<const scalar_t> dout, q, k, v, out;
  const acc_t<scalar_t>* lse;
};

// sums (n_keys, dim) += X^T Y of a block: X (rows, n_keys) elements in the place of scores, Y packed rows.
template <typename Word>
void add_transposed_product(const tile_acc_t<Word>* x, int64_t stride, int64_t rows, int64_t n_keys, const Word* y,
                            int64_t width, Word* woven, tile_acc_t<Word>* sums, int64_t dim) {
  const Word* words = reinterpret_cast<const Word*>(x);
  if constexpr (DEPTH<Word> == 2) {  // pairs along the rows
    const auto* elements = reinterpret_cast<const element_t<Word>*>(x);
    pack_rows<Word>(Rows<const element_t<Word>>{elements, 2 * stride}, rows, n_keys, woven, stride);
    words = woven;
  }
  multiply<Word>(words, 1, stride, y, width, steps_of<Word>(rows), steps_of<Word>(rows), sums, dim, n_keys, dim, true);
}

// Adds the task's share of dk and dv, unscaled, to dkv (2, n_keys, round_up(dim, 16)), and writes its rows of dq.
template <typename Word, bool DROP, typename scalar_t>
void backward_task(const Problem& p, const Task& task, const Saved<scalar_t>& s, Heads<scalar_t> dq,
                   const BackwardBuffers<Word>& buffers, tile_acc_t<Word>* dkv) {
  using acc = tile_acc_t<Word>;
  const int64_t b = task.b, head = task.head, n_keys = p.keys(b), dim = p.head_dim;
  const int64_t steps = steps_of<Word>(dim), key_width = panel_width<Word>(n_keys), dim_width = panel_width<Word>(dim);
  acc *dk = dkv, *dv = dkv + n_keys * buffers.dim;
  const auto k = s.k.at(p.cu_k[b], head), v = s.v.at(p.cu_k[b], head);
  if (p.from_memory) touch(k, n_keys, dim), touch(v, n_keys, dim);
  pack_columns<Word>(k, n_keys, dim, buffers.keys, key_width, buffers.block);
  pack_columns<Word>(v, n_keys, dim, buffers.values, key_width, buffers.block);
  pack_rows<Word>(k, n_keys, dim, buffers.key_rows, dim_width);
  std::fill_n(dkv, 2 * n_keys * buffers.dim, acc(0));
  task.for_blocks(p, [&](int64_t first, int64_t rows) {
    const int64_t row = p.cu_q[b] + first, stride = buffers.score_stride;
    int64_t seen = 0;
    for (int64_t i = 0; i < rows; i++) seen = std::max(seen, p.visible(b, first + i));
    const auto q = s.q.at(row, head), dout = s.dout.at(row, head), out = s.out.at(row, head);
    if (p.from_memory) touch(q, rows, dim), touch(dout, rows, dim), touch(out, rows, dim);
    copy_rows<Word>(q, rows, dim, buffers.queries, buffers.steps);
    copy_rows<Word>(dout, rows, dim, buffers.douts, buffers.steps);
    pack_rows<Word>(q, rows, dim, buffers.query_rows, dim_width);
    pack_rows<Word>(dout, rows, dim, buffers.dout_rows, dim_width);
    multiply<Word>(buffers.queries, buffers.steps, 1, buffers.keys, key_width, steps, steps, buffers.scores, stride,
                   rows, seen, false);
    multiply<Word>(buffers.douts, buffers.steps, 1, buffers.values, key_width, steps, steps, buffers.dp, stride, rows,
                   seen, false);
    const acc* lse = s.lse + head * p.n_queries + row;
    acc deltas[BLOCK];
    for (int64_t i = 0; i < rows; i++) {
      Vec<acc> delta;
      for_columns(dim, [&](int64_t j, auto size) {
        delta = fma(Vec<acc>::load(dout[i] + j, size), Vec<acc>::load(out[i] + j, size), delta);
      });
      deltas[i] = sum(delta);
    }
    for (int64_t i = 0; i < rows; i++) {
      softmax_gradient_row<Word, DROP>(p, buffers.scores + i * stride, buffers.dp + i * stride, p.visible(b, first + i),
                                       round_up(seen, LANES), static_cast<acc>(p.scale * LOG2_E),
                                       static_cast<acc>(lse[i] * LOG2_E), deltas[i], p.row_key(b, first + i), head);
    }
    multiply<Word>(reinterpret_cast<const Word*>(buffers.dp), stride, 1, buffers.key_rows, dim_width,
                   steps_of<Word>(n_keys), steps_of<Word>(seen), buffers.dq, buffers.dim, rows, dim, false);
    for (int64_t i = 0; i < rows; i++)
      store_row(dq.at(row + i, head).data, buffers.dq + i * buffers.dim, dim, static_cast<acc>(p.scale));
    add_transposed_product<Word>(buffers.scores, stride, rows, seen, buffers.dout_rows, dim_width, buffers.woven, dv,
                                 buffers.dim);
    add_transposed_product<Word>(buffers.dp, stride, rows, seen, buffers.query_rows, dim_width, buffers.woven, dk,
                                 buffers.dim);
  });
}

template <typename Word, typename scalar_t>
void backward(const Problem& p, const Saved<scalar_t>& s, Heads<scalar_t> dq, Heads<scalar_t> dk, Heads<scalar_t> dv) {
  using acc = tile_acc_t<Word>;
  const auto run = p.dropout.active ? &backward_task<Word, true, scalar_t> : &backward_task<Word, false, scalar_t>;
  const int64_t parts = parts_of(p), dim = round_up(p.head_dim, LANES);
  const auto finish = [&](int64_t b, int64_t head, acc* dkv, int64_t stride) {  // the parts' sums lie `stride` apart
    const int64_t n = p.keys(b) * dim;
    for (int64_t part = 1; part < parts; part++)
      for (int64_t j = 0; j < 2 * n; j += LANES)
        (Vec<acc>::load(dkv + j) + Vec<acc>::load(dkv + part * stride + j)).store(dkv + j);
    const auto dk_rows = dk.at(p.cu_k[b], head), dv_rows = dv.at(p.cu_k[b], head);
    for (int64_t i = 0; i < p.keys(b); i++) {
      store_row(dk_rows[i], dkv + i * dim, p.head_dim, static_cast<acc>(p.scale));
      store_row(dv_rows[i], dkv + n + i * dim, p.head_dim, static_cast<acc>(p.dropout.scale));
    }
  };
  // a part's share waits in `shares` until all of the head's parts are there
  const int64_t share = 2 * p.n_heads * p.n_keys * dim;
  at::Tensor shares = empty({parts > 1 ? parts * share : 0}, c10::CppTypeToScalarType<acc>::value);
  const auto share_of = [&](const Task& t) {
    return shares.mutable_data_ptr<acc>() + t.part * share + 2 * dim * (t.head * p.n_keys + p.cu_k[t.b]);
  };
  for_tasks(p, parts, [&](const Task& t) {
    if (p.keys(t.b) == 0)
      return t.for_blocks(p, [&](int64_t first, int64_t rows) {
        const int64_t row = p.cu_q[t.b] + first;
        for (int64_t i = row; i < row + rows; i++) std::fill_n(dq.at(i, t.head).data, p.head_dim, scalar_t(0));
      });
    const auto buffers = carve<BackwardBuffers<Word>>(p, p.keys(t.b));
    acc* dkv = parts > 1 ? share_of(t) : buffers.dkv;
    run(p, t, s, dq, buffers, dkv);
    if (parts == 1) finish(t.b, t.head, dkv, 0);
  });
  if (parts > 1) for_tasks(p, 1, [&](const Task& t) { finish(t.b, t.head, share_of(t), share); });
  zero_rows(dq, p, p.cu_q[p.n_sequences], p.n_queries);
  zero_rows(dk, p, p.cu_k[p.n_sequences], p.n_keys);
  zero_rows(dv, p, p.cu_k[p.n_sequences], p.n_keys);
}

template <typename scalar_t, typename F>
void with_words(F&& f) {
  if constexpr (!std::is_same_v<scalar_t, c10::BFloat16>) {
    f(scalar_t());
  } else {
#if defined(__AVX512BF16__)
    if (pairs_are_fast()) return f(Pair());
#endif
    f(float());
  }
}

// ---- tensors ----

at::Tensor with_contiguous_dim(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

template <typename T>
Heads<const T> read(const at::Tensor& x) { return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)}; }
template <typename T>
Heads<T> write(const at::Tensor& x) { return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1)}; }

// Bounds (B+1,) int32 of sequences in `rows` rows.
const int32_t* checked_bounds(const at::Tensor& cu, const char* name, int64_t rows) {
  TORCH_CHECK(cu.scalar_type() == at::kInt && cu.dim() == 1 && cu.numel() >= 1 && cu.is_contiguous(), name,
              " must be a contiguous int32 vector of at least one element, got ", cu.scalar_type(), " ", cu.sizes());
  const int32_t* bounds = cu.const_data_ptr<int32_t>();
  TORCH_CHECK(bounds[0] == 0 && std::is_sorted(bounds, bounds + cu.numel()) && bounds[cu.numel() - 1] <= rows, name,
              " must start at 0, not fall, and end within the ", rows, " rows");
  return bounds;
}

Problem problem_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_q,
                   const at::Tensor& cu_k, double scale, int64_t mask_mode,
                   const std::optional<at::Tensor>& prefix_lens, double p, const std::optional<at::Tensor>& seed,
                   const std::optional<at::Tensor>& row_key, int64_t stream) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(2) > 0, "q and k must be (rows, heads, head_dim), got ", q.sizes(),
              " and ", k.sizes());
  CHECK_SHAPE(k, k.size(0), q.size(1), q.size(2));
  CHECK_SHAPE(v, k.size(0), q.size(1), q.size(2));
  CHECK_SAME_DTYPE(q, k);
  CHECK_SAME_DTYPE(q, v);
  CHECK_SAME_DTYPE(cu_q, cu_k);
  CHECK_SHAPE(cu_k, cu_q.size(0));
  TORCH_CHECK(0 <= mask_mode && mask_mode <= 2, "mask_mode must be 0, 1 or 2, got ", mask_mode);
  Problem r{checked_bounds(cu_q, "cu_seqlens_q", q.size(0)), checked_bounds(cu_k, "cu_seqlens_k", k.size(0)),
            cu_q.numel() - 1, q.size(1), q.size(2), q.size(0), k.size(0), scale, mask_mode, nullptr, nullptr,
            Dropout(p, seed, stream), static_cast<int64_t>(q.nbytes() + k.nbytes() + v.nbytes()) > NEAR};
  if (mask_mode == 2) {
    TORCH_CHECK(prefix_lens && prefix_lens->scalar_type() == at::kInt && prefix_lens->is_contiguous(),
                "prefix masks need prefix_lens, contiguous int32");
    CHECK_SHAPE(*prefix_lens, r.n_sequences);
    r.prefix_lens = prefix_lens->const_data_ptr<int32_t>();
  }
  if (row_key) {
    TORCH_CHECK(row_key->scalar_type() == at::kLong && row_key->is_contiguous(), "q_row_key must be contiguous int64");
    CHECK_SHAPE(*row_key, q.size(0));
    r.row_keys = row_key->const_data_ptr<int64_t>();
  }
  return r;
}

std::tuple<at::Tensor, at::Tensor> attention_fwd_cpu(
    const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& cu_q, const at::Tensor& cu_k,
    int64_t, int64_t, double scale, int64_t mask_mode, const std::optional<at::Tensor>& prefix_lens, double p,
    const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& row_key, int64_t stream) {
  const Problem problem = problem_of(q_, k_, v_, cu_q, cu_k, scale, mask_mode, prefix_lens, p, seed, row_key, stream);
  const at::Tensor q = with_contiguous_dim(q_), k = with_contiguous_dim(k_), v = with_contiguous_dim(v_);
  at::Tensor out = empty(q.sizes(), q.options());
  const auto statistics = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor lse = empty({q.size(1), q.size(0)}, q.options().dtype(statistics));
  DISPATCH_SCALAR(q.scalar_type(), "attention", [&] {
    with_words<scalar_t>([&](auto word) {
      forward<decltype(word), scalar_t>(problem, read<scalar_t>(q), read<scalar_t>(k), read<scalar_t>(v),
                                        write<scalar_t>(out), lse.mutable_data_ptr<acc_t<scalar_t>>());
    });
  });
  return {out, lse};
}

void backward_into(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const at::Tensor& dout_,
                   const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& out_,
                   const at::Tensor& lse_, const Problem& problem) {
  CHECK_SHAPE(dout_, q_.size(0), q_.size(1), q_.size(2));
  CHECK_SHAPE(out_, q_.size(0), q_.size(1), q_.size(2));
  CHECK_SHAPE(lse_, q_.size(1), q_.size(0));
  CHECK_SAME_DTYPE(q_, dout_);
  CHECK_SAME_DTYPE(q_, out_);
  const at::Tensor dout = with_contiguous_dim(dout_), q = with_contiguous_dim(q_), k = with_contiguous_dim(k_),
                   v = with_contiguous_dim(v_), out = with_contiguous_dim(out_), lse = lse_.contiguous();
  DISPATCH_SCALAR(q.scalar_type(), "attention", [&] {
    with_words<scalar_t>([&](auto word) {
      backward<decltype(word), scalar_t>(
          problem, {read<scalar_t>(dout), read<scalar_t>(q), read<scalar_t>(k), read<scalar_t>(v), read<scalar_t>(out),
                    lse.const_data_ptr<acc_t<scalar_t>>()},
          write<scalar_t>(dq), write<scalar_t>(dk), write<scalar_t>(dv));
    });
  });
}

std::tuple<at::Tensor, at::Tensor> attention_bwd_cpu(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_q, const at::Tensor& cu_k, int64_t, int64_t, double scale,
    int64_t mask_mode, const std::optional<at::Tensor>& prefix_lens, double p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& row_key, int64_t stream) {
  const Problem problem = problem_of(q, k, v, cu_q, cu_k, scale, mask_mode, prefix_lens, p, seed, row_key, stream);
  at::Tensor dq = empty(q.sizes(), q.options());
  at::Tensor dkv = empty({k.size(0), 2, k.size(1), k.size(2)}, k.options());
  backward_into(dq, dkv.select(1, 0), dkv.select(1, 1), dout, q, k, v, out, lse, problem);
  return {dq, dkv};
}

at::Tensor attention_packed_bwd_cpu(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_q, const at::Tensor& cu_k, int64_t, int64_t, double scale,
    int64_t mask_mode, const std::optional<at::Tensor>& prefix_lens, double p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& row_key, int64_t stream) {
  const Problem problem = problem_of(q, k, v, cu_q, cu_k, scale, mask_mode, prefix_lens, p, seed, row_key, stream);
  CHECK_SHAPE(k, q.size(0), q.size(1), q.size(2));
  at::Tensor dqkv = empty({q.size(0), 3, q.size(1), q.size(2)}, q.options());
  backward_into(dqkv.select(1, 0), dqkv.select(1, 1), dqkv.select(1, 2), dout, q, k, v, out, lse, problem);
  return dqkv;
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("attention_fwd", &bertfast::attention_fwd_cpu);
  m.impl("attention_bwd", &bertfast::attention_bwd_cpu);
  m.impl("attention_packed_bwd", &bertfast::attention_packed_bwd_cpu);
}
