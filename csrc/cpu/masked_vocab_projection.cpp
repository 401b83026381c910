// Cross entropy of the masked rows against the tied vocabulary, with its gradients; the logits are never a tensor.
//
// The vocabulary is cut into tiles whose logits stay in L2, and each thread owns a run of them. Logits are formed
// transposed, (vocab, rows): rows are the lanes, so the softmax needs no horizontal step, and the weight is read as
// it lies. Two sweeps over the tiles, since the gradient needs the softmax's denominator:
//   statistics   logits = weight . hidden^T; per tile and row their maximum m and the sum of exp(logit - m). Kept for
//                the second sweep: exp(logit - m), (vocab, rows), the only scratch that grows with both. bf16 keeps
//                it in fp16, whose 11 bits leave the rounding of dlogits to bf16 the only one that counts
//   gradients    dlogits = kept * exp(m - maximum) / sum * scale, less scale at the label;  dweight = dlogits . hidden, each
//                row written once;  dhidden += dlogits^T . weight, a partial sum a thread;  dbias = sums of rows
// The idea of a loss without logits in memory is that of Wijmans et al. 2024, "Cut your losses in large-vocabulary
// language models"; keeping 2 bytes a logit instead of recomputing it saves a quarter of the multiplications.
//
// Where there is AMX the products go to it (amx.h).

#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "amx.h"
#include "common.h"
#include "gemm_tile.h"

namespace bertfast {
namespace {

constexpr int64_t IGNORE_INDEX = -100;
constexpr int64_t TILE = 144;                        // about so many vocabulary rows a tile
constexpr int64_t TILE_MULTIPLE = 24;                // whole register tiles of 6 or 8 rows
constexpr int64_t KEPT_BYTES = int64_t{64} << 20;    // rows that would need more are taken in several chunks
constexpr int64_t LEAST_ROWS = 64;                   // of a chunk
constexpr int64_t TABLE_BYTES = int64_t{8} << 20;    // of a weight that the last call may have left in L3

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- softmax of a tile ----

inline void store_kept(at::Half* p, F32 a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
#endif
}
inline F32 load_kept(const at::Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
#endif
}
template <typename acc>
inline void store_kept(acc* p, const Vec<acc>& a) { a.store(p); }
template <typename acc>
inline Vec<acc> load_kept(const acc* p) { return Vec<acc>::load(p); }

template <typename scalar_t>
using kept_t = std::conditional_t<std::is_same_v<scalar_t, c10::BFloat16>, at::Half, scalar_t>;
// What is kept is exp(logit - m) * KEPT_SCALE: at most 2^15 where fp16's range has to be used well.
template <typename scalar_t>
constexpr float KEPT_SCALE = std::is_same_v<scalar_t, c10::BFloat16> ? 0x1p15f : 1.0f;

// Of N * 16 rows and n_vocab logits each: adds the bias in place, and finds the maximum, the sum of exponentials, and
// these themselves if `kept`.
template <typename scalar_t, int N, typename acc = acc_t<scalar_t>>
void softmax(int64_t n_vocab, acc* logits, int64_t stride, const acc* bias, acc* maximum, acc* sum,
             kept_t<scalar_t>* kept, int64_t kept_stride) {
  Vec<acc> m[N], s[N];
  for (int n = 0; n < N; n++) m[n] = Vec<acc>(std::numeric_limits<acc>::lowest());
  for (int64_t v = 0; v < n_vocab; v++) {
    for (int n = 0; n < N; n++) {
      acc* p = logits + v * stride + n * LANES;
      const Vec<acc> x = Vec<acc>::load(p) + Vec<acc>(bias[v]);
      x.store(p);
      m[n] = max(m[n], x);
    }
  }
  for (int n = 0; n < N; n++) m[n].store(maximum + n * LANES);
  for (int64_t v = 0; v < n_vocab; v++) {
    for (int n = 0; n < N; n++) {
      const Vec<acc> e = exp(Vec<acc>::load(logits + v * stride + n * LANES) - m[n]);
      s[n] += e;
      if (kept) store_kept(kept + v * kept_stride + n * LANES, e * Vec<acc>(KEPT_SCALE<scalar_t>));
    }
  }
  for (int n = 0; n < N; n++) s[n].store(sum + n * LANES);
}

// ---- one chunk of rows ----

// The weight gradient's buffer (V, H), in the compute dtype or in the accumulation's; none if both are null.
template <typename scalar_t>
struct Buffer {
  scalar_t* narrow = nullptr;
  acc_t<scalar_t>* wide = nullptr;
};

template <typename scalar_t, typename Word>
struct Chunk {
  using acc = acc_t<scalar_t>;
  using Kept = kept_t<scalar_t>;
  using Element = element_t<Word>;
  template <typename T>
  using RowsOf = Rows<const T>;

  const scalar_t *hidden, *weight, *bias;  // (R, H) the rows of the chunk, (V, H), (V,)
  const int64_t* labels;                   // (R,)
  int64_t R, H, V;

  const bool by_amx = std::is_same_v<Word, Pair> && amx_works();
  // R and H in whole blocks, in words, in panels; V in tiles, a run of which is a part
  const int64_t lanes = round_up(R, LANES), columns = round_up(H, LANES);
  const int64_t r_steps = steps_of<Word>(R), h_steps = steps_of<Word>(H);
  const int64_t r_width = panel_width<Word>(lanes), h_width = panel_width<Word>(columns);
  const int64_t threads = at::get_num_threads();
  const int64_t tile = round_up(div_up(V, round_up(div_up(V, TILE), threads)), TILE_MULTIPLE);
  const int64_t n_tiles = div_up(V, tile), parts = std::min(threads, n_tiles);
  const bool from_memory = V * H * static_cast<int64_t>(sizeof(scalar_t)) > TABLE_BYTES;

  Word* across = scratch<Word, 0>(packed_size<Word>(H, lanes));  // hidden^T: rows are lanes
  Word* down = scratch<Word, 1>(packed_size<Word>(R, columns));  // hidden: columns are lanes
  acc* maxima = scratch<acc, 2>(2 * n_tiles * lanes);            // (n_tiles, lanes), and the sums after them
  acc* sums = maxima + n_tiles * lanes;
  acc* maximum = scratch<acc, 3>(5 * lanes);  // (lanes,) each: over the whole vocabulary
  acc* sum_exp = maximum + lanes;
  acc* log_sum = sum_exp + lanes;
  acc* label_logit = log_sum + lanes;      // from combine() on the logarithm of the label's probability
  acc* label_leads = label_logit + lanes;  // 1 where the label's logit is the argmax of its tile

  // C (m, n) = A B, or C += A B: A has rows of `a_row` words, B is a panel.
  void multiply_panel_of(const Word* a, int64_t a_row, const Word* b, int64_t width, int64_t steps, acc* c, int64_t c_row,
                         int64_t m, int64_t n, bool accumulate) const {
    if constexpr (std::is_same_v<Word, Pair>)
      if (by_amx) return multiply_by_amx(a, a_row, b, width, steps, c, c_row, m, round_up(n, LANES), accumulate);
    multiply<Word>(a, a_row, 1, b, width, steps, steps, c, c_row, m, n, accumulate);
  }

  void pack() const {
    at::parallel_for(0, div_up(lanes, r_width), 1, [&](int64_t first, int64_t last) {
      Word* block = scratch<Word, 4>(WORDS<Word> * round_up(h_steps, WORDS<Word>));
      for (int64_t r = first * r_width; r < std::min(last * r_width, lanes); r += r_width)
        pack_columns<Word>(RowsOf<scalar_t>{hidden + r * H, H}, std::min(r_width, R - r), H, across + r * h_steps, r_width, block);
    });
    at::parallel_for(0, div_up(columns, h_width), 1, [&](int64_t first, int64_t last) {
      for (int64_t h = first * h_width; h < std::min(last * h_width, columns); h += h_width)
        pack_rows<Word>(RowsOf<scalar_t>{hidden + h, H}, R, std::min(h_width, H - h), down + h * r_steps, h_width);
    });
  }

  void statistics(Kept* kept) const {
    for_parts(n_tiles, parts, [&](int64_t, int64_t first, int64_t last) {
      const bool copies = !std::is_same_v<Element, scalar_t> || H % DEPTH<Word> != 0;
      Word* copy = copies ? scratch<Word, 4>(tile * h_steps) : nullptr;
      acc* logits = scratch<acc, 5>(tile * r_width);
      acc* tile_bias = scratch<acc, 6>(tile);
      for (int64_t t = first; t < last; t++) {
        const int64_t v0 = t * tile, n_vocab = std::min(tile, V - v0);
        if (from_memory) touch(RowsOf<scalar_t>{weight + v0 * H, H}, n_vocab, H);
        if (copies) copy_rows<Word>(RowsOf<scalar_t>{weight + v0 * H, H}, n_vocab, H, copy, h_steps);
        const Word* left = copies ? copy : reinterpret_cast<const Word*>(weight + v0 * H);
        std::copy_n(bias + v0, n_vocab, tile_bias);
        for (int64_t r = 0; r < lanes; r += r_width) {
          const int64_t n = std::min(r_width, lanes - r);
          multiply_panel_of(left, h_steps, across + r * h_steps, r_width, h_steps, logits, r_width, n_vocab, n, false);
          const auto softmax_of = [&]<int N>(std::integral_constant<int, N>) {
            softmax<scalar_t, N>(n_vocab, logits, r_width, tile_bias, maxima + t * lanes + r, sums + t * lanes + r,
                                 kept ? kept + v0 * lanes + r : nullptr, lanes);
          };
          switch (n / LANES) {
            case 1: softmax_of(std::integral_constant<int, 1>()); break;
            case 2: softmax_of(std::integral_constant<int, 2>()); break;
            case 3: softmax_of(std::integral_constant<int, 3>()); break;
            default: softmax_of(std::integral_constant<int, 4>());
          }
          for (int64_t i = r; i < std::min(r + n, R); i++)
            if (labels[i] >= v0 && labels[i] < v0 + n_vocab) look_at_label(i, logits + i - r, labels[i] - v0, n_vocab);
        }
      }
      if (by_amx) at::native::cpublas::brgemm_release();
    });
  }

  void look_at_label(int64_t i, const acc* logits, int64_t label, int64_t n_vocab) const {
    const acc x = label_logit[i] = logits[label * r_width];
    bool leads = true;
    for (int64_t v = 0; v < n_vocab; v++) leads &= v < label ? logits[v * r_width] < x : logits[v * r_width] <= x;
    label_leads[i] = leads;
  }

  // Maximum and sum of exponentials of whole rows; adds to the loss and to the number of right predictions.
  void combine(double& loss_sum, int64_t& n_correct) const {
    for (int64_t r = 0; r < lanes; r += LANES) {
      Vec<acc> m(std::numeric_limits<acc>::lowest());
      for (int64_t t = 0; t < n_tiles; t++) m = max(m, Vec<acc>::load(maxima + t * lanes + r));
      m.store(maximum + r);
      double total[LANES] = {};  // a sure prediction is 1 and many a term that fp32 would lose beside it
      for (int64_t t = 0; t < n_tiles; t++) {
        acc share[LANES];
        (Vec<acc>::load(sums + t * lanes + r) * exp(Vec<acc>::load(maxima + t * lanes + r) - m)).store(share);
        for (int64_t i = 0; i < LANES; i++) total[i] += share[i];
      }
      for (int64_t i = 0; i < LANES; i++) {
        sum_exp[r + i] = total[i] * KEPT_SCALE<scalar_t>;
        log_sum[r + i] = std::log(total[i]);
      }
    }
    for (int64_t r = 0; r < R; r++) {
      bool leads = label_leads[r] != 0;
      for (int64_t t = 0; t < n_tiles; t++) {  // the first of equal logits counts, as in argmax
        const acc m = maxima[t * lanes + r];
        leads &= t < labels[r] / tile ? m < label_logit[r] : m <= label_logit[r];
      }
      n_correct += leads;
      label_logit[r] = label_logit[r] - maximum[r] - log_sum[r];
      loss_sum -= label_logit[r];
    }
  }

  // A tile's dlogits as left operands: by vocabulary row (n_vocab, lanes), and woven for products over the vocabulary
  // (n_vocab / DEPTH, lanes words), the same thing if a word is one element. Adds their row sums to dbias.
  void form_dlogits(int64_t t, Kept* kept, acc scale, acc* factor, Element* by_vocab, Word* woven, double* dbias) const {
    const int64_t v0 = t * tile, n_vocab = std::min(tile, V - v0);
    for (int64_t r = 0; r < lanes; r += LANES) {
      const Vec<acc> share = exp(Vec<acc>::load(maxima + t * lanes + r) - Vec<acc>::load(maximum + r));
      (share * Vec<acc>(scale) / Vec<acc>::load(sum_exp + r)).store(factor + r);
    }
    std::fill(factor + R, factor + lanes, acc(0));
    kept += v0 * lanes;
    const auto at_labels = [&](auto&& f) {
      for (int64_t r = 0; r < R; r++)
        if (labels[r] >= v0 && labels[r] < v0 + n_vocab) f(r, labels[r] - v0);
    };
    at_labels([&](int64_t r, int64_t v) { kept[v * lanes + r] = 0; });
    for (int64_t v = 0; v < n_vocab; v += DEPTH<Word>) {
      Vec<acc> row_sums[2];
      for (int64_t r = 0; r < lanes; r += LANES) {
        const auto f = Vec<acc>::load(factor + r);
        const Vec<acc> even = load_kept(kept + v * lanes + r) * f;
        row_sums[0] += even;
        if constexpr (std::is_same_v<Word, Pair>) {
#if defined(__AVX512BF16__)
          const F32 odd = v + 1 < n_vocab ? load_kept(kept + (v + 1) * lanes + r) * f : F32();
          row_sums[1] += odd;
          const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_vocab + v * lanes + r), _mm512_castsi512_si256(both));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_vocab + (v + 1) * lanes + r), _mm512_extracti64x4_epi64(both, 1));
          const __m512i low_first = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                     22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
          _mm512_storeu_si512(woven + v / 2 * lanes + r, _mm512_permutexvar_epi16(low_first, both));
#endif
        } else {
          even.store(by_vocab + v * lanes + r);
        }
      }
      for (int64_t i = v; i < std::min(v + DEPTH<Word>, n_vocab); i++) dbias[v0 + i] += sum(row_sums[i - v]);
    }
    at_labels([&](int64_t r, int64_t v) {  // p - 1, without the rounding of what was kept
      const acc d = std::expm1(label_logit[r]) * scale;
      dbias[labels[r]] += d;
      by_vocab[v * lanes + r] = static_cast<Element>(d);
      if constexpr (DEPTH<Word> > 1)
        reinterpret_cast<Element*>(woven + v / DEPTH<Word> * lanes + r)[v % DEPTH<Word>] = static_cast<Element>(d);
    });
  }

  // Words (steps, lanes) as (lanes, steps), for AMX, which reads rows: `row` of them are written, in whole registers.
  void turn(const Word* woven, int64_t steps, Word* turned, int64_t row) const {
    constexpr int N = WORDS<Word>;
    for (int64_t r = 0; r < lanes; r += N) {
      for (int64_t s = 0; s < steps; s += N) {
        typename Tile<acc>::Register words[N] = {};
        for (int64_t i = 0; i < std::min<int64_t>(N, steps - s); i++) words[i] = load_register<acc>(woven + (s + i) * lanes + r);
        transpose<acc, N / 2>(words, std::make_integer_sequence<int, N>());
        for (int64_t i = 0; i < N; i++) store_register<acc>(turned + (r + i) * row + s, words[i]);
      }
    }
  }

  // dweight = block (+ prior), n_vocab rows of n columns; `at`: where they lie in (V, H).
  void write_dweight(const acc* block, int64_t n_vocab, int64_t n, Buffer<scalar_t> prior, Buffer<scalar_t> dweight, int64_t at) const {
    for (int64_t v = 0; v < n_vocab; v++, at += H, block += h_width) {
      for_columns(n, [&](int64_t h, auto size) {
        Vec<acc> x = Vec<acc>::load(block + h, size);
        if (prior.narrow) x += Vec<acc>::load(prior.narrow + at + h, size);
        if (prior.wide) x += Vec<acc>::load(prior.wide + at + h, size);
        if (dweight.narrow) x.store(dweight.narrow + at + h, size);
        else x.store(dweight.wide + at + h, size);
      });
    }
  }

  // dbias (V,) is added to; dweight = prior + ...; dhidden is (the whole call's R, H), `index` its rows of this chunk.
  void gradients(Kept* kept, acc scale, Buffer<scalar_t> prior, Buffer<scalar_t> dweight, double* dbias,
                 scalar_t* dhidden, const int64_t* index) const {
    acc* partial = scratch<acc, 7>(parts * R * columns);
    for_parts(n_tiles, parts, [&](int64_t part, int64_t first, int64_t last) {
      const int64_t tile_steps = steps_of<Word>(tile), row_words = lanes / DEPTH<Word>;
      acc* block = scratch<acc, 5>(tile * h_width);
      acc* factor = scratch<acc, 6>(lanes);
      Word* by_vocab = scratch<Word, 4>(tile * row_words);
      Word* woven = DEPTH<Word> > 1 ? scratch<Word, 8>(tile_steps * lanes) : by_vocab;
      Word* panel = scratch<Word, 9>(tile_steps * h_width);
      const int64_t turned_row = round_up(tile_steps, WORDS<Word>);
      Word* turned = by_amx ? scratch<Word, 10>(lanes * turned_row) : nullptr;
      for (int64_t t = first; t < last; t++) {
        const int64_t v0 = t * tile, n_vocab = std::min(tile, V - v0), v_steps = steps_of<Word>(n_vocab);
        if (from_memory) touch(RowsOf<scalar_t>{weight + v0 * H, H}, n_vocab, H);
        form_dlogits(t, kept, scale, factor, reinterpret_cast<Element*>(by_vocab), woven, dbias);
        if constexpr (std::is_same_v<Word, Pair>)
          if (by_amx) turn(woven, v_steps, turned, turned_row);
        for (int64_t h = 0; h < columns; h += h_width) {
          const int64_t n = std::min(h_width, H - h), at = v0 * H + h;
          const bool in_place = dweight.wide && !prior.narrow && n % LANES == 0;
          multiply_panel_of(by_vocab, row_words, down + h * r_steps, h_width, r_steps, in_place ? dweight.wide + at : block,
                            in_place ? H : h_width, n_vocab, n, in_place && prior.wide);
          if (!in_place) write_dweight(block, n_vocab, n, prior, dweight, at);
          pack_rows<Word>(RowsOf<scalar_t>{weight + at, H}, n_vocab, n, panel, h_width);
          acc* sums = partial + part * R * columns + h;
          if constexpr (std::is_same_v<Word, Pair>) {
            if (by_amx) {
              multiply_by_amx(turned, turned_row, panel, h_width, v_steps, sums, columns, R, round_up(n, LANES), t > first);
              continue;
            }
          }
          multiply<Word>(woven, 1, lanes, panel, h_width, v_steps, v_steps, sums, columns, R, n, t > first);
        }
      }
      if (by_amx) at::native::cpublas::brgemm_release();
    });
    at::parallel_for(0, R, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) {
        for_columns(H, [&](int64_t h, auto size) {
          Vec<acc> total;
          for (int64_t part = 0; part < parts; part++) total += Vec<acc>::load(partial + (part * R + r) * columns + h, size);
          total.store(dhidden + index[r] * H + h, size);
        });
      }
    });
  }
};

// ---- the whole call ----

struct Counts {
  double loss_sum = 0;
  int64_t n_correct = 0;
};

// Gradients only where dhidden is defined: (R, H), zeros. dweight (V, H), in the dtype of weight or of the sums.
template <typename scalar_t, typename Word>
Counts project(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
               const std::vector<int64_t>& index, const std::vector<int64_t>& labels, double scale,
               const at::Tensor& dhidden, const at::Tensor& dweight, bool accumulate, const at::Tensor& dbias) {
  using acc = acc_t<scalar_t>;
  const int64_t n = index.size(), V = weight.size(0), H = weight.size(1);
  const int64_t most = std::max(LEAST_ROWS, KEPT_BYTES / (V * static_cast<int64_t>(sizeof(kept_t<scalar_t>))));
  const int64_t n_chunks = std::max<int64_t>(1, div_up(n, most)), rows = round_up(div_up(n, n_chunks), LANES);
  const scalar_t* all = hidden.const_data_ptr<scalar_t>();
  scalar_t* gathered = scratch<scalar_t, 10>(rows * H);

  Buffer<scalar_t> result, between;
  double* dbias_sums = nullptr;
  if (dhidden.defined()) {
    if (dweight.scalar_type() == c10::CppTypeToScalarType<acc>::value) result.wide = between.wide = dweight.mutable_data_ptr<acc>();
    else {
      result.narrow = dweight.mutable_data_ptr<scalar_t>();
      if (n_chunks > 1) between.wide = scratch<acc, 11>(V * H);
    }
    dbias_sums = scratch<double, 12>(V);
    std::fill_n(dbias_sums, V, 0.0);
  }
  Counts counts;
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t R = std::min(rows, n - first);
    for (int64_t r = 0; r < R; r++) std::copy_n(all + index[first + r] * H, H, gathered + r * H);
    const Chunk<scalar_t, Word> chunk{gathered, weight.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), labels.data() + first, R, H, V};
    kept_t<scalar_t>* kept = dhidden.defined() ? scratch<kept_t<scalar_t>, 13>(V * chunk.lanes) : nullptr;
    chunk.pack();
    chunk.statistics(kept);
    chunk.combine(counts.loss_sum, counts.n_correct);
    if (!kept) continue;
    const auto prior = first > 0 ? between : accumulate ? result : Buffer<scalar_t>{};
    chunk.gradients(kept, static_cast<acc>(scale), prior, first + R < n ? between : result, dbias_sums,
                    dhidden.mutable_data_ptr<scalar_t>(), index.data() + first);
  }
  if (dhidden.defined()) std::copy_n(dbias_sums, V, dbias.mutable_data_ptr<scalar_t>());
  return counts;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& hidden_, const at::Tensor& weight_,
                                                   const at::Tensor& bias_, const at::Tensor& labels_, double scale,
                                                   const at::Tensor& dhidden, const at::Tensor& dweight, bool accumulate,
                                                   const at::Tensor& dbias) {
  TORCH_CHECK(hidden_.dim() == 2 && weight_.dim() == 2, "masked_vocab_projection: hidden (R, H) and weight (V, H) expected, not ",
              hidden_.sizes(), " and ", weight_.sizes());
  const int64_t R = hidden_.size(0), H = hidden_.size(1), V = weight_.size(0);
  CHECK_SHAPE(weight_, V, H);
  TORCH_CHECK(V > 0 && H > 0, "masked_vocab_projection: an empty weight, ", weight_.sizes());
  CHECK_SHAPE(bias_, V);
  CHECK_SHAPE(labels_, R);
  CHECK_SAME_DTYPE(hidden_, weight_);
  CHECK_SAME_DTYPE(hidden_, bias_);
  TORCH_CHECK_TYPE(labels_.scalar_type() == at::kLong, "masked_vocab_projection: labels are int64, not ", labels_.scalar_type());
  const auto hidden = hidden_.contiguous(), weight = weight_.contiguous(), bias = bias_.contiguous(), labels = labels_.contiguous();

  std::vector<int64_t> index, targets;
  for (int64_t r = 0; r < R; r++) {
    const int64_t label = labels.const_data_ptr<int64_t>()[r];
    if (label == IGNORE_INDEX) continue;
    TORCH_CHECK_INDEX(label >= 0 && label < V, "masked_vocab_projection: label ", label, " is outside a vocabulary of ", V);
    index.push_back(r);
    targets.push_back(label);
  }
  const auto counts = DISPATCH_SCALAR(hidden.scalar_type(), "masked_vocab_projection", [&] {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>)
      if (pairs_are_fast() || amx_works()) return project<scalar_t, Pair>(hidden, weight, bias, index, targets, scale, dhidden, dweight, accumulate, dbias);
#endif
    return project<scalar_t, acc_t<scalar_t>>(hidden, weight, bias, index, targets, scale, dhidden, dweight, accumulate, dbias);
  });
  const auto scalar = [](const at::Scalar& value, at::ScalarType dtype) { return empty({}, dtype).fill_(value); };
  const bool in_double = hidden.scalar_type() == at::kDouble;
  return {in_double ? scalar(counts.loss_sum, at::kDouble) : scalar(static_cast<float>(counts.loss_sum), at::kFloat),
          scalar(static_cast<int64_t>(index.size()), at::kLong), scalar(counts.n_correct, at::kLong)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_vocab_projection_eval_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& labels) {
  return run(hidden, weight, bias, labels, 0, {}, {}, false, {});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> masked_vocab_projection_fwd_into_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& labels,
    const at::Tensor& scale, at::Tensor& dweight, bool accumulate) {
  CHECK_SHAPE(dweight, weight.size(0), weight.size(1));
  TORCH_CHECK(dweight.is_contiguous(), "masked_vocab_projection: dweight is not contiguous");
  TORCH_CHECK_TYPE(dweight.scalar_type() == weight.scalar_type() || (dweight.scalar_type() == at::kFloat && weight.scalar_type() == at::kBFloat16),
                   "masked_vocab_projection: dweight is ", dweight.scalar_type(), " for a weight in ", weight.scalar_type());
  auto dhidden = empty(hidden.sizes(), hidden.options()).zero_();
  auto dbias = empty(bias.sizes(), bias.options());
  auto [loss_sum, n_masked, n_correct] = run(hidden, weight, bias, labels, scale.item<double>(), dhidden, dweight, accumulate, dbias);
  if (n_masked.item<int64_t>() == 0 && !accumulate) dweight.zero_();
  return {loss_sum, n_masked, n_correct, dhidden, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> masked_vocab_projection_fwd_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& labels, const at::Tensor& scale) {
  auto dweight = empty(weight.sizes(), weight.options());
  auto [loss_sum, n_masked, n_correct, dhidden, dbias] =
      masked_vocab_projection_fwd_into_cpu(hidden, weight, bias, labels, scale, dweight, false);
  return {loss_sum, n_masked, n_correct, dhidden, dweight, dbias};
}

}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("masked_vocab_projection_fwd", &bertfast::masked_vocab_projection_fwd_cpu);
  m.impl("masked_vocab_projection_fwd_into", &bertfast::masked_vocab_projection_fwd_into_cpu);
  m.impl("masked_vocab_projection_eval", &bertfast::masked_vocab_projection_eval_cpu);
}
