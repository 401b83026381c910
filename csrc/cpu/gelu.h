// GELU(z) = z Phi(z) and its derivative Phi(z) + z phi(z), Phi the normal distribution function, phi its density.
//
// Both are 1/2 plus an odd function that has reached +-1/2 at |z| = 6. With AVX-512 that function is looked up: 32
// segments, a polynomial of degree 4 in each, whose coefficients lie in registers (two a power, one permutation
// each); no exp and no division. AVX2 has no such permutation and takes a rational function, without exp. Measured
// over |z| <= 12: Phi within 1e-7 (AVX2 2.4e-7), the derivative within 1.3e-7 (2.5e-7).
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
  static constexpr float WIDTH = 25.0f / 128;  // segment k: |a - k WIDTH| <= WIDTH / 2; the last is constant 1/2
  alignas(64) float coefficient[DEGREE + 1][COUNT] = {};

  // f - 1/2 on a >= 0, interpolated at the Chebyshev nodes of each segment.
  template <typename F>
  explicit Segments(F&& f) {
    for (int k = 0; k + 1 < COUNT; k++) {
      double node[DEGREE + 1], divided[DEGREE + 1], power[DEGREE + 1] = {};
      for (int i = 0; i <= DEGREE; i++) {
        node[i] = 0.5 * WIDTH * std::cos(M_PI * (i + 0.5) / (DEGREE + 1));
        divided[i] = f(k * double{WIDTH} + node[i]) - 0.5;
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
    coefficient[0][COUNT - 1] = 0.5f;
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

  // The segment of |z| (its low bits count) and the distance from the segment's centre.
  struct Located {
    __m512i segment;
    F32 offset;
    explicit Located(F32 size) {
      constexpr float round_to_whole = 0x1.8p23f;
      const F32 bounded = min(F32((Segments::COUNT - 1) * Segments::WIDTH), size);  // a NaN is passed on
      const F32 shifted = fma(bounded, F32(1 / Segments::WIDTH), F32(round_to_whole));
      segment = _mm512_castps_si512(shifted.v);
      offset = fnma(shifted - F32(round_to_whole), F32(Segments::WIDTH), bounded);
    }
  };
  F32 value(F32 z, F32 size, const Located& at) const { return fma(size, cdf(at.segment, at.offset), F32(0.5f) * z); }
  F32 derivative(F32 z, const Located& at) const {
    constexpr int sign_of_z_on_q = 0x6C;  // (z & sign) ^ q
    const __m512i q = _mm512_castps_si512(slope(at.segment, at.offset).v), sign = _mm512_set1_epi32(1 << 31);
    const __m512i odd = _mm512_ternarylogic_epi32(_mm512_castps_si512(z.v), q, sign, sign_of_z_on_q);
    return F32(_mm512_castsi512_ps(odd)) + F32(0.5f);
  }

  F32 value(F32 z) const { return value(z, abs(z), Located(abs(z))); }
  F32 derivative(F32 z) const { return derivative(z, Located(abs(z))); }
  GeluPair<float> both(F32 z) const {
    const F32 size = abs(z);
    const Located at(size);
    return {value(z, size, at), derivative(z, at)};
  }
};

#else

// The odd functions as z P(z^2) / Q(z^2) with one Q, minimax for the absolute error up to BOUND, constant from there on.
template <>
struct Gelu<float> {
  static constexpr float BOUND = 5.7f;
  template <typename... Lower>
  static F32 polynomial(F32 x, float highest, Lower... lower) {
    F32 p(highest);
    ((p = fma(x, p, F32(lower))), ...);
    return p;
  }
  static F32 within(float bound, F32 z) { return max(F32(-bound), min(F32(bound), z)); }  // a NaN is passed on
  struct Quotient {
    F32 square, factor;  // z^2, z / Q
    explicit Quotient(F32 z) {
      const F32 x = within(BOUND, z);
      square = x * x;
      factor = x / polynomial(square, 2.37455726e-8f, 3.21782773e-6f, 1.20876488e-4f, 2.53821164e-3f, 3.39834765e-2f,
                              0.271317899f, 1.0f);
    }
  };
  F32 value(F32 z, const Quotient& of) const {
    const F32 p = polynomial(of.square, 4.01043893e-10f, 1.68889130e-7f, 1.13469168e-5f, 2.72553356e-4f, 5.48979454e-3f,
                             4.17505950e-2f, 0.398941994f);
    return fma(z, within(0.5f, p * of.factor), F32(0.5f) * z);  // 1/2 exactly from BOUND on, so that GELU is 0 below
  }
  F32 derivative(const Quotient& of) const {
    const F32 p = polynomial(of.square, -3.15587521e-11f, 6.08750961e-9f, -2.77573719e-7f, 3.12477569e-5f,
                             -2.74203805e-4f, 1.47949019e-2f, -4.94806282e-2f, 0.797884345f);
    return fma(p, of.factor, F32(0.5f));
  }

  F32 value(F32 z) const { return value(z, Quotient(z)); }
  F32 derivative(F32 z) const { return derivative(Quotient(z)); }
  GeluPair<float> both(F32 z) const {
    const Quotient of(z);
    return {value(z, of), derivative(of)};
  }
};

#endif

}  // namespace bertfast
