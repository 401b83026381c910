// GELU(z) = z Phi(z) and its derivative Phi(z) + z phi(z), Phi the normal distribution function, phi its density.
//
// Both are formed from what they are at -|z|, where they go to 0: GELU(z) = max(z, 0) - |z| Phi(-|z|), and the
// derivative at |z| is 1 less that at -|z|. Near 1 they would be rounded to 6e-8, and what is left below -3, by which
// rows of nothing else are judged, is no larger than |z| times that. With AVX-512 both are looked up: 32 segments, a
// polynomial of degree 4 in each, whose coefficients lie in registers (two a power, one permutation each); no exp and
// no division. AVX2 has no such permutation: there exp(-z^2 / 2) / Phi(-|z|) is a polynomial of degree 7, minimax for the
// absolute error. Measured over |z| <= 12: both as near to the truth as torch's or nearer, below -3 and above.
#pragma once

#include "common.h"

namespace bertfast {

// Whether an op that GELU is most of should treat x's rows as far: in bf16 the polynomial is the bound, not memory, and
// streaming half lines made it up to a tenth slower.
inline bool is_far_for_gelu(const at::Tensor& x, int64_t least) { return x.element_size() > 2 && is_far(x, least); }

template <typename acc>
struct GeluPair {
  Vec<acc> value, derivative;
};

// Make one outside the loop: its tables then stay in registers.
template <typename acc>
struct Gelu;

template <>
struct Gelu<double> {
  GeluPair<double> both(const F64& z) const {
    const F64 cdf = each_lane([&](int64_t i) { return 0.5 * std::erfc(-z.v[i] * M_SQRT1_2); });
    const F64 density = exp(F64(-0.5) * z * z) * F64(0.5 * M_2_SQRTPI * M_SQRT1_2);
    return {z * cdf, fma(z, density, cdf)};
  }
  F64 value(const F64& z) const { return both(z).value; }
  F64 derivative(const F64& z) const { return both(z).derivative; }
};

#if defined(__AVX512F__)

struct Segments {
  static constexpr int COUNT = 32, DEGREE = 4;
  static constexpr float WIDTH = 26.0f / 128;  // segment k: |a - k WIDTH| <= WIDTH / 2; the last is constant 0
  alignas(64) float coefficient[DEGREE + 1][COUNT] = {};

  // f(-a) on a >= 0, interpolated at the Chebyshev nodes of each segment.
  template <typename F>
  explicit Segments(F&& f) {
    for (int k = 0; k + 1 < COUNT; k++) {
      double node[DEGREE + 1], divided[DEGREE + 1], power[DEGREE + 1] = {};
      for (int i = 0; i <= DEGREE; i++) {
        node[i] = 0.5 * WIDTH * std::cos(M_PI * (i + 0.5) / (DEGREE + 1));
        divided[i] = f(-k * double{WIDTH} - node[i]);
      }
      for (int d = 1; d <= DEGREE; d++) {
        for (int i = DEGREE; i >= d; i--) divided[i] = (divided[i] - divided[i - 1]) / (node[i] - node[i - d]);
      }
      for (int d = DEGREE; d >= 0; d--) {  // Newton's form to powers, from the inside out
        for (int i = DEGREE; i > 0; i--) power[i] = power[i - 1] - node[d] * power[i];
        power[0] = divided[d] - node[d] * power[0];
      }
      for (int i = 0; i <= DEGREE; i++) coefficient[i][k] = static_cast<float>(power[i]);
    }
  }
};

inline double normal_cdf(double z) { return 0.5 * std::erfc(-z * M_SQRT1_2); }
inline const Segments cdf_segments(normal_cdf);
inline const Segments derivative_segments([](double z) {
  return normal_cdf(z) + z * std::exp(-0.5 * z * z) * (0.5 * M_2_SQRTPI * M_SQRT1_2);
});

template <>
struct Gelu<float> {
  // Two registers of coefficients a power; the compiler loads those that a loop uses.
  struct Polynomial {
    __m512 a0, a1, b0, b1, c0, c1, d0, d1, e0, e1;
    explicit Polynomial(const Segments& s)
        : a0(half(s, 0, 0)), a1(half(s, 0, 1)), b0(half(s, 1, 0)), b1(half(s, 1, 1)), c0(half(s, 2, 0)),
          c1(half(s, 2, 1)), d0(half(s, 3, 0)), d1(half(s, 3, 1)), e0(half(s, 4, 0)), e1(half(s, 4, 1)) {}
    static __m512 half(const Segments& s, int power, int which) {
      return _mm512_load_ps(s.coefficient[power] + which * LANES);
    }
    F32 operator()(__m512i segment, F32 x) const {
      const auto at = [&](__m512 low, __m512 high) { return F32(_mm512_permutex2var_ps(low, segment, high)); };
      return fma(fma(fma(fma(at(e0, e1), x, at(d0, d1)), x, at(c0, c1)), x, at(b0, b1)), x, at(a0, a1));
    }
  };
  const Polynomial cdf{cdf_segments}, slope{derivative_segments};

  struct Located {
    __m512i segment;  // of |z|; its low bits count
    F32 size, offset;  // |z|, at most the last segment's centre; from its own segment's centre
    explicit Located(F32 z) {
      constexpr float round_to_whole = 0x1.8p23f;
      size = min(F32((Segments::COUNT - 1) * Segments::WIDTH), abs(z));  // a NaN is passed on
      const F32 shifted = fma(size, F32(1 / Segments::WIDTH), F32(round_to_whole));
      segment = _mm512_castps_si512(shifted.v);
      offset = fnma(shifted - F32(round_to_whole), F32(Segments::WIDTH), size);
    }
  };
  F32 value(F32 z, const Located& at) const { return fnma(at.size, cdf(at.segment, at.offset), max(z, F32(0.0f))); }
  F32 derivative(F32 z, const Located& at) const {
    const F32 below = slope(at.segment, at.offset);
    return select(_mm512_movepi32_mask(_mm512_castps_si512(z.v)), below, F32(1.0f) - below);
  }

  F32 value(F32 z) const { return value(z, Located(z)); }
  F32 derivative(F32 z) const { return derivative(z, Located(z)); }
  GeluPair<float> both(F32 z) const {
    const Located at(z);
    return {value(z, at), derivative(z, at)};
  }
};

#else

template <>
struct Gelu<float> {
  template <typename... Higher>
  static F32 polynomial(F32 x, float lowest, Higher... higher) {
    if constexpr (sizeof...(higher) > 0) return fma(x, polynomial(x, higher...), F32(lowest));
    return F32(lowest);
  }
  struct Below {
    F32 size, bell, cdf;  // |z|, at most 12, where all is 0; exp(-z^2 / 2); Phi(-|z|)
    C10_ALWAYS_INLINE explicit Below(F32 z) : size(min(F32(12.0f), abs(z))) {  // a NaN is passed on
      constexpr float round_to_whole = 0x1.8p23f, minus_half_log2e = -0.72134752f;
      const F32 square = size * size;
      const F32 power = square * F32(minus_half_log2e), shifted = power + F32(round_to_whole);
      const F32 p = polynomial(power - (shifted - F32(round_to_whole)), 1.0f, 0.693147004f, 0.240222424f,
                               0.0555073358f, 0.00967151299f, 0.00132647273f);
      const auto times_two_to = [](__m256 p, __m256 whole) {  // whose low bits count
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(whole), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
      };
      bell = {times_two_to(p.lo, shifted.lo), times_two_to(p.hi, shifted.hi)};
      const F32 even = polynomial(square, 2.0f, 0.273419648f, 7.02103483e-4f, -5.46626456e-4f);
      const F32 odd = polynomial(square, 1.59575224f, -0.0486266091f, 2.20128871e-3f, 4.61723102e-5f);
      cdf = bell / fma(size, odd, even);
    }
  };
  F32 value(F32 z, const Below& at) const { return fnma(at.size, at.cdf, max(z, F32(0.0f))); }
  F32 derivative(F32 z, const Below& at) const {
    const F32 below = fnma(at.size * F32(0.398942280f), at.bell, at.cdf);
    return select(Mask{z.lo, z.hi}, below, F32(1.0f) - below);  // by the sign
  }

  C10_ALWAYS_INLINE F32 value(F32 z) const { return value(z, Below(z)); }
  C10_ALWAYS_INLINE F32 derivative(F32 z) const { return derivative(z, Below(z)); }
  C10_ALWAYS_INLINE GeluPair<float> both(F32 z) const {
    const Below at(z);
    return {value(z, at), derivative(z, at)};
  }
};

#endif

}  // namespace bertfast
