// 16 lanes of fp32 (or fp64): loads and stores that convert, masked tails, exp.
//
// A block is 16 columns in every instruction set (one AVX-512 register, two of AVX2), since one Philox call of 16
// lanes serves 64 columns. fp64 is plain loops: it is there so that gradcheck runs on the native path.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace bertfast {

constexpr int64_t LANES = 16;

// A choice of lanes; mask_of(bits): lane i where bit i is set.
#if defined(__AVX512F__)
using Mask = uint16_t;
inline Mask mask_of(uint32_t bits) { return static_cast<Mask>(bits); }
inline bool has_lane(Mask m, int64_t i) { return m >> i & 1; }
#else
struct Mask {  // each lane all ones or zeros
  __m256 lo, hi;
};
inline Mask mask_of(uint32_t bits) {
  const auto half = [](uint32_t bits) {
    const __m256i one_each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), one_each);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, one_each));
  };
  return {half(bits), half(bits >> 8)};
}
inline bool has_lane(const Mask& m, int64_t i) { return _mm256_movemask_ps(i < 8 ? m.lo : m.hi) >> i % 8 & 1; }
#endif

// A whole block, or the last `n` < 16 columns of a row: what loads and stores are told.
struct Whole {};
struct Tail {
  int64_t n;
  Mask mask() const { return mask_of((1u << n) - 1); }
};
struct Streamed {};  // for stores alone: a whole block, aligned, past the caches

// Calls f(column, Whole or Tail) over n columns.
template <typename F>
inline void for_columns(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) f(j, Whole{});
  if (j < n) f(j, Tail{n - j});
}

template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename acc>
struct Vec;

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  __m512 v;
  Vec() : v(_mm512_setzero_ps()) {}
  Vec(float a) : v(_mm512_set1_ps(a)) {}
  Vec(__m512 a) : v(a) {}

  static Vec load(const float* p, Whole = {}) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(t.mask(), p); }
  static Vec load(const c10::BFloat16* p, Whole = {}) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load(const c10::BFloat16* p, Tail t) { return widen(_mm256_maskz_loadu_epi16(t.mask(), p)); }
  void store(float* p, Whole = {}) const { _mm512_storeu_ps(p, v); }
  void store(float* p, Tail t) const { _mm512_mask_storeu_ps(p, t.mask(), v); }
  void store(c10::BFloat16* p, Whole = {}) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(c10::BFloat16* p, Tail t) const { _mm256_mask_storeu_epi16(p, t.mask(), narrow()); }
  void store(float* p, Streamed) const { _mm512_stream_ps(p, v); }
  void store(c10::BFloat16* p, Streamed) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow()); }

  // Of 32 bits the upper 16, a bf16, and the signed rest: exact, where a bf16 alone is rounded.
  static Vec join(const c10::BFloat16* upper, const int16_t* rest, Whole = {}) {
    return join(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest)));
  }
  static Vec join(const c10::BFloat16* upper, const int16_t* rest, Tail t) {
    return join(_mm256_maskz_loadu_epi16(t.mask(), upper), _mm256_maskz_loadu_epi16(t.mask(), rest));
  }
  static Vec join(__m256i upper, __m256i rest) {
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16);
    return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_cvtepi16_epi32(rest)));
  }
  template <typename S>
  void split(c10::BFloat16* upper, int16_t* rest, S size) const {  // to the nearest, ties away from zero
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i rounded = _mm512_srai_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    const __m512i left = _mm512_sub_epi32(bits, _mm512_slli_epi32(rounded, 16));
    const Mask mask = [&] {
      if constexpr (std::is_same_v<S, Tail>) return size.mask();
      return static_cast<Mask>(0xffff);
    }();
    _mm256_mask_storeu_epi16(upper, mask, _mm512_cvtepi32_epi16(rounded));
    _mm256_mask_storeu_epi16(rest, mask, _mm512_cvtepi32_epi16(left));
  }

  static Vec widen(__m256i a) {  // one permutation, where a conversion would need a shift as well
    constexpr __mmask32 upper_halves = 0xAAAAAAAA;
    const __m512i each_twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6,
                                                5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper_halves, each_twice, _mm512_castsi256_si512(a)));
  }
  __m256i narrow() const {  // to the nearest, ties to even
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_set1_epi32(0x7fc00000);  // a NaN must not round up to infinity
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet), 16));
#endif
  }
};
using F32 = Vec<float>;

inline F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
inline F32 operator-(F32 a, F32 b) { return _mm512_sub_ps(a.v, b.v); }
inline F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
inline F32 operator/(F32 a, F32 b) { return _mm512_div_ps(a.v, b.v); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }    // a * b + c
inline F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a * b
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a.v, b.v); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a.v); }
inline F32 sqrt(F32 a) { return _mm512_sqrt_ps(a.v); }
inline F32 select(Mask m, F32 a, F32 b) { return _mm512_mask_blend_ps(m, b.v, a.v); }  // m ? a : b
inline F32 keep(Mask m, F32 a) { return _mm512_maskz_mov_ps(m, a.v); }                 // m ? a : 0
inline float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float max(F32 a) { return _mm512_reduce_max_ps(a.v); }
inline F32 round(F32 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 times_two_to(F32 a, F32 n) { return _mm512_scalef_ps(a.v, n.v); }  // n whole

#else  // AVX2: the same 16 lanes in two registers

template <>
struct Vec<float> {
  __m256 lo, hi;
  Vec() : Vec(0.0f) {}
  Vec(float a) : lo(_mm256_set1_ps(a)), hi(lo) {}
  Vec(__m256 a, __m256 b) : lo(a), hi(b) {}

  static Vec load(const float* p, Whole = {}) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vec load(const c10::BFloat16* p, Whole = {}) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
  }
  void store(float* p, Whole = {}) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store(c10::BFloat16* p, Whole = {}) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(float* p, Streamed) const {
    _mm256_stream_ps(p, lo);
    _mm256_stream_ps(p + 8, hi);
  }
  void store(c10::BFloat16* p, Streamed) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  template <typename scalar_t>
  static Vec load(const scalar_t* p, Tail t) {
    scalar_t block[LANES] = {};
    std::memcpy(block, p, t.n * sizeof(scalar_t));
    return load(block);
  }
  template <typename scalar_t>
  void store(scalar_t* p, Tail t) const {
    scalar_t block[LANES];
    store(block);
    std::memcpy(p, block, t.n * sizeof(scalar_t));
  }

  // Of 32 bits the upper 16, a bf16, and the signed rest: exact, where a bf16 alone is rounded.
  static Vec join(const c10::BFloat16* upper, const int16_t* rest, Whole = {}) {
    const auto half = [&](int which) {
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rest) + which);
      const __m256i high = _mm256_castps_si256(widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper) + which)));
      return _mm256_castsi256_ps(_mm256_add_epi32(high, _mm256_cvtepi16_epi32(low)));
    };
    return {half(0), half(1)};
  }
  static Vec join(const c10::BFloat16* upper, const int16_t* rest, Tail t) {
    c10::BFloat16 a[LANES] = {};
    int16_t b[LANES] = {};
    std::memcpy(a, upper, t.n * sizeof(*a));
    std::memcpy(b, rest, t.n * sizeof(*b));
    return join(a, b);
  }
  void split(c10::BFloat16* upper, int16_t* rest, Whole = {}) const {  // to the nearest, ties away from zero
    __m256i rounded[2], left[2];
    for (int i = 0; i < 2; i++) {
      const __m256i bits = _mm256_castps_si256(i ? hi : lo);
      rounded[i] = _mm256_srai_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
      left[i] = _mm256_sub_epi32(bits, _mm256_slli_epi32(rounded[i], 16));
    }
    const auto store = [](void* p, const __m256i* a) {  // packs within 128-bit halves
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a[0], a[1]), 0b11011000);
      _mm256_storeu_si256(static_cast<__m256i*>(p), packed);
    };
    store(upper, rounded);
    store(rest, left);
  }
  void split(c10::BFloat16* upper, int16_t* rest, Tail t) const {
    c10::BFloat16 a[LANES];
    int16_t b[LANES];
    split(a, b);
    std::memcpy(upper, a, t.n * sizeof(*a));
    std::memcpy(rest, b, t.n * sizeof(*b));
  }

  static __m256 widen(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
  __m256i narrow() const {
    const __m256i packed = _mm256_packus_epi32(narrow(lo), narrow(hi));  // packs within 128-bit halves
    return _mm256_permute4x64_epi64(packed, 0b11011000);
  }
  static __m256i narrow(__m256 a) {  // to the nearest, ties to even; a NaN must not round up to infinity
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  }
};
using F32 = Vec<float>;

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F32 fnma(F32 a, F32 b, F32 c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F32 select(const Mask& m, F32 a, F32 b) {  // m ? a : b
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline F32 keep(const Mask& m, F32 a) { return {_mm256_and_ps(a.lo, m.lo), _mm256_and_ps(a.hi, m.hi)}; }  // m ? a : 0
inline float sum(F32 a) {
  const __m256 pairs = _mm256_add_ps(a.lo, a.hi);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max(F32 a) {
  const __m256 pairs = _mm256_max_ps(a.lo, a.hi);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline F32 round(F32 a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
inline F32 times_two_to(F32 a, F32 n) {  // n whole, |n| <= 252; two steps over- and underflow right
  const auto step = [](__m256 x, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i e) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  };
  return {step(a.lo, n.lo), step(a.hi, n.hi)};
}

#endif

inline F32 exp(F32 x) {  // within 1.5 ulp: x = n ln 2 + r, and a polynomial in |r| <= ln 2 / 2
  // beyond these the result is 0 or infinity anyway; the constant first: a NaN is then passed on
  x = min(F32(126.0f), max(F32(-126.0f), x));
  const F32 n = round(x * F32(1.44269504f));
  const F32 r = fnma(n, F32(-2.12194440e-4f), fnma(n, F32(0.693359375f), x));  // ln 2 in two parts
  F32 q = fma(r, F32(0.00138144672f), F32(0.00836878084f));
  q = fma(r, q, F32(0.0416683927f));
  q = fma(r, q, F32(0.166665196f));
  q = fma(r, q, F32(0.49999994f));
  return times_two_to(fma(r * r, q, r) + F32(1.0f), n);
}

template <>
struct Vec<double> {
  double v[LANES];
  Vec() : Vec(0.0) {}
  Vec(double a) { std::fill_n(v, LANES, a); }
  static Vec load(const double* p, Whole = {}) { return load(p, Tail{LANES}); }
  static Vec load(const double* p, Tail t) {
    Vec r;
    std::copy_n(p, t.n, r.v);
    return r;
  }
  void store(double* p, Whole = {}) const { store(p, Tail{LANES}); }
  void store(double* p, Streamed) const { store(p); }
  void store(double* p, Tail t) const { std::copy_n(v, t.n, p); }
};
using F64 = Vec<double>;

template <typename F>
inline F64 each_lane(F&& f) {
  F64 r;
  for (int64_t i = 0; i < LANES; i++) r.v[i] = f(i);
  return r;
}
inline F64 operator+(const F64& a, const F64& b) { return each_lane([&](int64_t i) { return a.v[i] + b.v[i]; }); }
inline F64 operator-(const F64& a, const F64& b) { return each_lane([&](int64_t i) { return a.v[i] - b.v[i]; }); }
inline F64 operator*(const F64& a, const F64& b) { return each_lane([&](int64_t i) { return a.v[i] * b.v[i]; }); }
inline F64 operator/(const F64& a, const F64& b) { return each_lane([&](int64_t i) { return a.v[i] / b.v[i]; }); }
inline F64 fma(const F64& a, const F64& b, const F64& c) { return a * b + c; }
inline F64 fnma(const F64& a, const F64& b, const F64& c) { return c - a * b; }
inline F64 max(const F64& a, const F64& b) { return each_lane([&](int64_t i) { return std::max(a.v[i], b.v[i]); }); }
inline F64 exp(const F64& a) { return each_lane([&](int64_t i) { return std::exp(a.v[i]); }); }
inline F64 select(const Mask& m, const F64& a, const F64& b) {
  return each_lane([&](int64_t i) { return has_lane(m, i) ? a.v[i] : b.v[i]; });
}
inline F64 keep(const Mask& m, const F64& a) { return select(m, a, F64()); }
inline double sum(const F64& a) {
  double s = 0;
  for (double x : a.v) s += x;
  return s;
}
inline double max(const F64& a) { return *std::max_element(a.v, a.v + LANES); }

template <typename acc>
inline Vec<acc>& operator+=(Vec<acc>& a, const Vec<acc>& b) { return a = a + b; }
template <typename acc>
inline Vec<acc> keep(Whole, const Vec<acc>& a) { return a; }
template <typename acc>
inline Vec<acc> keep(Tail t, const Vec<acc>& a) { return keep(t.mask(), a); }

// a, rounded as it stands: the compiler may not fuse the product behind it into a later sum.
inline F32 unfused(F32 a) {
#if defined(__AVX512F__)
  asm("" : "+v"(a.v));
#else
  asm("" : "+x"(a.lo), "+x"(a.hi));
#endif
  return a;
}
inline F64 unfused(F64 a) {
  asm("" : "+m"(a.v));
  return a;
}

// a as it will be once stored as scalar_t.
template <typename scalar_t, typename acc>
inline Vec<acc> rounded(const Vec<acc>& a) {
  if constexpr (!std::is_same_v<scalar_t, c10::BFloat16>) {
    return a;
  } else {
#if defined(__AVX512F__)
    return F32::widen(a.narrow());
#else
    const auto half = [](__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(F32::narrow(x), 16)); };
    return {half(a.lo), half(a.hi)};
#endif
  }
}

}  // namespace bertfast
