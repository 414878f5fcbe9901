// What a kernel needs of CUDA beyond the language: launches, and one-line wrappers of the instructions.
//
// A compiler that is not nvcc finds all this for the host in tests/host_cuda, and the kernels run there.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, blocks, threads, shared, stream, ...) kernel<<<blocks, threads, shared, stream>>>(__VA_ARGS__)

namespace ser_fast::cuda {

// The shared memory that the launch asked for.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// 16 bytes from global to shared memory, past the first-level cache; there after the wait for its group.
__device__ inline void copy_async(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
// All but the last `pending` groups of this thread are there.
template <int pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 16 bytes to global memory at once: the compiler would store them word by word.
__device__ inline void store_16(void* global, const void* values) {
  uint32_t words[4];
  memcpy(words, values, sizeof(words));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, and receives
// of each matrix two neighbours in row l / 4; transposed, in column l / 4.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}
// sum += a b by the warp: (16, 8) float32, (16, 16) and (16, 8) float16.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Two float16 in a word.
__device__ inline uint32_t pack(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &both, sizeof(word));
  return word;
}
// 2^x to two units in the last place; results below the normal range are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline void atomic_add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// sin(pi x)
__device__ inline float sine_pi(float x) { return sinpif(x); }
__device__ inline double sine_pi(double x) { return sinpi(x); }

__device__ inline float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline void narrow(float16& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void narrow(bfloat16& to, float x) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

}  // namespace ser_fast::cuda

#else
#include "host_cuda.h"
#endif

namespace ser_fast::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float& to, float x) { to = x; }
__device__ inline void narrow(double& to, double x) { to = x; }

}  // namespace ser_fast::cuda
