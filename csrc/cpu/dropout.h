// Dropout bits: the definition in bertfast/ops/dropout.py, bit for bit, 64 columns a call.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "vec.h"

namespace bertfast {

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;
constexpr int PHILOX_ROUNDS = 7;

#if defined(__AVX512F__)

constexpr int GROUPS_AT_ONCE = 2;  // of 64 columns: the rounds of one, each waiting for the last, fill the gaps of the other

struct U32 {
  __m512i v;
  U32(__m512i a) : v(a) {}
  U32(uint32_t a) : v(_mm512_set1_epi32(static_cast<int>(a))) {}
};
inline U32 counting_from(uint32_t first) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lanes);
}
inline U32 xor3(U32 a, U32 b, U32 c) { return _mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96); }
inline void multiply(U32 a, uint32_t m, U32& high, U32& low) {  // even and odd lanes apart, then woven together
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xF5));
  low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
}
inline Mask at_least(U32 a, uint32_t b) { return _mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32(static_cast<int>(b))); }

#else

constexpr int GROUPS_AT_ONCE = 1;  // the words of two would not fit the registers: 1.3 times as long

struct U32 {
  __m256i lo, hi;
  U32(__m256i a, __m256i b) : lo(a), hi(b) {}
  U32(uint32_t a) : lo(_mm256_set1_epi32(static_cast<int>(a))), hi(lo) {}
};
inline U32 counting_from(uint32_t first) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), lanes),
          _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first + 8)), lanes)};
}
inline U32 xor3(U32 a, U32 b, U32 c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.lo, b.lo), c.lo), _mm256_xor_si256(_mm256_xor_si256(a.hi, b.hi), c.hi)};
}
inline void multiply(U32 a, uint32_t m, U32& high, U32& low) {  // even and odd lanes apart, then woven together
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  const auto half = [&](__m256i a, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    high = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
    low = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
  };
  half(a.lo, high.lo, low.lo);
  half(a.hi, high.hi, low.hi);
}
inline Mask at_least(U32 a, uint32_t b) {
  const __m256i bound = _mm256_set1_epi32(static_cast<int>(b));
  const auto half = [&](__m256i a) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a, bound), a)); };
  return {half(a.lo), half(a.hi)};
}

#endif

struct Dropout {
  uint32_t threshold = 0, stream = 0;
  uint32_t keys[2 * PHILOX_ROUNDS] = {};  // two a round; from memory an instruction spreads one over the lanes itself
  double scale = 1.0;  // 1 / P(kept), exact for the threshold
  bool active = false;

  Dropout() = default;
  Dropout(double p, const std::optional<at::Tensor>& seed, int64_t stream_) {
    TORCH_CHECK_VALUE(0.0 <= p && p < 1.0, "dropout probability must be in [0, 1), got ", p);
    if (p == 0.0) return;
    TORCH_CHECK_VALUE(seed.has_value(), "dropout (p > 0) needs a seed: an int64 tensor with one element");
    TORCH_CHECK_VALUE(seed->scalar_type() == at::kLong && seed->numel() == 1,
                      "seed must be an int64 tensor with one element, got ", seed->scalar_type(), " ", seed->sizes());
    const uint64_t key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    keys[0] = static_cast<uint32_t>(key), keys[1] = static_cast<uint32_t>(key >> 32);
    for (int i = 2; i < 2 * PHILOX_ROUNDS; i++) keys[i] = keys[i - 2] + (i % 2 ? PHILOX_W1 : PHILOX_W0);
    threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
    scale = 0x1p32 / (0x1p32 - threshold);
    stream = static_cast<uint32_t>(stream_);
    active = true;
  }

  // Kept elements of columns 64 group .. 64 (group + GROUPS) - 1 of a row: mask k is columns 16 k .. 16 k + 15 of them.
  template <int GROUPS>
  std::array<Mask, 4 * GROUPS> keep(int64_t row_key, int64_t group, uint32_t head) const {
    struct Counters {
      U32 c0 = 0u, c1 = 0u, c2 = 0u, c3 = 0u;
    } s[GROUPS];
    const uint64_t row = static_cast<uint64_t>(row_key);
    // only c0 differs between lanes: half of the first two rounds is scalar
    const uint64_t product1 = (row >> 32) * PHILOX_M1;
    const uint32_t mixed = static_cast<uint32_t>(product1 >> 32) ^ static_cast<uint32_t>(row) ^ keys[0];
    const uint64_t product0 = mixed * uint64_t{PHILOX_M0};
    U32 high(0u), low(0u), high1(0u), low1(0u);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      multiply(counting_from(static_cast<uint32_t>(16 * (group + g))), PHILOX_M0, high, s[g].c3);
      s[g].c2 = xor3(high, U32(stream << 8 | head), U32(keys[1]));
    }
#pragma GCC unroll 4
    for (auto& [c0, c1, c2, c3] : s) {
      multiply(c2, PHILOX_M1, high, c1);
      c0 = xor3(high, U32(static_cast<uint32_t>(product1)), U32(keys[2]));
      c2 = xor3(U32(static_cast<uint32_t>(product0 >> 32)), c3, U32(keys[3]));
      c3 = U32(static_cast<uint32_t>(product0));
    }
#pragma GCC unroll 8
    for (int round = 2; round < PHILOX_ROUNDS; round++) {
#pragma GCC unroll 4
      for (auto& [c0, c1, c2, c3] : s) {
        multiply(c0, PHILOX_M0, high, low);
        multiply(c2, PHILOX_M1, high1, low1);
        c0 = xor3(high1, c1, U32(keys[2 * round])), c2 = xor3(high, c3, U32(keys[2 * round + 1]));
        c1 = low1, c3 = low;
      }
    }
    std::array<Mask, 4 * GROUPS> kept;
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const U32 words[] = {s[g].c0, s[g].c1, s[g].c2, s[g].c3};
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) kept[4 * g + k] = at_least(words[k], threshold);
    }
    return kept;
  }
};

// for_columns with the mask of kept lanes: f(column, Whole or Tail, Mask). DROP = false draws nothing.
template <bool DROP, typename F>
inline void for_columns_dropped(int64_t n, const Dropout& dropout, int64_t row_key, F&& f, uint32_t head = 0) {
  if constexpr (!DROP) {
    for_columns(n, [&](int64_t j, auto size) { f(j, size, mask_of(0xffff)); });
  } else {
    int64_t j = 0;
    const auto draw = [&]<int GROUPS>(std::integral_constant<int, GROUPS>) {
      for (; j + 64 * GROUPS <= n; j += 64 * GROUPS) {
        const auto kept = dropout.keep<GROUPS>(row_key, j / 64, head);
#pragma GCC unroll 16
        for (int64_t k = 0; k < 4 * GROUPS; k++) f(j + 16 * k, Whole{}, kept[k]);
      }
    };
    draw(std::integral_constant<int, GROUPS_AT_ONCE>());
    draw(std::integral_constant<int, 1>());
    if (j < n) {
      const auto kept = dropout.keep<1>(row_key, j / 64, head);
      for_columns(n - j, [&](int64_t k, auto size) { f(j + k, size, kept[k / 16]); });
    }
  }
}

// The int64 (n_rows,) key of each row; absent, a row's key is its index.
struct RowKeys {
  at::Tensor holder;
  const int64_t* keys = nullptr;

  RowKeys(const std::optional<at::Tensor>& row_key, int64_t n_rows) {
    if (!row_key) return;
    TORCH_CHECK(row_key->scalar_type() == at::kLong && row_key->dim() == 1 && row_key->size(0) == n_rows,
                "row_key must be int64 of shape (", n_rows, ",), got ", row_key->scalar_type(), " ", row_key->sizes());
    holder = row_key->contiguous();
    keys = holder.const_data_ptr<int64_t>();
  }
  int64_t operator[](int64_t row) const { return keys ? keys[row] : row; }
};

}  // namespace bertfast
