#include "cpu/channel_vectors.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace ser_fast {

#ifdef __aarch64__
typedef __fp16 Half;  // GCC has no _Float16 in C++ there before its version 13
#else
typedef _Float16 Half;
#endif

namespace portable {
#define SER_FAST_BYTES 16
#define SER_FAST_REGISTERS 8
#include "cpu/channel_vectors.inc"
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(SER_FAST_PORTABLE)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define SER_FAST_BYTES 32
#define SER_FAST_REGISTERS 8
#define SER_FAST_STREAM(to, vector) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)(vector))
#define SER_FAST_STREAM_HALF(to, vector) _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)(vector))
#define SER_FAST_TO_FLOAT16(vector) _mm256_cvtps_ph((__m256)(vector), _MM_FROUND_TO_NEAREST_INT)
#include "cpu/channel_vectors.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#define SER_FAST_BYTES 64
#define SER_FAST_REGISTERS 16
#define SER_FAST_STREAM(to, vector) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)(vector))
#define SER_FAST_STREAM_HALF(to, vector) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)(vector))
#define SER_FAST_TO_FLOAT16(vector) _mm512_cvtps_ph((__m512)(vector), _MM_FROUND_TO_NEAREST_INT)
#include "cpu/channel_vectors.inc"
}  // namespace avx512
#pragma GCC pop_options

const ChannelKernels& channel_kernels() {
  static const ChannelKernels& best =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? avx512::kernels
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::kernels
                                                                        : portable::kernels;
  return best;
}

#else

const ChannelKernels& channel_kernels() { return portable::kernels; }

#endif

}  // namespace ser_fast
