// What the kernels of nt_xent read of a set of rows: operands of the products, and the table that `prepare` writes.
#pragma once

#include <cstdint>

#include "common/tiles.h"
#include "cuda/device.h"

namespace ser_fast::cuda {

constexpr float kKeptScale = 1 << kKeptExponent;  // kept similarities are this times P

struct Table {
  const int64_t* at;
  int64_t padded;

  __device__ int64_t image(int64_t r) const { return at[r]; }
  __device__ bool valid(int64_t r) const { return at[padded + r] != 0; }
  // Of the span that r is in.
  __device__ int64_t lowest(int64_t r) const { return at[2 * padded + r / kSpan]; }
  __device__ int64_t highest(int64_t r) const { return at[2 * padded + padded / kSpan + r / kSpan]; }
  __device__ bool all_valid(int64_t r) const { return at[2 * padded + 2 * (padded / kSpan) + r / kSpan] != 0; }
};

}  // namespace ser_fast::cuda
