// The small shared vocabulary of the CUDA kernels: types, wide accesses, sums over a row, dropout. No torch header, so
// that nvcc alone compiles the kernels, and a C++ compiler does with tests/cuda_emulation in place of CUDA.
#pragma once

#include <cstdint>

#ifdef CUDA_EMULATION
#include "cuda_emulation.h"
#define LAUNCH(kernel, grid, block, stream, ...) emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); })
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace bertfast {

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }

// N neighbouring elements, moved by one access: at most 16 bytes, aligned to their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];

  static __device__ __forceinline__ Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Pack*>(to) = *this; }
};

// How a row is shared: WARPS warps hold VALUES elements a lane, in packs of VECTOR.
template <int VECTOR_, int VALUES_, int WARPS_>
struct Shape {
  static constexpr int VECTOR = VECTOR_, VALUES = VALUES_, WARPS = WARPS_;
  static constexpr int THREADS = WARP * WARPS;            // of a row
  static constexpr int ROWS = WARPS == 1 ? 4 : 1;         // of a block
  static constexpr int CHUNK = THREADS * VECTOR;          // columns that one access of all lanes covers
  static constexpr int CHUNKS = VALUES / VECTOR;
  static_assert(VALUES % VECTOR == 0, "a lane holds whole packs");

  // f(first column of this lane's pack, index of its first value), for the packs inside the row.
  template <typename F>
  static __device__ __forceinline__ void for_packs(int n_columns, F&& f) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int column = chunk * CHUNK + static_cast<int>(threadIdx.x) * VECTOR;
      if (column < n_columns) f(column, chunk * VECTOR);
    }
  }

  // The sum of x over the row's lanes, the same bits in each of them.
  static __device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    if constexpr (WARPS > 1) {
      __shared__ float of_warps[WARPS];
      __syncthreads();  // everyone has read the sums before these
      if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = x;
      __syncthreads();
      x = 0.f;
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) x += of_warps[warp];
    }
    return x;
  }
};

// Dropout as bertfast/ops/dropout.py defines it. The seed stays on the device: a replayed graph draws new masks.
struct Dropout {
  const int64_t* seed;     // null: nothing is dropped
  const int64_t* row_key;  // null: a row's key is its index
  uint32_t threshold, stream;
  float scale;  // 1 / P(kept)
};

struct Words {
  uint32_t w[4];
};

// Philox-4x32-7 (Salmon et al. 2011).
__device__ __forceinline__ Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One row's masks. A call of Philox serves four blocks of 16 columns, but a lane's pack lies in one of them: so each
// lane draws for others what it does not need itself, and the lanes hand the bits round by ballots.
struct KeepRow {
  uint64_t key;
  uint32_t position, sequence, stream, threshold;

  __device__ __forceinline__ KeepRow(const Dropout& dropout, int64_t row) {
    const uint64_t row_key = static_cast<uint64_t>(dropout.row_key ? dropout.row_key[row] : row);
    key = static_cast<uint64_t>(*dropout.seed);
    position = static_cast<uint32_t>(row_key);
    sequence = static_cast<uint32_t>(row_key >> 32);
    stream = dropout.stream << 8;
    threshold = dropout.threshold;
  }

  // Bit i: whether element i of this lane's pack is kept, for the warp's 32 * VECTOR columns from `first` on (a
  // multiple of 64 where VECTOR > 1). All lanes of the warp call it.
  template <int VECTOR>
  __device__ __forceinline__ uint32_t bits(int first) const {
    const int lane = threadIdx.x % WARP;
    if constexpr (VECTOR == 1) {
      const int column = first + lane;
      const Words words = philox(key, 16 * (column / 64) + column % 16, position, sequence, stream);
      return words.w[column % 64 / 16] >= threshold;
    } else {
      uint32_t mine = 0;
      const int group = lane * VECTOR / 64, word = lane * VECTOR % 64 / 16, shift = lane * VECTOR % 16;
#pragma unroll
      for (int pair = 0; pair < VECTOR / 4; pair++) {  // two groups of 64 columns, a call a lane: 16 for each group
        const uint32_t c0 = static_cast<uint32_t>(first / 4 + 32 * pair + lane);
        const Words words = philox(key, c0, position, sequence, stream);
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const uint32_t kept = __ballot_sync(ALL_LANES, words.w[w] >= threshold);
          if (group / 2 == pair && word == w) mine = kept >> (group % 2 * 16 + shift);
        }
      }
      return mine;
    }
  }
};

}  // namespace bertfast
