// What all kernels of nt_xent know of rows and of the tiles of the similarity matrix (ser_fast/ops/tiled.py).
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace ser_fast::cuda {

constexpr int kSpan = 32;         // rows that share a range of images
constexpr int kSide = 128;        // of a tile
constexpr float kLift = 0x1p15f;  // kept similarities are 2^15 P

// The table that `prepare` writes: image and valid of each row, and of each span the lowest image, the highest, and
// whether all rows are valid.
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
