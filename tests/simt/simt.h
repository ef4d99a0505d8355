// CUDA's threads as fibers on a CPU, so that the kernels of csrc/ run where there is no GPU: as slow as an interpreter, and as
// useful.
//
// A fiber runs until it must wait for others: for its block in __syncthreads, for the lanes of a mask in a warp-wide operation.
// Those it waits for run meanwhile, one after the other; a wait that nobody can end aborts. Shared memory starts out as NaN, like
// any other that nobody wrote. Lanes do not run in lockstep, so a missing __syncwarp shows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define MMFUSED_SIMT 1

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum class State { ready, block, warp, done };

struct Fiber {
  ucontext_t context;
  State state = State::ready;
  unsigned mask = 0;            // of the lanes it waits for
  unsigned char value[8] = {};  // what it shows to the other lanes
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current = 0;

inline void wait(State state, unsigned mask = 0) {
  Fiber& self = fibers[current];
  self.state = state;
  self.mask = mask;
  swapcontext(&self.context, &scheduler);
}

inline void enter() {
  body();
  fibers[current].state = State::done;
  swapcontext(&fibers[current].context, &scheduler);
}

// Whether every lane of the mask waits with the same mask; then all of them go on.
inline bool release_warp(int first) {
  const unsigned mask = fibers[first].mask;
  const int base = first / 32 * 32;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) {
      const Fiber& other = fibers[base + lane];
      if (other.state != State::warp || other.mask != mask) return false;
    }
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) fibers[base + lane].state = State::ready;
  return true;
}

inline void run_block(int threads) {
  constexpr size_t stack = 1 << 16;
  static std::vector<char> stacks(1024 * stack);
  fibers = std::vector<Fiber>(threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    auto& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * stack;
    fiber.context.uc_stack.ss_size = stack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool moved = false;
    int done = 0, waiting = 0;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].state == State::warp) moved = release_warp(current) || moved;
      if (fibers[current].state == State::ready) {
        threadIdx.x = current;
        swapcontext(&scheduler, &fibers[current].context);
        moved = true;
      }
      done += fibers[current].state == State::done;
      waiting += fibers[current].state == State::block;
    }
    if (done == threads) return;
    if (waiting > 0 && done + waiting == threads) {
      if (done > 0) std::fprintf(stderr, "simt: a thread left the kernel before a __syncthreads of the others\n"), std::abort();
      for (auto& fiber : fibers) fiber.state = State::ready;
    } else if (!moved) {
      std::fprintf(stderr, "simt: threads wait for lanes that never come\n"), std::abort();
    }
  }
}

// Shows a value to the lanes of the mask and returns what lane `source` shows.
template <typename T> T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(fibers[current].value, &value, sizeof value);
  wait(State::warp, mask);
  T found;
  std::memcpy(&found, fibers[current / 32 * 32 + source].value, sizeof found);
  wait(State::warp, mask);  // nobody may show the next value before all have seen this one
  return found;
}

}  // namespace simt

namespace mmfused {
namespace {
int shared[1 << 16];  // what the kernels' `extern __shared__ int shared[]` names
}
}  // namespace mmfused

inline void __syncthreads() { simt::wait(simt::State::block); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::wait(simt::State::warp, mask); }

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = simt::current % 32;
  return simt::exchange(mask, value, lane / width * width + source % width);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int step, int = 32) {
  return simt::exchange(mask, value, simt::current % 32 ^ step);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, int step) {
  const int lane = simt::current % 32;
  return simt::exchange(mask, value, lane < step ? lane : lane - step);
}
template <typename T> unsigned __match_any_sync(unsigned mask, T value) {
  unsigned alike = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (simt::exchange(mask, value, lane) == value) alike |= 1u << lane;
  return alike & mask;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

template <typename... Takes, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Takes...), Args... args) {
  gridDim.x = config->gridDim.x;
  blockDim.x = config->blockDim.x;
  if (config->dynamicSmemBytes > sizeof mmfused::shared) return cudaErrorInvalidValue;
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    blockIdx.x = block;
    std::memset(mmfused::shared, 0xff, sizeof mmfused::shared);  // NaN, or -1
    simt::body = [&] { kernel(args...); };
    simt::run_block(int(config->blockDim.x));
  }
  return cudaSuccess;
}
