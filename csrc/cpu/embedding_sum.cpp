// y = dropout(LayerNorm(word[ids] + position[ids] + token_type[ids])) and its backward; formulas and shapes in
// bertfast/ops/embedding_sum.py.
//
// The backward walks the tokens in the order of their word ids, each part an equal share of them, so that a word's
// gradient is summed in registers' reach and written once, and a frequent word is shared between threads. Words
// that a cut falls into are summed apart and added at the end, in order: the result depends on the number of
// threads alone. Positions and token types are few: every part sums them into a table of its own.

#include <torch/library.h>

#include <tuple>

#include "common.h"
#include "layer_norm.h"

namespace bertfast {
namespace {

struct Ids {
  const int64_t *word, *position, *token_type;
};

template <typename scalar_t>
struct Tables {
  const scalar_t *word, *position, *token_type;
};

// The three gathered rows of token t, summed.
template <typename scalar_t, typename acc = acc_t<scalar_t>>
struct Gather {
  const scalar_t *word, *position, *token_type;

  Gather(const Tables<scalar_t>& tables, const Ids& ids, int64_t t, int64_t n_columns)
      : word(tables.word + ids.word[t] * n_columns),
        position(tables.position + ids.position[t] * n_columns),
        token_type(tables.token_type + ids.token_type[t] * n_columns) {}
  template <typename S>
  Vec<acc> load(int64_t j, S size) const {
    return Vec<acc>::load(word + j, size) + Vec<acc>::load(position + j, size) + Vec<acc>::load(token_type + j, size);
  }
};

template <bool DROP, bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void embedding_sum_fwd(scalar_t* y, acc* mean, acc* rstd, const Ids& ids, const Tables<scalar_t>& tables,
                       const acc* weight, const acc* bias, double eps, const Dropout& dropout, const RowKeys& row_key,
                       int64_t n_rows, int64_t n_columns) {
  using V = Vec<acc>;
  const V scale(static_cast<acc>(dropout.scale));
  for_parts(n_rows, n_parts(n_rows, n_columns), [&](int64_t, int64_t begin, int64_t end) {
    const auto gather = [&](int64_t row, acc* z) {
      const Gather<scalar_t> tokens(tables, ids, row, n_columns);
      RowSums<acc> sums;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V z_j = tokens.load(j, size);
        z_j.store(z + j, size);
        sums.add(z_j, size);
      });
      return sums;
    };
    for_normalised_rows<acc>(begin, end, n_columns, eps, gather, [&](int64_t row, const acc* z, Statistics<acc> s) {
      mean[row] = s.mean, rstd[row] = s.rstd;
      // No prefetcher foresees a word's row. Asked for here, not where its turn is near, it leaves the gathering free.
      const scalar_t* later_word = tables.word + ids.word[std::min(row + 3, end - 1)] * n_columns;
      for_columns_dropped<DROP>(n_columns, dropout, row_key[row], [&](int64_t j, auto size, const Mask& kept) {
        __builtin_prefetch(later_word + j);
        const V x_hat = (V::load(z + j, size) - V(s.mean)) * V(s.rstd);
        V y_j = fma(x_hat, V::load(weight + j, size), V::load(bias + j, size));
        if constexpr (DROP) y_j = keep(kept, y_j * scale);
        store_row<FAR>(y + row * n_columns + j, y_j, size);
      });
    });
  });
}

// The stable order of ids in [0, n_ids): radix sort, 11 bits a pass. Returns one of the two (n,) buffers.
const int32_t* sorted_order(const int64_t* ids, int64_t n, int64_t n_ids, int32_t* order, int32_t* other) {
  constexpr int BITS = 11;
  for (int64_t i = 0; i < n; i++) order[i] = static_cast<int32_t>(i);
  for (int shift = 0; n_ids > int64_t{1} << shift; shift += BITS) {
    const auto digit = [&](int32_t i) { return ids[i] >> shift & ((1 << BITS) - 1); };
    int32_t starts[(1 << BITS) + 1] = {};
    for (int64_t i = 0; i < n; i++) starts[digit(order[i]) + 1]++;
    for (int d = 0; d < 1 << BITS; d++) starts[d + 1] += starts[d];
    for (int64_t i = 0; i < n; i++) other[starts[digit(order[i])]++] = order[i];
    std::swap(order, other);
  }
  return order;
}

template <typename table_t, typename acc>
void add_row(table_t* to, const acc* from, int64_t n) {
  for_columns(n, [&](int64_t j, auto size) {
    (Vec<acc>::load(to + j, size) + Vec<acc>::load(from + j, size)).store(to + j, size);
  });
}

struct BackwardShape {
  int64_t n_rows, n_columns, n_positions, n_types, parts;  // n_positions: those that occur
  int64_t padding_idx;                                     // -1 for none
  bool fresh, far;  // dword holds nothing yet: rows are written, not added to; whether past the caches
};

// Zeros for the rows of a new word table that no token has.
template <typename table_t>
void zero_others(table_t* dword, int64_t n_words, const Ids& ids, const int32_t* order, const BackwardShape& s) {
  for_parts(n_words, n_parts(n_words, s.n_columns), [&](int64_t, int64_t begin, int64_t end) {
    const auto before = [&](int32_t row, int64_t word) { return ids.word[row] < word; };
    const int32_t *last = order + s.n_rows, *next = std::lower_bound(order, last, begin, before);
    for (int64_t word = begin; word < end;) {
      while (next < last && (ids.word[*next] < word || ids.word[*next] == s.padding_idx)) next++;
      const int64_t until = next < last ? std::min(end, ids.word[*next]) : end, n = (until - word) * s.n_columns;
      table_t* row = dword + word * s.n_columns;
      if (s.far) {
        for_columns(n, [&](int64_t j, auto size) { store_row<true>(row + j, Vec<acc_t<table_t>>(), size); });
      } else {
        std::fill_n(row, n, table_t(0));
      }
      word = until + 1;
    }
  });
}

// dword += the gradient of the word table, or = in its tokens' rows. Left for the caller to add over parts, for each part:
// column_sums: dweight, dbias (2, n_columns); tables: dposition, dtoken_type (n_positions + n_types, n_columns).
template <bool DROP, typename table_t, typename scalar_t, typename acc = acc_t<scalar_t>>
void embedding_sum_bwd(table_t* dword, acc* column_sums, acc* tables_sums, const scalar_t* dy, const Ids& ids,
                       const int32_t* order, const Tables<scalar_t>& tables, const acc* weight, const acc* mean,
                       const acc* rstd, const Dropout& dropout, const RowKeys& row_key, const BackwardShape& s) {
  using V = Vec<acc>;
  const int64_t H = s.n_columns;
  const V scale(static_cast<acc>(dropout.scale));
  const auto put = [&](int64_t word, const acc* sum, auto far) {
    if (word == s.padding_idx) return;
    table_t* to = dword + word * H;
    if (!s.fresh) return add_row(to, sum, H);
    for_columns(H, [&](int64_t j, auto size) { store_row<far>(to + j, Vec<acc>::load(sum + j, size), size); });
  };
  acc* cut_words = scratch<acc, 5>(2 * s.parts * H);  // (parts, first and last word, H)
  for_parts(s.n_rows, s.parts, [&](int64_t part, int64_t begin, int64_t end) {
    ColumnSums<acc> sums(column_sums, part, 2 * H);
    acc* dposition = tables_sums + part * (s.n_positions + s.n_types) * H;
    acc* dtype = dposition + s.n_positions * H;
    std::fill_n(dposition, (s.n_positions + s.n_types) * H, acc(0));
    acc* x_hat = scratch<acc, 4>(3 * H);
    acc* dropped_dy = x_hat + H;
    acc* interior = dropped_dy + H;
    acc* const first = cut_words + 2 * part * H;
    std::fill_n(first, 2 * H, acc(0));
    acc* segment = first;
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = order[i], word = ids.word[row];
      if (i > begin && ids.word[order[i - 1]] != word) {  // a new word: where does its sum belong?
        segment = word == ids.word[order[end - 1]] ? first + H : interior;
        std::fill_n(segment, H, acc(0));
      }
      const int64_t next = order[std::min(i + 1, end - 1)];
      const Gather<scalar_t> gather(tables, ids, row, H);
      const scalar_t *next_word = tables.word + ids.word[next] * H, *next_dy = dy + next * H;
      const V row_mean(mean[row]), row_rstd(rstd[row]);
      V sum_g, sum_gx;
      for_columns_dropped<DROP>(H, dropout, row_key[row], [&](int64_t j, auto size, const Mask& kept) {
        __builtin_prefetch(next_dy + j);
        __builtin_prefetch(next_word + j);
        V dy_j = V::load(dy + row * H + j, size);
        if constexpr (DROP) dy_j = keep(kept, dy_j * scale);
        const V x_hat_j = (gather.load(j, size) - row_mean) * row_rstd, g = dy_j * V::load(weight + j, size);
        dy_j.store(dropped_dy + j, size);
        x_hat_j.store(x_hat + j, size);
        sum_g += g;
        sum_gx = fma(g, x_hat_j, sum_gx);
        sums.add(j, size, dy_j * x_hat_j);
        sums.add(H + j, size, dy_j);
      });
      sums.end_row();
      const V c1(sum(sum_g) / H), c2(sum(sum_gx) / H);
      acc* position_row = dposition + ids.position[row] * H;
      acc* type_row = dtype + ids.token_type[row] * H;
      for_columns(H, [&](int64_t j, auto size) {
        const V g = unfused(V::load(dropped_dy + j, size) * V::load(weight + j, size));
        const V dz = row_rstd * fnma(c2, V::load(x_hat + j, size), g - c1);
        for (acc* to : {segment, position_row, type_row}) (V::load(to + j, size) + dz).store(to + j, size);
      });
      const bool last_of_word = i + 1 == end || ids.word[order[i + 1]] != word;
      if (segment == interior && last_of_word) {
        s.far ? put(word, interior, std::true_type()) : put(word, interior, std::false_type());
      }
    }
    sums.end();
  });
  // the words at the cuts, in order: the same word may go on over several parts
  acc* running = cut_words;
  for (int64_t c = 0; c < (s.n_rows ? 2 * s.parts : 0); c++) {
    const auto word_of = [&](int64_t cut) {
      const int64_t begin = s.n_rows * (cut / 2) / s.parts, end = s.n_rows * (cut / 2 + 1) / s.parts;
      return ids.word[order[cut % 2 ? end - 1 : begin]];
    };
    if (c > 0 && word_of(c) == word_of(c - 1)) {
      add_row(running, cut_words + c * H, H);
    } else {
      running = cut_words + c * H;
    }
    const bool ends = c + 1 == 2 * s.parts || word_of(c + 1) != word_of(c);
    if (ends) put(word_of(c), running, std::false_type());
  }
}

// (T,) ids as int64, all inside a table of n rows.
at::Tensor checked_ids(const at::Tensor& ids, int64_t n_rows, const at::Tensor& table, const char* name) {
  TORCH_CHECK(ids.dim() == 1 && ids.size(0) == n_rows, name, " must have shape (", n_rows, ",), got ", ids.sizes());
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, name,
                   " must be int64 or int32, not ", ids.scalar_type());
  TORCH_CHECK(table.dim() == 2, "the table of ", name, " must be (rows, H), got ", table.sizes());
  const at::Tensor checked = ids.to(at::kLong).contiguous();
  const int64_t* p = checked.const_data_ptr<int64_t>();
  const uint64_t n = static_cast<uint64_t>(table.size(0));
  bool inside = true;
  for (int64_t i = 0; i < n_rows; i++) inside &= static_cast<uint64_t>(p[i]) < n;
  if (!inside) {
    const int64_t* bad = std::find_if(p, p + n_rows, [n](int64_t id) { return static_cast<uint64_t>(id) >= n; });
    TORCH_CHECK_INDEX(false, name, "[", bad - p, "] = ", *bad, " is outside the table of ", n, " rows");
  }
  return checked;
}

// The arguments that both directions share, checked and contiguous.
struct Inputs {
  at::Tensor input_ids, position_ids, token_type_ids, word, position, token_type;

  Inputs(const at::Tensor& input_ids_, const at::Tensor& position_ids_, const at::Tensor& token_type_ids_,
         const at::Tensor& word_, const at::Tensor& position_, const at::Tensor& token_type_, const at::Tensor& weight)
      : word(word_.contiguous()), position(position_.contiguous()), token_type(token_type_.contiguous()) {
    const int64_t n_rows = input_ids_.numel();
    input_ids = checked_ids(input_ids_, n_rows, word, "input_ids");
    position_ids = checked_ids(position_ids_, n_rows, position, "position_ids");
    token_type_ids = checked_ids(token_type_ids_, n_rows, token_type, "token_type_ids");
    CHECK_SAME_DTYPE(word, position);
    CHECK_SAME_DTYPE(word, token_type);
    TORCH_CHECK(position.size(1) == word.size(1) && token_type.size(1) == word.size(1),
                "the tables differ in width: ", word.size(1), ", ", position.size(1), ", ", token_type.size(1));
    CHECK_SHAPE(weight, word.size(1));
  }
  int64_t n_rows() const { return input_ids.size(0); }
  int64_t n_columns() const { return word.size(1); }
  Ids ids() const {
    return {input_ids.const_data_ptr<int64_t>(), position_ids.const_data_ptr<int64_t>(),
            token_type_ids.const_data_ptr<int64_t>()};
  }
  template <typename scalar_t>
  Tables<scalar_t> tables() const {
    return {word.const_data_ptr<scalar_t>(), position.const_data_ptr<scalar_t>(),
            token_type.const_data_ptr<scalar_t>()};
  }
};

// ids (T,), tables (V, H), (positions, H), (types, H), weight, bias (H,), row_key (T,) -> y (T, H), mean, rstd (T,)
std::tuple<at::Tensor, at::Tensor, at::Tensor> embedding_sum_fwd_cpu(
    const at::Tensor& input_ids, const at::Tensor& position_ids, const at::Tensor& token_type_ids,
    const at::Tensor& word, const at::Tensor& position, const at::Tensor& token_type, const at::Tensor& weight,
    const at::Tensor& bias, double eps, std::optional<int64_t>, double p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& row_key, int64_t stream) {
  const Inputs in(input_ids, position_ids, token_type_ids, word, position, token_type, weight);
  CHECK_SHAPE(bias, in.n_columns());
  const Dropout dropout(p, seed, stream);
  const RowKeys keys(row_key, in.n_rows());
  at::Tensor y = empty({in.n_rows(), in.n_columns()}, word.options());
  return DISPATCH_SCALAR(word.scalar_type(), "embedding_sum", [&] {
    using acc = acc_t<scalar_t>;
    const auto options = word.options().dtype(c10::CppTypeToScalarType<acc>::value);
    at::Tensor mean = empty({in.n_rows()}, options), rstd = empty({in.n_rows()}, options);
    choose(dropout.active, is_far(y, 32), [&](auto drop, auto far) {
      embedding_sum_fwd<drop, far>(y.mutable_data_ptr<scalar_t>(), mean.mutable_data_ptr<acc>(),
                                   rstd.mutable_data_ptr<acc>(), in.ids(), in.tables<scalar_t>(),
                                   parameter<acc, 1>(weight), parameter<acc, 2>(bias), eps, dropout, keys, in.n_rows(),
                                   in.n_columns());
    });
    return std::make_tuple(y, mean, rstd);
  });
}

// dy (T, H), the forward's inputs and statistics; adds into dword (fresh: writes) (V, H), compute dtype or float32
// -> dposition (positions, H), dtoken_type (types, H), dweight, dbias (H,)
template <bool fresh = false>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> embedding_sum_bwd_into_cpu(
    const at::Tensor& dy_, const at::Tensor& input_ids, const at::Tensor& position_ids,
    const at::Tensor& token_type_ids, const at::Tensor& word, const at::Tensor& position, const at::Tensor& token_type,
    const at::Tensor& weight, const at::Tensor& mean_, const at::Tensor& rstd_, std::optional<int64_t> padding_idx,
    double p, const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& row_key, int64_t stream,
    at::Tensor dword) {
  const Inputs in(input_ids, position_ids, token_type_ids, word, position, token_type, weight);
  const int64_t n_rows = in.n_rows(), n_columns = in.n_columns();
  CHECK_SHAPE(dy_, n_rows, n_columns);
  CHECK_SAME_DTYPE(word, dy_);
  CHECK_SHAPE(mean_, n_rows);
  CHECK_SHAPE(rstd_, n_rows);
  CHECK_SHAPE(dword, word.size(0), n_columns);
  TORCH_CHECK(dword.is_contiguous(), "dword must be contiguous");
  TORCH_CHECK(n_rows < int64_t{1} << 31, "embedding_sum takes fewer than 2^31 tokens, got ", n_rows);
  const Dropout dropout(p, seed, stream);
  const RowKeys keys(row_key, n_rows);
  const at::Tensor dy = dy_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  at::Tensor dposition = empty(position.sizes(), position.options());
  at::Tensor dtoken_type = empty(token_type.sizes(), token_type.options());
  at::Tensor dweight = empty({n_columns}, weight.options()), dbias = empty({n_columns}, weight.options());

  const Ids ids = in.ids();
  int32_t* orders = scratch<int32_t>(2 * n_rows);
  const int32_t* order = sorted_order(ids.word, n_rows, word.size(0), orders, orders + n_rows);
  const int64_t n_positions = n_rows ? *std::max_element(ids.position, ids.position + n_rows) + 1 : 0;
  const BackwardShape shape{n_rows,      n_columns, n_positions, token_type.size(0), n_parts(n_rows, n_columns),
                            padding_idx.value_or(-1), fresh, fresh && is_far(dword, 128)};
  DISPATCH_SCALAR(word.scalar_type(), "embedding_sum", [&] {
    using acc = acc_t<scalar_t>;
    const auto acc_dtype = c10::CppTypeToScalarType<acc>::value;
    acc* sums = scratch<acc>(ColumnSums<acc>::memory(shape.parts, 2 * n_columns));
    const int64_t table_size = (n_positions + shape.n_types) * n_columns;
    acc* table_sums = scratch<acc, 6>(shape.parts * table_size);
    const auto run = [&](auto* dword_p) {
      if (fresh) zero_others(dword_p, word.size(0), ids, order, shape);
      using table_t = std::remove_pointer_t<decltype(dword_p)>;
      const auto kernel = dropout.active ? embedding_sum_bwd<true, table_t, scalar_t>
                                         : embedding_sum_bwd<false, table_t, scalar_t>;
      kernel(dword_p, sums, table_sums, dy.const_data_ptr<scalar_t>(), ids, order, in.tables<scalar_t>(),
             parameter<acc, 1>(weight), mean.const_data_ptr<acc>(), rstd.const_data_ptr<acc>(), dropout, keys, shape);
    };
    TORCH_CHECK_TYPE(dword.scalar_type() == word.scalar_type() || dword.scalar_type() == acc_dtype,
                     "dword must be ", word.scalar_type(), " or ", acc_dtype, ", got ", dword.scalar_type());
    if (dword.scalar_type() == word.scalar_type()) {
      run(dword.mutable_data_ptr<scalar_t>());
    } else {
      run(dword.mutable_data_ptr<acc>());
    }
    add_parts(dweight, sums, shape.parts, 2 * n_columns);
    add_parts(dbias, sums, shape.parts, 2 * n_columns, n_columns);

    const auto add_tables = [&](scalar_t* out, const acc* first, int64_t n) {
      for_columns(n, [&](int64_t j, auto size) {
        Vec<acc> total;
        for (int64_t part = 0; part < shape.parts; part++) total += Vec<acc>::load(first + part * table_size + j, size);
        total.store(out + j, size);
      });
    };
    scalar_t* dposition_p = dposition.mutable_data_ptr<scalar_t>();
    const int64_t used = n_positions * n_columns;
    add_tables(dposition_p, table_sums, used);
    std::fill_n(dposition_p + used, dposition.numel() - used, scalar_t(0));
    add_tables(dtoken_type.mutable_data_ptr<scalar_t>(), table_sums + used, dtoken_type.numel());
  });
  return {dposition, dtoken_type, dweight, dbias};
}

// The same into a new table -> dword (V, H), dposition, dtoken_type, dweight, dbias
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> embedding_sum_bwd_cpu(
    const at::Tensor& dy, const at::Tensor& input_ids, const at::Tensor& position_ids,
    const at::Tensor& token_type_ids, const at::Tensor& word, const at::Tensor& position, const at::Tensor& token_type,
    const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& rstd, std::optional<int64_t> padding_idx,
    double p, const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& row_key, int64_t stream) {
  at::Tensor dword = empty(word.sizes(), word.options());
  return std::tuple_cat(std::make_tuple(dword),
                        embedding_sum_bwd_into_cpu<true>(dy, input_ids, position_ids, token_type_ids, word, position,
                                                   token_type, weight, mean, rstd, padding_idx, p, seed, row_key,
                                                   stream, dword));
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("embedding_sum_fwd", &bertfast::embedding_sum_fwd_cpu);
  m.impl("embedding_sum_bwd", &bertfast::embedding_sum_bwd_cpu);
  m.impl("embedding_sum_bwd_into", &bertfast::embedding_sum_bwd_into_cpu<>);
}
