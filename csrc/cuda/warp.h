// A warp at work on a row of numbers: each lane has chunks of some neighbours, 32 chunks at a time.
#pragma once

#include <type_traits>

#include "cuda/device.h"

namespace ser_fast::cuda {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // numbers in 16 bytes

// The same bits in all lanes, and every time.
template <typename T, typename Combine>
__device__ T reduce(T value, const Combine& combine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}
template <typename T>
__device__ T warp_sum(T value) {
  return reduce(value, [](T a, T b) { return a + b; });
}
template <typename T>
__device__ T warp_min(T value) {
  return reduce(value, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
__device__ T warp_max(T value) {
  return reduce(value, [](T a, T b) { return b > a ? b : a; });
}

// `count` numbers of the N from `from` on, and 0 for the others. wide: all N, and from a multiple of 16 bytes.
template <int N, typename T, typename Real>
__device__ void load(Real (&to)[N], const T* from, int count, bool wide) {
  if (wide) {
    struct alignas(16) Words {
      T of[kChunk<T>];
    };
#pragma unroll
    for (int i = 0; i < N; i += kChunk<T>) {
      const Words words = *reinterpret_cast<const Words*>(from + i);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) to[i + e] = widen(words.of[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? widen(from[i]) : Real{0};
  }
}

template <int N, typename T, typename Real>
__device__ void store(T* to, const Real (&values)[N], int count, bool wide) {
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; i += kChunk<T>) {
      T words[kChunk<T>];
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) narrow(words[e], values[i + e]);
      store_16(to + i, words);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) narrow(to[i], values[i]);
    }
  }
}

}  // namespace ser_fast::cuda
