// The rows of a LayerNorm, forward: shared by the ops that end in one.
#pragma once

#include "common.h"

namespace bertfast {

template <typename acc>
struct Statistics {
  acc mean, rstd;
};

// z (n,), its sum known: two passes for the variance, four chains of additions.
template <typename acc>
inline Statistics<acc> statistics(const acc* z, int64_t n, acc sum_z, double eps) {
  using V = Vec<acc>;
  const acc mean = sum_z / static_cast<acc>(n);
  V squares[4];
  const auto add = [&](int64_t j, auto size, V& to) {
    const V centred = keep(size, V::load(z + j, size) - V(mean));
    to = fma(centred, centred, to);
  };
  int64_t j = 0;
  for (; j + 4 * LANES <= n; j += 4 * LANES) {
    for (int k = 0; k < 4; k++) add(j + k * LANES, Whole{}, squares[k]);
  }
  for_columns(n - j, [&](int64_t k, auto size) { add(j + k, size, squares[0]); });
  const acc variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<acc>(n);
  return {mean, acc(1) / std::sqrt(variance + static_cast<acc>(eps))};
}

// Rows [begin, end) through a LayerNorm: gather(row, z) writes a row before it into z and returns its sum,
// finish(row, z, statistics) writes it out. The next row is gathered while this one's statistics, a long chain of
// dependent sums, are on their way.
template <typename acc, typename Gather, typename Finish>
inline void for_normalised_rows(int64_t begin, int64_t end, int64_t n, double eps, Gather&& gather, Finish&& finish) {
  acc* z = scratch<acc, 4>(2 * n);
  acc* next = z + n;
  acc sum_z = begin < end ? gather(begin, z) : acc(0);
  for (int64_t row = begin; row < end; row++) {
    const Statistics<acc> s = statistics(z, n, sum_z, eps);
    if (row + 1 < end) sum_z = gather(row + 1, next);
    finish(row, z, s);
    std::swap(z, next);
  }
}

}  // namespace bertfast
