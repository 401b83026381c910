// The statistics of a LayerNorm row, shared by the ops that end in one.
#pragma once

#include "vec.h"

namespace bertfast {

template <typename acc>
struct Statistics {
  acc mean, rstd;
};

// z (n,), its sum known: two passes for the variance.
template <typename acc, typename scalar_t>
inline Statistics<acc> statistics(const scalar_t* z, int64_t n, acc sum_z, double eps) {
  const acc mean = sum_z / static_cast<acc>(n);
  Vec<acc> squares;
  for_columns(n, [&](int64_t j, auto size) {
    const Vec<acc> centred = keep(size, Vec<acc>::load(z + j, size) - Vec<acc>(mean));
    squares = fma(centred, centred, squares);
  });
  const acc variance = sum(squares) / static_cast<acc>(n);
  return {mean, acc(1) / std::sqrt(variance + static_cast<acc>(eps))};
}

}  // namespace bertfast
