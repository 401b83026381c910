// PyTorch's header, but for brgemm in bf16, which wants a CPU with AVX-512-bf16 or AMX: here it is three loops, which
// read the right operand as oneDNN has it, pairs of rows woven (K / 2, ld_b, 2).
#pragma once

#if defined(WITHOUT_AMX)
#include_next <ATen/native/CPUBlas.h>
#else
#define brgemm emulated_brgemm
#define brgemm_release emulated_brgemm_release
#include_next <ATen/native/CPUBlas.h>

namespace at::native::cpublas {

inline void emulated_brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, const bool add_C,
                            const at::BFloat16* A, const at::BFloat16* B, float* C, bool) {
  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) {
      float sum = add_C ? C[m * ld_c + n] : 0.0f;
      for (int64_t k = 0; k < K; k++)
        sum += static_cast<float>(A[m * ld_a + k]) * static_cast<float>(B[2 * (k / 2 * ld_b + n) + k % 2]);
      C[m * ld_c + n] = sum;
    }
  }
}

inline void emulated_brgemm_release(bool) {}

}  // namespace at::native::cpublas
#endif
