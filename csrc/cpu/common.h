// What the CPU kernels share besides vec.h and dropout.h: checks, dispatch on the dtype, rows over threads, rows from
// and to memory, scratch memory, column sums.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdlib>
#include <memory>

#include "dropout.h"
#include "vec.h"

namespace bertfast {

#define CHECK_SAME_DTYPE(a, b)                                                                               \
  TORCH_CHECK_TYPE((a).scalar_type() == (b).scalar_type(), #a " is ", (a).scalar_type(), ", " #b " is ",     \
                   (b).scalar_type())
#define CHECK_SHAPE(a, ...)                                                                                  \
  TORCH_CHECK((a).sizes() == at::IntArrayRef({__VA_ARGS__}), #a " has shape ", (a).sizes(), ", expected ",   \
              at::IntArrayRef({__VA_ARGS__}))
// Runs the body with `scalar_t` bound to the dtype; other dtypes run on the reference.
#define DISPATCH_SCALAR(dtype, op, ...)                                                                      \
  [&] {                                                                                                      \
    switch (dtype) {                                                                                         \
      case at::kFloat: { using scalar_t = float; return __VA_ARGS__(); }                                     \
      case at::kBFloat16: { using scalar_t = c10::BFloat16; return __VA_ARGS__(); }                          \
      case at::kDouble: { using scalar_t = double; return __VA_ARGS__(); }                                   \
      default: TORCH_CHECK_NOT_IMPLEMENTED(false, op " on CPU takes float32, bfloat16 or float64, not ", dtype); \
    }                                                                                                        \
  }()

// at::empty, less the dispatcher and a header that is long to compile.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::detail::empty_cpu(sizes, options);
}

// A buffer of the calling thread that is kept and reused: fresh pages cost more than the work done in them.
// Valid until the thread asks for the same type and slot again. 64-byte aligned, not initialised.
template <typename T, int slot = 0>
inline T* scratch(int64_t n) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> buffer(nullptr, &std::free);
  static thread_local size_t capacity = 0;
  const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
  if (bytes > capacity) {
    buffer.reset(std::aligned_alloc(64, bytes));
    capacity = buffer ? bytes : 0;
    TORCH_CHECK(buffer, "out of memory: ", bytes, " bytes of scratch");
  }
  return static_cast<T*>(buffer.get());
}

// How many parts `n_rows` rows are cut into: one a thread, fewer where a part would be under ~10 us of work.
inline int64_t n_parts(int64_t n_rows, int64_t row_elements) {
#if defined(__AVX512F__)
  constexpr int64_t least = 32768;
#else
  constexpr int64_t least = 16384;
#endif
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(n_rows, at::get_num_threads()));
  return std::clamp<int64_t>(n_rows * row_elements / least, 1, most);
}

// Calls f(part, begin, end) for each part of n_rows, in parallel. The cut depends on the number of threads alone,
// so partial sums indexed by part and added in order are deterministic for a given number of threads.
template <typename F>
inline void for_parts(int64_t n_rows, int64_t parts, F&& f) {
  const auto run = [&](int64_t part) {
    f(part, n_rows * part / parts, n_rows * (part + 1) / parts);
    _mm_sfence();  // streamed stores are done before anyone is told so
  };
  if (parts == 1) return run(0);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; part++) run(part);
  });
}

// Whether t's rows are so many that they come from memory and go there, in aligned blocks. `least` MiB: where that is
// faster in quiet and in loud hours, a backward from 8 on, a forward, whose operands L3 still helps, once all of them
// have 128. Intel's caches in fp32 make it worth it from 1 on, whoever reads the rows next included. Measured on the two.
inline bool is_far(const at::Tensor& t, int64_t least) {
  static const bool amd = __builtin_cpu_is("amd"), intel = __builtin_cpu_is("intel");
  if (intel && t.element_size() > 2) least = 1;
  return (amd || intel) && static_cast<int64_t>(t.nbytes()) >= least << 20 && t.size(-1) % LANES == 0;
}

// Calls f(std::bool_constant, std::bool_constant): which of four compiled forms of a kernel runs.
template <typename F>
inline void choose(bool first, bool second, F&& f) {
  const auto with = [&](auto a) { second ? f(a, std::true_type()) : f(a, std::false_type()); };
  first ? with(std::true_type()) : with(std::false_type());
}

// A block of far rows that are read in order: what comes 512 elements later is asked for meanwhile.
template <bool FAR, typename scalar_t, typename S>
inline Vec<acc_t<scalar_t>> load_row(const scalar_t* p, S size) {
  constexpr int64_t AHEAD = 512;
  if constexpr (FAR) __builtin_prefetch(p + AHEAD);
  return Vec<acc_t<scalar_t>>::load(p, size);
}

// A block of far rows goes past the caches: a plain store that misses them reads the line first.
template <bool FAR, typename scalar_t, typename S>
inline void store_row(scalar_t* p, const Vec<acc_t<scalar_t>>& a, S size) {
  if constexpr (FAR && std::is_same_v<S, Whole>) {
    a.store(p, Streamed{});
  } else {
    a.store(p, size);
  }
}

// Sums of columns over a part's rows, in a cascade of 32 rows, 32 times that, and the rest, so that the error does
// not grow with the number of rows. Every part owns 3 n elements of `memory`.
template <typename acc>
struct ColumnSums {
  acc *total, *block, *row;
  int64_t n, rows = 0;

  static int64_t memory(int64_t parts, int64_t n) { return 3 * parts * n; }
  ColumnSums(acc* memory, int64_t part, int64_t n_)
      : total(memory + 3 * part * n_), block(total + n_), row(block + n_), n(n_) {
    std::fill_n(total, 3 * n, acc(0));
  }
  template <typename S>
  void add(int64_t j, S size, const Vec<acc>& x) {
    (Vec<acc>::load(row + j, size) + x).store(row + j, size);
  }
  void end_row() {
    if (++rows % 32 == 0) fold(row, block);
    if (rows % 1024 == 0) fold(block, total);
  }
  void end() {
    fold(row, block);
    fold(block, total);
  }

 private:
  void fold(acc* from, acc* into) {
    for_columns(n, [&](int64_t j, auto size) {
      (Vec<acc>::load(into + j, size) + Vec<acc>::load(from + j, size)).store(into + j, size);
      Vec<acc>().store(from + j, size);
    });
  }
};

// out (n,) = the parts' column sums from `first` on, added in order.
template <typename acc>
inline void add_parts(const at::Tensor& out, const acc* memory, int64_t parts, int64_t n, int64_t first = 0) {
  DISPATCH_SCALAR(out.scalar_type(), "a parameter's gradient", [&] {
    scalar_t* p = out.mutable_data_ptr<scalar_t>();
    for (int64_t j = 0; j < out.numel(); j++) {
      acc total = 0;
      for (int64_t part = 0; part < parts; part++) total += memory[3 * part * n + first + j];
      p[j] = static_cast<scalar_t>(total);
    }
  });
}

// A (n,) parameter as the arithmetic reads it: itself, or converted into scratch `slot`.
template <typename acc, int slot>
inline const acc* parameter(const at::Tensor& t) {
  if (t.scalar_type() == c10::CppTypeToScalarType<acc>::value && t.is_contiguous()) return t.const_data_ptr<acc>();
  acc* row = scratch<acc, slot>(t.numel());
  DISPATCH_SCALAR(t.scalar_type(), "a parameter", [&] {
    const scalar_t* p = t.const_data_ptr<scalar_t>();
    const int64_t stride = t.numel() > 1 ? t.stride(0) : 1;
    for (int64_t j = 0; j < t.numel(); j++) row[j] = static_cast<acc>(p[j * stride]);
  });
  return row;
}

}  // namespace bertfast
