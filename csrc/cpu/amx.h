// Products of Pairs (gemm_tile.h) by AMX, the matrix unit of Intel's CPUs, through oneDNN's brgemm, which PyTorch exports.
//
// Tested with loops in brgemm's place; it has run on no such CPU. So it is tried before it is relied on.
#pragma once

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <vector>

#include "gemm_tile.h"

namespace bertfast {

// C (m, n) = A B, or C += A B, by AMX through oneDNN: A has rows of words, B one panel of `width` columns, `steps` long.
inline void multiply_by_amx(const Pair* a, int64_t a_row, const Pair* b, int64_t width, int64_t steps, float* c, int64_t c_row,
                            int64_t m, int64_t n, bool accumulate) {
  at::native::cpublas::brgemm(m, n, 2 * steps, 2 * a_row, width, c_row, accumulate,
                              reinterpret_cast<const c10::BFloat16*>(a), reinterpret_cast<const c10::BFloat16*>(b), c);
}

// Whether a product by AMX, and one added to it, comes out right: of whole numbers, in fp32 without rounding.
inline bool comes_out_right(int64_t m, int64_t n, int64_t steps) {
  constexpr int64_t width = 64, more = 6;
  const int64_t a_row = 2 * steps + more, c_row = n + more;
  std::vector<c10::BFloat16> a(m * a_row), b(2 * steps * width);
  std::vector<float> c(m * c_row, 1.0f);
  for (size_t i = 0; i < a.size(); i++) a[i] = static_cast<float>(static_cast<int>(i * 7 % 9) - 4);
  for (size_t i = 0; i < b.size(); i++) b[i] = static_cast<float>(static_cast<int>(i * 5 % 11) - 5);
  for (const bool accumulate : {false, true})
    multiply_by_amx(reinterpret_cast<const Pair*>(a.data()), a_row / 2, reinterpret_cast<const Pair*>(b.data()), width, steps,
                    c.data(), c_row, m, n, accumulate);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < c_row; j++) {
      float wanted = j < n ? 0 : 1;
      for (int64_t k = 0; j < n && k < 2 * steps; k++)
        wanted += 2 * static_cast<float>(a[i * a_row + k]) * static_cast<float>(b[2 * (k / 2 * width + j) + k % 2]);
      if (c[i * c_row + j] != wanted) return false;
    }
  }
  return true;
}

// Whether there is AMX and it can be relied on: tried with the least product, one with tails and a whole tile.
inline bool amx_works() {
#if defined(__AVX512BF16__)
  static const bool works = [] {
    if (!at::cpu::init_amx()) return false;
    bool right = false;
    try {
      right = comes_out_right(1, 16, 1) && comes_out_right(37, 48, 45) && comes_out_right(144, 64, 32);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {  // ONEDNN_MAX_CPU_ISA forbids it
    }
    if (!right) TORCH_WARN("bertfast: oneDNN's products by AMX come out wrong, or not at all: the vocabulary's projection does without");
    return right;
  }();
  return works;
#else
  return false;
#endif
}

}  // namespace bertfast
