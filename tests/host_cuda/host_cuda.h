// What csrc/cuda uses of CUDA, for the host, so that a C++ compiler builds the very same kernels and a host runs them.
//
// Blocks run one after another. The threads of a block are fibers that take turns on one thread of the system, or with
// HOST_CUDA_THREADS threads of the system, which the sanitizers can watch. Shared memory holds garbage when a block
// begins, and what cp.async copies to holds garbage until its group is waited for.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifndef HOST_CUDA_THREADS
#include <setjmp.h>
#include <ucontext.h>
#endif

#include "common/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  ((void)(stream), host_cuda::launch(blocks, threads, shared, [&] { kernel(__VA_ARGS__); }))

struct dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

// What the device is said to be.
inline int multiprocessors = 1, shared_limit = 163 << 10;

struct Copy {
  void* to;
  const void* from;
  int group;
};

#ifdef HOST_CUDA_THREADS

struct Barrier {
  std::barrier<> threads;
  explicit Barrier(int count) : threads(count) {}
  void wait() { threads.arrive_and_wait(); }
};

inline void run_all(int count, const std::function<void()>& body) {
  std::vector<std::jthread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&body, i] {
      threadIdx.x = i;
      body();
    });
  }
}

#else

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf state;
  bool started, finished;
};
inline std::vector<Fiber> fibers;
inline int running, alive;
inline jmp_buf caller;
inline const std::function<void()>* body_of_all;

[[noreturn]] inline void resume_next() {
  int next = running;
  do next = (next + 1) % static_cast<int>(fibers.size());
  while (fibers[next].finished);
  running = next;
  threadIdx.x = next;
  Fiber& fiber = fibers[next];
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
  std::abort();
}
inline void yield() {
  if (_setjmp(fibers[running].state) == 0) resume_next();
}
inline void whole_fiber() {
  (*body_of_all)();
  fibers[running].finished = true;
  if (--alive == 0) _longjmp(caller, 1);
  resume_next();
}

struct Barrier {
  int count, arrived = 0, generation = 0;
  explicit Barrier(int count) : count(count) {}
  void wait() {
    if (++arrived == count) {
      arrived = 0;
      ++generation;
      return;
    }
    for (const int mine = generation; generation == mine;) yield();
  }
};

inline void run_all(int count, const std::function<void()>& body) {
  fibers.resize(count);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack = {fiber.stack.get(), 0, Fiber::kStack};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, whole_fiber, 0);
    fiber.started = fiber.finished = false;
  }
  body_of_all = &body;
  alive = count;
  running = count - 1;
  if (_setjmp(caller) == 0) resume_next();
}

#endif

struct Block {
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<uint64_t> exchange;  // a word for each thread
  std::vector<std::vector<Copy>> copies;
  std::vector<int> group;
  size_t shared_bytes;
  unsigned char* shared;

  Block(int threads, size_t bytes)
      : all(threads), exchange(threads), copies(threads), group(threads), shared_bytes(bytes) {
    for (int first = 0; first < threads; first += 32) {
      warps.push_back(std::make_unique<Barrier>(std::min(32, threads - first)));
    }
    shared = static_cast<unsigned char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16));
  }
  ~Block() { std::free(shared); }
  Barrier& warp() { return *warps[threadIdx.x / 32]; }
};
inline Block* block;

inline void launch(unsigned blocks, int threads, size_t shared, const std::function<void()>& kernel) {
  Block all(threads, shared);
  block = &all;
  run_all(threads, [&] {
    blockDim.x = threads;
    gridDim.x = blocks;
    for (unsigned b = 0; b < blocks; ++b) {
      if (threadIdx.x == 0) std::memset(all.shared, 0xa5, shared);
      all.copies[threadIdx.x].clear();
      all.group[threadIdx.x] = 0;
      all.all.wait();
      blockIdx.x = b;
      kernel();
      all.all.wait();
    }
  });
}

// Every thread's value goes to all threads of `barrier`, which then compute with them.
template <typename T, typename Compute>
auto exchange(Barrier& barrier, T value, const Compute& compute) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&block->exchange[threadIdx.x], &value, sizeof(T));
  barrier.wait();
  const auto result = compute([](unsigned thread) {
    T other;
    std::memcpy(&other, &block->exchange[thread], sizeof(T));
    return other;
  });
  barrier.wait();
  return result;
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::block->all.wait(); }
inline void __syncwarp() { host_cuda::block->warp().wait(); }
inline int __syncthreads_and(int predicate) {
  return host_cuda::exchange(host_cuda::block->all, predicate, [](const auto& of) {
    bool all = true;
    for (unsigned t = 0; t < blockDim.x; ++t) all = all && of(t);
    return static_cast<int>(all);
  });
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  const unsigned first = threadIdx.x / 32 * 32;
  return host_cuda::exchange(host_cuda::block->warp(), value, [&](const auto& of) { return of(first + source % 32); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return host_cuda::exchange(host_cuda::block->warp(), value,
                             [&](const auto& of) { return lane < distance ? value : of(threadIdx.x - distance); });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned distance) {
  return host_cuda::exchange(host_cuda::block->warp(), value,
                             [&](const auto& of) { return of(threadIdx.x ^ distance); });
}

// ------------------------------------------------------------------------------------------------ the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? host_cuda::multiprocessors : host_cuda::shared_limit;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= host_cuda::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ the wrappers

namespace ser_fast::cuda {

using std::max;
using std::min;

inline unsigned char* shared_memory() { return host_cuda::block->shared; }

inline void copy_async(void* shared, const void* global) {
  if (std::bit_cast<uintptr_t>(shared) % 16 || std::bit_cast<uintptr_t>(global) % 16) std::abort();
  std::memset(shared, 0xa5, 16);
  host_cuda::block->copies[threadIdx.x].push_back({shared, global, host_cuda::block->group[threadIdx.x]});
}
inline void commit_copies() { ++host_cuda::block->group[threadIdx.x]; }
template <int pending>
void wait_copies() {
  std::erase_if(host_cuda::block->copies[threadIdx.x], [](const host_cuda::Copy& copy) {
    const bool due = copy.group < host_cuda::block->group[threadIdx.x] - pending;
    if (due) std::memcpy(copy.to, copy.from, 16);
    return due;
  });
}

inline void store_16(void* global, const void* values) {
  if (std::bit_cast<uintptr_t>(global) % 16) std::abort();
  std::memcpy(global, values, 16);
}

// The lanes of the warp compute with each other's values, which they see through pointers.
template <typename T, typename Compute>
void exchange_lanes(const T& mine, const Compute& compute) {
  const unsigned first = threadIdx.x / 32 * 32;
  host_cuda::exchange(host_cuda::block->warp(), &mine, [&](const auto& of) {
    compute([&](unsigned lane) -> const T& { return *of(first + lane); });
    return 0;
  });
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  if (std::bit_cast<uintptr_t>(row) % 16) std::abort();
  const unsigned lane = threadIdx.x % 32;
  exchange_lanes(row, [&](const auto& row_of) {
    for (unsigned i = 0; i < 4; ++i) {
      std::memcpy(&to[i], static_cast<const uint32_t*>(row_of(i * 8 + lane / 4)) + lane % 4, 4);
    }
  });
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  if (std::bit_cast<uintptr_t>(row) % 16) std::abort();
  const unsigned lane = threadIdx.x % 32;
  exchange_lanes(row, [&](const auto& row_of) {
    for (unsigned i = 0; i < 4; ++i) {
      const auto at = [&](unsigned r) { return static_cast<const uint16_t*>(row_of(i * 8 + r))[lane / 4]; };
      to[i] = at(lane % 4 * 2) | at(lane % 4 * 2 + 1) << 16;
    }
  });
}
// Lane l holds of a the rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, then the same 8 columns on; of b the
// column l / 4, rows 2 (l % 4) and the next, then 8 rows on; of the sum the rows as of a, columns 2 (l % 4) and the
// next.
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  struct Both {
    float a[8], b[4];
  } mine;
  const auto half = [](uint32_t word, int i) {
    return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(word >> 16 * i)));
  };
  for (int i = 0; i < 8; ++i) mine.a[i] = half(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = half(b[i / 2], i % 2);
  const unsigned lane = threadIdx.x % 32;
  exchange_lanes(mine, [&](const auto& of) {
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned pair = k % 8 / 2, at = k / 8 * 2 + k % 2;  // the lane of four that holds k, and where in its b
      const float* row = of(lane / 4 * 4 + pair).a;
      for (unsigned e = 0; e < 4; ++e) {
        sum[e] += row[k / 8 * 4 + e / 2 * 2 + k % 2] * of((lane % 4 * 2 + e % 2) * 4 + pair).b[at];
      }
    }
  });
}
inline uint32_t pack(float low, float high) {
  return std::bit_cast<uint16_t>(static_cast<_Float16>(low)) |
         static_cast<uint32_t>(std::bit_cast<uint16_t>(static_cast<_Float16>(high))) << 16;
}
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}
inline void atomic_add(int64_t* to, int64_t value) { std::atomic_ref(*to).fetch_add(value); }

inline float sine_pi(float x) { return static_cast<float>(sin(M_PI * x)); }
inline double sine_pi(double x) { return sin(M_PI * x); }

// The thread sanitizer sees a number being read or written, but not a class: by reference, and by its member.
inline float widen(const float16& x) {
  const uint16_t bits = x.bits;
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}
inline float widen(const bfloat16& x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline void narrow(float16& to, float x) { to.bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline void narrow(bfloat16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  to.bits = static_cast<uint16_t>(isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace ser_fast::cuda
