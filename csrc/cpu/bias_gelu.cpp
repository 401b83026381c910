// y = GELU(x + bias) and its backward; formula and shapes in bertfast/ops/bias_gelu.py.

#include <torch/library.h>

#include "common.h"
#include "gelu.h"

namespace bertfast {
namespace {

template <bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void bias_gelu_fwd(scalar_t* y, const scalar_t* x, const acc* bias, int64_t n_rows, int64_t n_columns) {
  using V = Vec<acc>;
  for_parts(n_rows, n_parts(n_rows, n_columns), [&](int64_t, int64_t begin, int64_t end) {
    const Gelu<acc> gelu;
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = row * n_columns;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V z = V::load(x + at + j, size) + V::load(bias + j, size);
        store_row<FAR>(y + at + j, gelu.value(z), size);
      });
    }
  });
}

template <bool FAR, typename scalar_t, typename acc = acc_t<scalar_t>>
void bias_gelu_bwd(scalar_t* dx, acc* column_sums, const scalar_t* dy, const scalar_t* x, const acc* bias,
                   int64_t n_rows, int64_t n_columns, int64_t parts) {
  using V = Vec<acc>;
  for_parts(n_rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    const Gelu<acc> gelu;
    ColumnSums<acc> dbias(column_sums, part, n_columns);
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = row * n_columns;
      for_columns(n_columns, [&](int64_t j, auto size) {
        const V z = V::load(x + at + j, size) + V::load(bias + j, size);
        const V dz = V::load(dy + at + j, size) * gelu.derivative(z);
        store_row<FAR>(dx + at + j, dz, size);
        dbias.add(j, size, dz);
      });
      dbias.end_row();
    }
    dbias.end();
  });
}

void check(const at::Tensor& x, const at::Tensor& bias) {
  TORCH_CHECK(x.dim() == 2, "x must be (T, I), got ", x.sizes());
  CHECK_SHAPE(bias, x.size(1));
}

// x (T, I), bias (I,) -> y (T, I)
at::Tensor bias_gelu_fwd_cpu(const at::Tensor& x_, const at::Tensor& bias) {
  check(x_, bias);
  const at::Tensor x = x_.contiguous();
  at::Tensor y = empty(x.sizes(), x.options());
  DISPATCH_SCALAR(x.scalar_type(), "bias_gelu", [&] {
    const auto run = is_far_for_gelu(x, 64) ? bias_gelu_fwd<true, scalar_t> : bias_gelu_fwd<false, scalar_t>;
    run(y.mutable_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), parameter<acc_t<scalar_t>, 1>(bias), x.size(0),
        x.size(1));
  });
  return y;
}

// dy, x (T, I), bias (I,) -> dx (T, I), dbias (I,)
std::tuple<at::Tensor, at::Tensor> bias_gelu_bwd_cpu(const at::Tensor& dy_, const at::Tensor& x_,
                                                     const at::Tensor& bias) {
  check(x_, bias);
  CHECK_SHAPE(dy_, x_.size(0), x_.size(1));
  CHECK_SAME_DTYPE(x_, dy_);
  const at::Tensor dy = dy_.contiguous(), x = x_.contiguous();
  at::Tensor dx = empty(x.sizes(), x.options()), dbias = empty(bias.sizes(), bias.options());
  DISPATCH_SCALAR(x.scalar_type(), "bias_gelu", [&] {
    using acc = acc_t<scalar_t>;
    const int64_t parts = n_parts(x.size(0), x.size(1));
    acc* sums = scratch<acc>(ColumnSums<acc>::memory(parts, x.size(1)));
    const auto run = is_far_for_gelu(x, 8) ? bias_gelu_bwd<true, scalar_t> : bias_gelu_bwd<false, scalar_t>;
    run(dx.mutable_data_ptr<scalar_t>(), sums, dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
        parameter<acc, 1>(bias), x.size(0), x.size(1), parts);
    add_parts(dbias, sums, parts, x.size(1));
  });
  return {dx, dbias};
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) {
  m.impl("bias_gelu_fwd", &bertfast::bias_gelu_fwd_cpu);
  m.impl("bias_gelu_bwd", &bertfast::bias_gelu_bwd_cpu);
}
