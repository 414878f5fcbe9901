// What becomes of a warp's part of a tile of similarities: pairs that are no negatives are masked out, and similarities
// become entries of G (ser_fast/ops has the mathematics).
#pragma once

#include "common/tiles.h"
#include "cuda/mma.cuh"
#include "cuda/nt_xent_operands.h"
#include "cuda/nt_xent_tiles.h"

namespace ser_fast::cuda {

constexpr float kNone = -INFINITY;  // a similarity that takes no part

// The rows of a tile: the range of their images, and whether all are valid.
struct ImageRange {
  int64_t lowest, highest;
  bool valid;
};

__device__ inline ImageRange image_range(const Operand& operand, int64_t start, int rows) {
  const Table table{operand.table, operand.padded};
  ImageRange images{table.lowest(start), table.highest(start), table.all_valid(start)};
  for (int64_t r = start + kSpan; r < start + rows; r += kSpan) {
    images.lowest = min(images.lowest, table.lowest(r));
    images.highest = max(images.highest, table.highest(r));
    images.valid = images.valid && table.all_valid(r);
  }
  return images;
}

__device__ inline bool all_negative(const ImageRange& a, const ImageRange& b) {
  return (a.lowest > b.highest || b.lowest > a.highest) && a.valid && b.valid;
}
__device__ inline bool one_image(const ImageRange& a, const ImageRange& b) {
  return a.lowest == a.highest && b.lowest == b.highest && a.lowest == b.lowest;
}

// Images and valid bits of a tile's kRows rows and, behind them, of its kKeys columns, in shared memory.
template <int kRows, int kKeys>
struct TileLabels {
  int64_t image[kRows + kKeys];
  int valid[kRows + kKeys];

  // For all threads of the block.
  __device__ void load(const Operand& q, int64_t i, const Operand& k, int64_t j) {
    __syncthreads();
    for (int at = threadIdx.x; at < kRows + kKeys; at += blockDim.x) {
      const Operand& operand = at < kRows ? q : k;
      const int64_t r = at < kRows ? i + at : j + at - kRows;
      const Table table{operand.table, operand.padded};
      image[at] = table.image(r);
      valid[at] = table.valid(r);
    }
    __syncthreads();
  }

  template <int kM, int kN>
  __device__ void keep_negatives(TileSum<kM, kN>& s, int row, int column) const {
    s.for_each_pair([&](float& first, float& second, int, int r, int c) {
      const int64_t mine = image[row + r];
      const int takes_part = valid[row + r], at = kRows + column + c;
      if (mine == image[at] || !(takes_part & valid[at])) first = kNone;
      if (mine == image[at + 1] || !(takes_part & valid[at + 1])) second = kNone;
    });
  }
};

// The gradient weight a of a row, and its shift. Where a is not asked for, it is 0, and the shift one that 2^(s -
// shift) is finite with.
struct GradientWeight {
  float a, shift;
};
__device__ inline GradientWeight weight_at(const Operand& operand, int64_t at, float scale) {
  if (operand.weights == nullptr) return {0, scale};
  return {operand.weights[at], operand.weights[operand.padded + at]};
}

// G in place of the products of rows from i on with keys from j on. Without a bound the shifts are the rows' own.
template <int kM, int kN>
__device__ void to_gradient(TileSum<kM, kN>& s, const Operand& q, int64_t i, const Operand& k, int64_t j, float scale,
                            bool bounded) {
  if (bounded) {
    s.for_each_pair([&](float& first, float& second, int, int r, int c) {
      const float a = weight_at(q, i + r, scale).a;
      first = exp2_fast(first * scale - scale) * (a + weight_at(k, j + c, scale).a);
      second = exp2_fast(second * scale - scale) * (a + weight_at(k, j + c + 1, scale).a);
    });
  } else {
    s.for_each_pair([&](float& first, float& second, int, int r, int c) {
      const GradientWeight row = weight_at(q, i + r, scale);
      const GradientWeight left = weight_at(k, j + c, scale), right = weight_at(k, j + c + 1, scale);
      first *= scale;
      second *= scale;
      first = exp2_fast(first - row.shift) * row.a + exp2_fast(first - left.shift) * left.a;
      second = exp2_fast(second - row.shift) * row.a + exp2_fast(second - right.shift) * right.a;
    });
  }
}

}  // namespace ser_fast::cuda
