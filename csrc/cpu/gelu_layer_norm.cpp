// y = LayerNorm(GELU(x + bias)) and its backward; formulas and shapes in bertfast/ops/gelu_layer_norm.py.

#include <torch/library.h>

#include "common.h"
#include "gelu.h"
#include "layer_norm.h"

namespace bertfast {
namespace {

template <bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void gelu_layer_norm_fwd(scalar_t* y, acc* mean, acc* rstd, const scalar_t* x, const acc* bias, const acc* weight,
                         const acc* ln_bias, double eps, int64_t n_rows, int64_t n_columns) {
  using V = Vec<acc>;
  for_parts(n_rows, n_parts(n_rows, n_columns), [&](int64_t, int64_t begin, int64_t end) {
    const Gelu<acc> gelu;
    const auto gather = [&](int64_t row, acc* activation) {
      RowSums<acc> sums;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V a = gelu.value(load_row<FAR>(x + row * n_columns + j, size) + V::load(bias + j, size));
        a.store(activation + j, size);
        sums.add(a, size);
      });
      return sums;
    };
    for_normalised_rows<acc>(begin, end, n_columns, eps, gather, [&](int64_t row, const acc* a, Statistics<acc> s) {
      mean[row] = s.mean, rstd[row] = s.rstd;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V x_hat = (V::load(a + j, size) - V(s.mean)) * V(s.rstd);
        const V y_j = fma(x_hat, V::load(weight + j, size), V::load(ln_bias + j, size));
        store_row<FAR>(y + row * n_columns + j, y_j, size);
      });
    });
  });
}

// column_sums: dbias, dweight, dln_bias (3, n_columns) of each part
template <bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void gelu_layer_norm_bwd(scalar_t* dx, acc* column_sums, const scalar_t* dy, const scalar_t* x, const acc* bias,
                         const acc* weight, const acc* mean, const acc* rstd, int64_t n_rows, int64_t n_columns,
                         int64_t parts) {
  using V = Vec<acc>;
  for_parts(n_rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    const Gelu<acc> gelu;
    ColumnSums<acc> sums(column_sums, part, 3 * n_columns);
    acc* x_hat = scratch<acc, 4>(2 * n_columns);
    acc* derivative = x_hat + n_columns;
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = row * n_columns;
      const V row_mean(mean[row]), row_rstd(rstd[row]);
      V sum_g, sum_gx;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V z = load_row<FAR>(x + at + j, size) + V::load(bias + j, size);
        const GeluPair<acc> activation = gelu.both(z);
        const V x_hat_j = (unfused(activation.value) - row_mean) * row_rstd;
        x_hat_j.store(x_hat + j, size);
        activation.derivative.store(derivative + j, size);
        const V dy_j = load_row<FAR>(dy + at + j, size), g = dy_j * V::load(weight + j, size);
        sum_g += g;
        sum_gx = fma(g, x_hat_j, sum_gx);
        sums.add(n_columns + j, size, dy_j * x_hat_j);
        sums.add(2 * n_columns + j, size, dy_j);
      });
      const V c1(sum(sum_g) / n_columns), c2(sum(sum_gx) / n_columns);
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V g = unfused(V::load(dy + at + j, size) * V::load(weight + j, size));
        const V dg = row_rstd * fnma(c2, V::load(x_hat + j, size), g - c1);
        const V dz = dg * V::load(derivative + j, size);
        store_row<FAR>(dx + at + j, dz, size);
        sums.add(j, size, dz);
      });
      sums.end_row();
    }
    sums.end();
  });
}

void check(const at::Tensor& x, const at::Tensor& bias, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() == 2, "x must be (P, H), got ", x.sizes());
  CHECK_SHAPE(bias, x.size(1));
  CHECK_SHAPE(weight, x.size(1));
}

// x (P, H), bias, weight, ln_bias (H,) -> y (P, H), mean, rstd (P,)
std::tuple<at::Tensor, at::Tensor, at::Tensor> gelu_layer_norm_fwd_cpu(const at::Tensor& x_, const at::Tensor& bias,
                                                                       const at::Tensor& weight,
                                                                       const at::Tensor& ln_bias, double eps) {
  check(x_, bias, weight);
  CHECK_SHAPE(ln_bias, x_.size(1));
  const at::Tensor x = x_.contiguous();
  at::Tensor y = empty(x.sizes(), x.options());
  return DISPATCH_SCALAR(x.scalar_type(), "gelu_layer_norm", [&] {
    using acc = acc_t<scalar_t>;
    const auto options = x.options().dtype(c10::CppTypeToScalarType<acc>::value);
    at::Tensor mean = empty({x.size(0)}, options), rstd = empty({x.size(0)}, options);
    const auto run =
        is_far_for_gelu(x, 64) ? gelu_layer_norm_fwd<true, scalar_t> : gelu_layer_norm_fwd<false, scalar_t>;
    run(y.mutable_data_ptr<scalar_t>(), mean.mutable_data_ptr<acc>(), rstd.mutable_data_ptr<acc>(),
        x.const_data_ptr<scalar_t>(), parameter<acc, 1>(bias), parameter<acc, 2>(weight), parameter<acc, 3>(ln_bias),
        eps, x.size(0), x.size(1));
    return std::make_tuple(y, mean, rstd);
  });
}

// dy, x (P, H), bias, weight (H,), mean, rstd (P,) -> dx (P, H), dbias, dweight, dln_bias (H,)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gelu_layer_norm_bwd_cpu(
    const at::Tensor& dy_, const at::Tensor& x_, const at::Tensor& bias, const at::Tensor& weight,
    const at::Tensor& mean_, const at::Tensor& rstd_) {
  check(x_, bias, weight);
  const int64_t n_rows = x_.size(0), n_columns = x_.size(1);
  CHECK_SHAPE(dy_, n_rows, n_columns);
  CHECK_SAME_DTYPE(x_, dy_);
  CHECK_SHAPE(mean_, n_rows);
  CHECK_SHAPE(rstd_, n_rows);
  const at::Tensor dy = dy_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous(), x = x_.contiguous();
  at::Tensor dx = empty(x.sizes(), x.options()), dbias = empty({n_columns}, weight.options());
  at::Tensor dweight = empty({n_columns}, weight.options()), dln_bias = empty({n_columns}, weight.options());
  DISPATCH_SCALAR(x.scalar_type(), "gelu_layer_norm", [&] {
    using acc = acc_t<scalar_t>;
    const int64_t parts = n_parts(n_rows, n_columns);
    acc* sums = scratch<acc>(ColumnSums<acc>::memory(parts, 3 * n_columns));
    const auto run = is_far(x, 8) ? gelu_layer_norm_bwd<true, scalar_t> : gelu_layer_norm_bwd<false, scalar_t>;
    run(dx.mutable_data_ptr<scalar_t>(), sums, dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
        parameter<acc, 1>(bias), parameter<acc, 2>(weight), mean.const_data_ptr<acc>(), rstd.const_data_ptr<acc>(),
        n_rows, n_columns, parts);
    add_parts(dbias, sums, parts, 3 * n_columns);
    add_parts(dweight, sums, parts, 3 * n_columns, n_columns);
    add_parts(dln_bias, sums, parts, 3 * n_columns, 2 * n_columns);
  });
  return {dx, dbias, dweight, dln_bias};
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("gelu_layer_norm_fwd", &bertfast::gelu_layer_norm_fwd_cpu);
  m.impl("gelu_layer_norm_bwd", &bertfast::gelu_layer_norm_bwd_cpu);
}
