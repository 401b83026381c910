// y = x times mask / P(kept); the mask's definition, formulas and shapes in bertfast/ops/dropout.py.

#include <torch/library.h>

#include "common.h"

namespace bertfast {
namespace {

template <typename scalar_t, typename acc = acc_t<scalar_t>>
void dropout(scalar_t* y, const scalar_t* x, const Dropout& dropout, const RowKeys& row_key, int64_t n_rows,
             int64_t n_columns) {
  using V = Vec<acc>;
  const V scale(static_cast<acc>(dropout.scale));
  for_parts(n_rows, n_parts(n_rows, n_columns), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = row * n_columns;
      for_columns_dropped<true>(n_columns, dropout, row_key[row], [&](int64_t j, auto size, const Mask& kept) {
        keep(kept, V::load(x + at + j, size) * scale).store(y + at + j, size);
      });
    }
  });
}

// x (T, H), row_key (T,) -> y (T, H)
at::Tensor dropout_cpu(const at::Tensor& x_, double p, const std::optional<at::Tensor>& seed,
                       const std::optional<at::Tensor>& row_key, int64_t stream) {
  TORCH_CHECK(x_.dim() == 2, "x must be (T, H), got ", x_.sizes());
  const Dropout drawn(p, seed, stream);
  const RowKeys keys(row_key, x_.size(0));
  const at::Tensor x = x_.contiguous();
  at::Tensor y = empty(x.sizes(), x.options());
  DISPATCH_SCALAR(x.scalar_type(), "dropout", [&] {
    dropout(y.mutable_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), drawn, keys, x.size(0), x.size(1));
  });
  return y;
}

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_IMPL(bertfast, CPU, m) { m.impl("dropout", &bertfast::dropout_cpu); }
