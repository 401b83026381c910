// CUDA on a CPU, for the tests of the kernels in csrc/cuda: enough of it to run them, one block after another, every
// thread of a block a fiber of its own (ucontext). What waits on a GPU waits here: a barrier for the whole block, a
// shuffle or ballot for the lanes that its mask names; if those never come it is an error, not a hang.
//
// A warp runs as far as it can before the next begins: where a barrier is missing it overwrites what others still need.
//
// Not modelled: blocks running at once, the weak memory order, asynchronous copies, tensor cores. Blocks and threads
// may run in reverse order (BACKWARDS=1): what depends on the order then shows. The sanitizers see every access.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

namespace emulation {

enum class State { READY, AT_BARRIER, AT_COLLECTIVE, DONE };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
  dim3 index;
  uint32_t mask;  // lanes that the collective names
  uint64_t slot;  // what this lane shows the others
  static constexpr size_t STACK = 256 << 10;
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline Thread* current;
inline dim3 block_index, block_size, grid_size;
inline std::function<void()> kernel;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulation: %s, block (%u, %u)\n", what, block_index.x, block_index.y);
  std::exit(3);
}

inline void wait_at(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

inline void run_thread() {
  kernel();
  wait_at(State::DONE);
}

// Lets the lanes of a warp go on whose collective is complete; whether there were any.
inline bool release_collectives(unsigned first_lane, unsigned n_lanes) {
  uint32_t arrived = 0, named = 0;
  for (unsigned lane = 0; lane < n_lanes; lane++) {
    const Thread& thread = threads[first_lane + lane];
    if (thread.state != State::AT_COLLECTIVE) continue;
    arrived |= 1u << lane;
    named |= thread.mask;
  }
  if (!arrived) return false;
  if (named != arrived) fail("a shuffle or ballot names lanes that did not arrive");
  for (unsigned lane = 0; lane < n_lanes; lane++) threads[first_lane + lane].state = State::READY;
  return true;
}

inline void run_block(bool backwards) {
  const unsigned n = static_cast<unsigned>(threads.size());
  for (unsigned i = 0; i < n; i++) {
    Thread& thread = threads[i];
    thread.state = State::READY;
    thread.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  for (;;) {
    for (unsigned at = 0; at < n; at += 32) {
      const unsigned first = backwards ? (n - 1) / 32 * 32 - at : at, n_lanes = std::min(32u, n - first);
      do {
        for (unsigned i = 0; i < n_lanes; i++) {
          current = &threads[first + (backwards ? n_lanes - 1 - i : i)];
          if (current->state == State::READY) swapcontext(&scheduler, &current->context);
        }
      } while (release_collectives(first, n_lanes));
    }
    unsigned done = 0, waiting = 0;
    for (const Thread& thread : threads) {
      done += thread.state == State::DONE;
      waiting += thread.state == State::AT_BARRIER;
    }
    if (done == n) return;
    if (waiting < n) fail("__syncthreads was reached by a part of the block");
    for (Thread& thread : threads) thread.state = State::READY;
  }
}

template <typename F>
void launch(dim3 grid, dim3 block, F&& body) {
  const bool backwards = std::getenv("BACKWARDS") != nullptr;
  kernel = body, grid_size = grid, block_size = block;
  if (block.x * block.y * block.z > 1024) fail("a block of more than 1024 threads");
  threads.resize(block.x * block.y * block.z);
  for (unsigned i = 0; i < grid.x * grid.y; i++) {
    const unsigned at = backwards ? grid.x * grid.y - 1 - i : i;
    block_index = dim3(at % grid.x, at / grid.x);
    run_block(backwards);
  }
}

inline unsigned linear_index() { return static_cast<unsigned>(current - threads.data()); }

// Shows `value` to the warp, and returns what `source` lane shows; two waits, so that no slot is overwritten early.
template <typename T, typename F>
auto exchange(uint32_t mask, T value, F&& read) {
  current->slot = 0;
  std::memcpy(&current->slot, &value, sizeof value);
  current->mask = mask;
  wait_at(State::AT_COLLECTIVE);
  const auto result = read(&threads[linear_index() / 32 * 32]);
  wait_at(State::AT_COLLECTIVE);
  return result;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::wait_at(emulation::State::AT_BARRIER); }

inline float __shfl_xor_sync(uint32_t mask, float value, int with) {
  const unsigned source = emulation::linear_index() % 32 ^ static_cast<unsigned>(with);
  return emulation::exchange(mask, value, [&](const emulation::Thread* warp) {
    float shown;
    std::memcpy(&shown, &warp[source].slot, sizeof shown);
    return shown;
  });
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
  return emulation::exchange(mask, static_cast<uint32_t>(vote), [](const emulation::Thread* warp) {
    uint32_t votes = 0;
    for (unsigned lane = 0; lane < 32; lane++) votes |= static_cast<uint32_t>(warp[lane].slot & 1) << lane;
    return votes;
  });
}
