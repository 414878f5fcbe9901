// Vectors of channels: blended, converted, moved. Compiled for several instruction sets; the best one is picked at run
// time.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace ser_fast {

// The taps of one output row: out[c] = sum over t of weight[t] base[index[t] * stride + c].
template <typename Real>
struct Blend {
  const Real* base;
  int64_t stride;
  const int32_t* index;
  const Real* weight;
  int64_t taps;
};

// `stream`: write past the caches, which saves reading what is overwritten; for outputs that won't stay in them anyway.
struct ChannelKernels {
  void (*blend_float)(float* out, const Blend<float>& sum, int64_t count, bool stream);
  void (*blend_double)(double* out, const Blend<double>& sum, int64_t count, bool stream);
  // Rounded once, to the nearest, ties to even; NaN stays NaN.
  void (*blend_bfloat16)(bfloat16* out, const Blend<float>& sum, int64_t count, bool stream);
  void (*blend_float16)(float16* out, const Blend<float>& sum, int64_t count, bool stream);
  void (*widen_bfloat16)(float* out, const bfloat16* in, int64_t count);
  void (*widen_float16)(float* out, const float16* in, int64_t count);
  void (*copy)(void* out, const void* in, int64_t bytes, bool stream);
  void (*finish)();  // streamed stores are not ordered with others: called before another thread reads them
};

const ChannelKernels& channel_kernels();

}  // namespace ser_fast
