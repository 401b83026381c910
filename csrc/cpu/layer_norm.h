// The rows of a LayerNorm, forward: shared by the ops that end in one.
#pragma once

#include "common.h"

namespace bertfast {

template <typename acc>
struct Statistics {
  acc mean, rstd;
};

// The sums of a row's elements and of their squares.
template <typename acc>
struct RowSums {
  Vec<acc> sum, squares;
  template <typename S>
  void add(const Vec<acc>& z, S size) {
    const Vec<acc> inside = keep(size, z);
    sum += inside;
    squares = fma(inside, inside, squares);
  }
};

// Of z (n,). Where the mean is large beside the deviation, the sums alone leave few digits of both: then from a second
// pass over the distances to the first mean (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
// variance").
template <typename acc>
inline Statistics<acc> statistics(const acc* z, int64_t n, const RowSums<acc>& sums, double eps) {
  const auto of = [&](const RowSums<acc>& s) {
    const acc mean = sum(s.sum) / static_cast<acc>(n);
    return std::pair(mean, sum(s.squares) / static_cast<acc>(n) - mean * mean);
  };
  auto [mean, variance] = of(sums);
  if (!(mean * mean <= variance)) {
    RowSums<acc> distances;
    for_columns(n, [&](int64_t j, auto size) { distances.add(Vec<acc>::load(z + j, size) - Vec<acc>(mean), size); });
    const auto [correction, exact] = of(distances);
    mean += correction, variance = std::max(exact, acc(0));  // it may round to less; in this order NaN stays
  }
  return {mean, acc(1) / std::sqrt(variance + static_cast<acc>(eps))};
}

// Rows [begin, end) through a LayerNorm: gather(row, z) writes a row before it into z and returns its sums,
// finish(row, z, statistics) writes it out. The next row is gathered while this one's statistics, a long chain of
// dependent sums, are on their way.
template <typename acc, typename Gather, typename Finish>
inline void for_normalised_rows(int64_t begin, int64_t end, int64_t n, double eps, Gather&& gather, Finish&& finish) {
  acc* z = scratch<acc, 4>(2 * n);
  acc* next = z + n;
  RowSums<acc> sums = begin < end ? gather(begin, z) : RowSums<acc>();
  for (int64_t row = begin; row < end; row++) {
    const Statistics<acc> s = statistics(z, n, sums, eps);
    if (row + 1 < end) sums = gather(row + 1, next);
    finish(row, z, s);
    std::swap(z, next);
  }
}

}  // namespace bertfast
