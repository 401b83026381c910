// y = LayerNorm(dropout(x + bias) + residual) and its backward; formulas and shapes in
// bertfast/ops/add_layer_norm.py. One pass over memory each: a row is read once, then stays in the L1 cache.

#include <torch/library.h>

#include "common.h"
#include "layer_norm.h"

namespace bertfast {
namespace {

template <bool DROP, bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void add_layer_norm_fwd(scalar_t* y, scalar_t* z, acc* mean, acc* rstd, const scalar_t* x, const acc* bias,
                        const scalar_t* residual, const acc* weight, const acc* ln_bias, double eps,
                        const Dropout& dropout, const RowKeys& row_key, int64_t n_rows, int64_t n_columns) {
  using V = Vec<acc>;
  const V scale(static_cast<acc>(dropout.scale));
  for_parts(n_rows, n_parts(n_rows, n_columns), [&](int64_t, int64_t begin, int64_t end) {
    const auto gather = [&](int64_t row, acc* z_row) {
      const int64_t at = row * n_columns;
      RowSums<acc> sums;
      for_columns_dropped<DROP>(n_columns, dropout, row_key[row], [&](int64_t j, auto size, const Mask& kept) {
        V h = load_row<FAR>(x + at + j, size);
        if (bias) h += V::load(bias + j, size);
        if constexpr (DROP) h = keep(kept, h * scale);
        const V z_j = rounded<scalar_t>(h + load_row<FAR>(residual + at + j, size));
        store_row<FAR>(z + at + j, z_j, size);
        z_j.store(z_row + j, size);
        sums.add(z_j, size);
      });
      return sums;
    };
    for_normalised_rows<acc>(begin, end, n_columns, eps, gather, [&](int64_t row, const acc* z_row, Statistics<acc> s) {
      mean[row] = s.mean, rstd[row] = s.rstd;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V x_hat = (V::load(z_row + j, size) - V(s.mean)) * V(s.rstd);
        const V y_j = fma(x_hat, V::load(weight + j, size), V::load(ln_bias + j, size));
        store_row<FAR>(y + row * n_columns + j, y_j, size);
      });
    });
  });
}

// Rows row .. row + ROWS - 1: first what a row needs of all its columns, then column by column, so that the sums
// over rows are kept in registers. masks: scratch for the kept lanes, ceil(n_columns / 16) a row.
template <int ROWS, bool DROP, bool FAR, typename scalar_t, typename acc>
inline void bwd_rows(scalar_t* dz, scalar_t* dx, ColumnSums<acc>& sums, Mask* masks, const scalar_t* dy,
                     const scalar_t* z, const acc* mean, const acc* rstd, const acc* weight, const Dropout& dropout,
                     const RowKeys& row_key, int64_t row, int64_t n_columns) {
  using V = Vec<acc>;
  const int64_t n_masks = (n_columns + LANES - 1) / LANES;
  acc c1[ROWS], c2[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const int64_t at = (row + r) * n_columns;
    V sum_g, sum_gx;
    for_columns_dropped<DROP>(n_columns, dropout, row_key[row + r], [&](int64_t j, auto size, const Mask& kept) {
      const V g = load_row<FAR>(dy + at + j, size) * V::load(weight + j, size);
      sum_g += g;
      sum_gx = fma(g, load_row<FAR>(z + at + j, size) - V(mean[row + r]), sum_gx);
      if constexpr (DROP) masks[r * n_masks + j / LANES] = kept;
    });
    c1[r] = sum(sum_g) / n_columns, c2[r] = sum(sum_gx) * rstd[row + r] / n_columns;
  }
  const V scale(static_cast<acc>(dropout.scale));
  for_columns(n_columns, [&](int64_t j, auto size) {
    const V weight_j = V::load(weight + j, size);
    V dbias, dweight, dln_bias;
    for (int r = 0; r < ROWS; r++) {
      const int64_t at = (row + r) * n_columns + j;
      const V dy_j = V::load(dy + at, size), x_hat = (V::load(z + at, size) - V(mean[row + r])) * V(rstd[row + r]);
      const V g = unfused(dy_j * weight_j);  // so that H = 1 gives 0
      V d = V(rstd[row + r]) * fnma(V(c2[r]), x_hat, g - V(c1[r]));
      store_row<FAR>(dz + at, d, size);
      if constexpr (DROP) {
        d = keep(masks[r * n_masks + j / LANES], d * scale);
        store_row<FAR>(dx + at, d, size);
      }
      dbias += d;
      dweight = fma(dy_j, x_hat, dweight);
      dln_bias += dy_j;
    }
    sums.add(j, size, dbias);
    sums.add(n_columns + j, size, dweight);
    sums.add(2 * n_columns + j, size, dln_bias);
  });
  sums.end_row();
}

// column_sums: dbias, dweight, dln_bias (3, n_columns) of each part
template <bool DROP, bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void add_layer_norm_bwd(scalar_t* dz, scalar_t* dx, acc* column_sums, const scalar_t* dy, const scalar_t* z,
                        const acc* mean, const acc* rstd, const acc* weight, const Dropout& dropout,
                        const RowKeys& row_key, int64_t n_rows, int64_t n_columns, int64_t parts) {
  // A streamed block in bf16 is half a line, which waits for the other half in one of a few buffers. They hold two
  // rows' dz and dx; with those of four, half lines went to memory, and it all took up to 2.5 times as long.
  constexpr int ROWS = FAR && sizeof(scalar_t) == 2 ? 2 : 4;
  for_parts(n_rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    ColumnSums<acc> sums(column_sums, part, 3 * n_columns);
    Mask* masks = scratch<Mask>(ROWS * (n_columns / LANES + 1));
    int64_t row = begin;
    for (; row + ROWS <= end; row += ROWS) {
      bwd_rows<ROWS, DROP, FAR>(dz, dx, sums, masks, dy, z, mean, rstd, weight, dropout, row_key, row, n_columns);
    }
    for (; row < end; row++) {
      bwd_rows<1, DROP, FAR>(dz, dx, sums, masks, dy, z, mean, rstd, weight, dropout, row_key, row, n_columns);
    }
    sums.end();
  });
}

// x, residual (T, H), bias, weight, ln_bias (H,), row_key (T,) -> y, z (T, H), mean, rstd (T,)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_layer_norm_fwd_cpu(
    const at::Tensor& x_, const std::optional<at::Tensor>& bias, const at::Tensor& residual_, const at::Tensor& weight,
    const at::Tensor& ln_bias, double eps, double p, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& row_key, int64_t stream) {
  TORCH_CHECK(x_.dim() == 2, "x must be (T, H), got ", x_.sizes());
  const int64_t n_rows = x_.size(0), n_columns = x_.size(1);
  CHECK_SHAPE(residual_, n_rows, n_columns);
  CHECK_SAME_DTYPE(x_, residual_);
  if (bias) CHECK_SHAPE(*bias, n_columns);
  CHECK_SHAPE(weight, n_columns);
  CHECK_SHAPE(ln_bias, n_columns);
  const Dropout dropout(p, seed, stream);
  const RowKeys keys(row_key, n_rows);
  const at::Tensor x = x_.contiguous(), residual = residual_.contiguous();
  at::Tensor y = empty(x.sizes(), x.options()), z = empty(x.sizes(), x.options());
  return DISPATCH_SCALAR(x.scalar_type(), "add_layer_norm", [&] {
    using acc = acc_t<scalar_t>;
    const auto options = x.options().dtype(c10::CppTypeToScalarType<acc>::value);
    at::Tensor mean = empty({n_rows}, options), rstd = empty({n_rows}, options);
    choose(dropout.active, is_far(x, 32), [&](auto drop, auto far) {
      add_layer_norm_fwd<drop, far>(
          y.mutable_data_ptr<scalar_t>(), z.mutable_data_ptr<scalar_t>(), mean.mutable_data_ptr<acc>(),
          rstd.mutable_data_ptr<acc>(), x.const_data_ptr<scalar_t>(), bias ? parameter<acc, 1>(*bias) : nullptr,
          residual.const_data_ptr<scalar_t>(), parameter<acc, 2>(weight), parameter<acc, 3>(ln_bias), eps, dropout,
          keys, n_rows, n_columns);
    });
    return std::make_tuple(y, z, mean, rstd);
  });
}

// dy, z (T, H), mean, rstd (T,), weight (H,), row_key (T,) -> dz (T, H), dx (T, H) or (0, H), dbias, dweight,
// dln_bias (H,)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_layer_norm_bwd_cpu(
    const at::Tensor& dy_, const at::Tensor& z_, const at::Tensor& mean_, const at::Tensor& rstd_,
    const at::Tensor& weight, double p, const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& row_key,
    int64_t stream) {
  TORCH_CHECK(z_.dim() == 2, "z must be (T, H), got ", z_.sizes());
  const int64_t n_rows = z_.size(0), n_columns = z_.size(1);
  CHECK_SHAPE(dy_, n_rows, n_columns);
  CHECK_SAME_DTYPE(z_, dy_);
  CHECK_SHAPE(mean_, n_rows);
  CHECK_SHAPE(rstd_, n_rows);
  CHECK_SHAPE(weight, n_columns);
  const Dropout dropout(p, seed, stream);
  const RowKeys keys(row_key, n_rows);
  const at::Tensor dy = dy_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous(), z = z_.contiguous();
  at::Tensor dz = empty(z.sizes(), z.options());
  at::Tensor dx = empty({dropout.active ? n_rows : 0, n_columns}, z.options());
  at::Tensor dbias = empty({n_columns}, weight.options()), dweight = empty({n_columns}, weight.options());
  at::Tensor dln_bias = empty({n_columns}, weight.options());
  DISPATCH_SCALAR(z.scalar_type(), "add_layer_norm", [&] {
    using acc = acc_t<scalar_t>;
    const int64_t parts = n_parts(n_rows, n_columns);
    acc* sums = scratch<acc>(ColumnSums<acc>::memory(parts, 3 * n_columns));
    choose(dropout.active, is_far(z, 8), [&](auto drop, auto far) {
      add_layer_norm_bwd<drop, far>(
          dz.mutable_data_ptr<scalar_t>(), dx.mutable_data_ptr<scalar_t>(), sums, dy.const_data_ptr<scalar_t>(),
          z.const_data_ptr<scalar_t>(), mean.const_data_ptr<acc>(), rstd.const_data_ptr<acc>(),
          parameter<acc, 1>(weight), dropout, keys, n_rows, n_columns, parts);
    });
    add_parts(dbias, sums, parts, 3 * n_columns);
    add_parts(dweight, sums, parts, 3 * n_columns, n_columns);
    add_parts(dln_bias, sums, parts, 3 * n_columns, 2 * n_columns);
  });
  return {dz, dx, dbias, dweight, dln_bias};
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("add_layer_norm_fwd", &bertfast::add_layer_norm_fwd_cpu);
  m.impl("add_layer_norm_bwd", &bertfast::add_layer_norm_bwd_cpu);
}
