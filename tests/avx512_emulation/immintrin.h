// AVX-512 (F, BW, DQ, VL and, unless WITHOUT_BF16, BF16) on a CPU with AVX2 alone, as far as csrc/cpu uses it: found
// before the compiler's own (as the headers in ATen/ are before PyTorch's, for AMX), this header includes that and gives
// the intrinsics another meaning, lane by lane, with the compiler's vectors in place of the registers. Slow, but the
// kernels' own code: their indices, masks, tails and memory accesses.
//
// Lanes that a cast leaves undefined hold rubbish, what would fault aborts, lanes that a mask leaves out are not touched.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#if !defined(WITHOUT_BF16)
#define __AVX512BF16__ 1
#endif
#define asm(...) static_cast<void>(0)  // names a register; compile with -ffp-contract=off, then it is not needed

#define APART __attribute__((noinline)) inline  // what is not one instruction: compiled once, not at every use

namespace emulated {

typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int16_t S16 __attribute__((vector_size(32)));

template <typename V, typename F>
inline V lanes(F&& f) {
  V r;
  for (size_t i = 0; i < sizeof(V) / sizeof(r[0]); i++) r[i] = f(i);
  return r;
}
template <typename V, typename T>
inline V read(const T* p) {
  V r;
  std::memcpy(&r, p, sizeof(V));
  return r;
}
inline void aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) std::abort();
}

// ---- memory ----
inline __m512 loadu_ps(const void* p) { return read<__m512>(p); }
inline __m512 load_ps(const void* p) { return aligned(p, 64), read<__m512>(p); }
inline void storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
inline void storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }
inline void stream_ps(void* p, __m512 a) { aligned(p, 64), storeu_ps(p, a); }
APART __m512 maskz_loadu_ps(uint16_t m, const void* p) {
  return lanes<__m512>([&](size_t i) { return m >> i & 1 ? static_cast<const float*>(p)[i] : 0.0f; });
}
APART void mask_storeu_ps(void* p, uint16_t m, __m512 a) {
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) static_cast<float*>(p)[i] = a[i];
}
APART __m256i maskz_loadu_epi16(uint16_t m, const void* p) {
  return (__m256i)lanes<H16>([&](size_t i) {
    uint16_t x = 0;
    if (m >> i & 1) std::memcpy(&x, static_cast<const char*>(p) + 2 * i, 2);
    return x;
  });
}
APART void mask_storeu_epi16(void* p, uint16_t m, __m256i a) {
  for (int i = 0; i < 16; i++) {
    const uint16_t x = ((H16)a)[i];
    if (m >> i & 1) std::memcpy(static_cast<char*>(p) + 2 * i, &x, 2);
  }
}

// ---- fp32 ----
inline __m512 setzero_ps() { return __m512{}; }
inline __m512 set1_ps(float a) { return a - __m512{}; }  // a - 0 is a, whatever its sign
inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 abs_ps(__m512 a) { return (__m512)((U32)a & 0x7fffffffu); }
APART __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // the second where either is a NaN
APART __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
APART __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](size_t i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
inline __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) { return fmadd_ps(-a, b, c); }
APART __m512 sqrt_ps(__m512 a) { return lanes<__m512>([&](size_t i) { return std::sqrt(a[i]); }); }
APART __m512 roundscale_ps(__m512 a, int) { return lanes<__m512>([&](size_t i) { return std::nearbyint(a[i]); }); }
APART __m512 scalef_ps(__m512 a, __m512 n) {
  return lanes<__m512>([&](size_t i) {
    return n[i] == n[i] ? std::scalbn(a[i], static_cast<int>(std::fmin(std::fmax(std::floor(n[i]), -999), 999))) : n[i];
  });
}
template <typename F>
inline float reduce(__m512 a, F&& f) {  // halves upon halves
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; i++) a[i] = f(a[i], a[i + n]);
  return a[0];
}
APART float reduce_add_ps(__m512 a) { return reduce(a, [](float x, float y) { return x + y; }); }
APART float reduce_max_ps(__m512 a) { return reduce(a, [](float x, float y) { return x > y ? x : y; }); }

// ---- masks ----
template <typename V>
inline uint16_t mask_of(V chosen) {
  uint16_t m = 0;
  for (int i = 0; i < 16; i++) m |= (chosen[i] != 0) << i;
  return m;
}
APART I32 chosen(uint16_t m) {
  return lanes<I32>([&](size_t i) { return m >> i & 1 ? -1 : 0; });
}
APART uint16_t cmp_ps_mask(__m512 a, __m512 b, int which) {
  if (which != _CMP_UNORD_Q) std::abort();
  return mask_of(a != a) | mask_of(b != b);
}
APART uint16_t cmpge_epu32_mask(__m512i a, __m512i b) { return mask_of((U32)a >= (U32)b); }
inline uint16_t movepi32_mask(__m512i a) { return mask_of((I32)a < 0); }
inline __m512 mask_blend_ps(uint16_t m, __m512 a, __m512 b) { return chosen(m) ? b : a; }
inline __m512 maskz_mov_ps(uint16_t m, __m512 a) { return chosen(m) ? a : __m512{}; }
inline __m512i mask_mov_epi32(__m512i a, uint16_t m, __m512i b) { return (__m512i)(chosen(m) ? (I32)b : (I32)a); }

// ---- whole numbers ----
inline __m512i set1_epi32(int a) { return (__m512i)(I32{} + a); }
template <typename... T>
inline __m512i setr_epi32(T... a) { return (__m512i)I32{a...}; }
template <typename... T>
inline __m512i set_epi16(T... a) {  // the last lane first
  const uint16_t given[] = {static_cast<uint16_t>(a)...};
  return (__m512i)lanes<U16>([&](size_t i) { return given[31 - i]; });
}
inline __m512i add_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a + (U32)b); }
inline __m512i sub_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a - (U32)b); }
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i slli_epi32(__m512i a, int n) { return (__m512i)((U32)a << n); }
inline __m512i srli_epi32(__m512i a, int n) { return (__m512i)((U32)a >> n); }
inline __m512i srai_epi32(__m512i a, int n) { return (__m512i)((I32)a >> n); }
inline __m512i srli_epi64(__m512i a, int n) { return (__m512i)((U64)a >> n); }
inline __m512i mul_epu32(__m512i a, __m512i b) { return (__m512i)(((U64)a & 0xffffffffu) * ((U64)b & 0xffffffffu)); }
APART __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i r{};
  for (int k = 0; k < 8; k++)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}

// ---- lanes that move ----
APART __m512i mask_shuffle_epi32(__m512i from, uint16_t m, __m512i a, int which) {
  const I32 moved = lanes<I32>([&](size_t i) { return ((I32)a)[i / 4 * 4 + (which >> i % 4 * 2 & 3)]; });
  return mask_mov_epi32(from, m, (__m512i)moved);
}
APART __m512i permutexvar_epi16(__m512i index, __m512i a) {
  return (__m512i)lanes<U16>([&](size_t i) { return ((U16)a)[((U16)index)[i] % 32]; });
}
APART __m512i maskz_permutexvar_epi16(uint32_t m, __m512i index, __m512i a) {
  const U16 moved = (U16)permutexvar_epi16(index, a);
  return (__m512i)lanes<U16>([&](size_t i) { return m >> i & 1 ? moved[i] : 0; });
}
APART __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return lanes<__m512>([&](size_t i) {
    const uint32_t k = ((U32)index)[i];
    return k & 16 ? b[k % 16] : a[k % 16];
  });
}

// ---- one type to another ----
inline __m512i castps_si512(__m512 a) { return (__m512i)a; }
inline __m512 castsi512_ps(__m512i a) { return (__m512)a; }
inline __m256i extracti64x4_epi64(__m512i a, int which) {
  return read<__m256i>(reinterpret_cast<const char*>(&a) + 32 * which);
}
inline __m256i castsi512_si256(__m512i a) { return extracti64x4_epi64(a, 0); }
inline __m512i castsi256_si512(__m256i a) {
  __m512i r = set1_epi32(0x7fabcdef);  // a NaN in fp32, and in bf16 every other one
  std::memcpy(&r, &a, sizeof(a));
  return r;
}
APART __m512i cvtepu16_epi32(__m256i a) {
  return (__m512i)lanes<I32>([&](size_t i) { return ((H16)a)[i]; });
}
APART __m512i cvtepi16_epi32(__m256i a) {
  return (__m512i)lanes<I32>([&](size_t i) { return ((S16)a)[i]; });
}
APART __m256i cvtepi32_epi16(__m512i a) {
  return (__m256i)lanes<H16>([&](size_t i) { return static_cast<uint16_t>(((U32)a)[i]); });
}
inline __m256i cvtps_ph(__m512 a, int) {
  const auto* half = reinterpret_cast<const char*>(&a);
  const __m128i low = _mm256_cvtps_ph(read<__m256>(half), 0), high = _mm256_cvtps_ph(read<__m256>(half + 32), 0);
  return _mm256_set_m128i(high, low);
}
inline __m512 cvtph_ps(__m256i a) {
  const __m256 halves[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return read<__m512>(halves);
}

// ---- bf16 ----
inline uint16_t bf16_of(float a) {
  if (std::fpclassify(a) == FP_SUBNORMAL) a = std::copysign(0.0f, a);
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  if (a != a) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
APART __m256i cvtneps_pbh(__m512 a) {
  return (__m256i)lanes<H16>([&](size_t i) { return bf16_of(a[i]); });
}
APART __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  return (__m512i)lanes<U16>([&](size_t i) { return bf16_of(i < 16 ? low[i] : high[i - 16]); });
}
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const U32 x = (U32)a, y = (U32)b;  // subnormal products aside, which no test tells apart
  const __m512 odd = (__m512)(x & 0xffff0000u) * (__m512)(y & 0xffff0000u);
  return (sum + odd) + (__m512)(x << 16) * (__m512)(y << 16);
}

}  // namespace emulated

#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_load_ps emulated::load_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_stream_ps emulated::stream_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fnmadd_ps emulated::fnmadd_ps
#define _mm512_sqrt_ps emulated::sqrt_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cmpge_epu32_mask emulated::cmpge_epu32_mask
#define _mm512_movepi32_mask emulated::movepi32_mask
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_set_epi16 emulated::set_epi16
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_srli_epi64 emulated::srli_epi64
#define _mm512_mul_epu32 emulated::mul_epu32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32
#undef _mm512_mask_shuffle_epi32
#define _mm512_mask_shuffle_epi32 emulated::mask_shuffle_epi32
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_maskz_permutexvar_epi16 emulated::maskz_permutexvar_epi16
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#define _mm512_castsi512_si256 emulated::castsi512_si256
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi16_epi32 emulated::cvtepi16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
