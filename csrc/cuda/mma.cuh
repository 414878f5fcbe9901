// Products of tiles on tensor cores: float16 operands, sums in float32.
//
// Operands reach shared memory by 16-byte asynchronous copies, and registers by ldmatrix; in shared memory the 16-byte
// parts of a row are permuted so that eight rows meet eight different groups of banks.
#pragma once

#include "cuda/device.h"

namespace ser_fast::cuda {

// The byte at which part `part` (16 bytes) of row `row` lies in a tile with kColumns columns: permuted ("swizzled").
template <int kColumns>
__device__ int swizzled(int row, int part) {
  const int turn = kColumns == 32 ? row / 2 % 4 : row % 8;
  return (row * (kColumns / 8) + (part ^ turn)) * 16;
}

// Starts the copy of a tile: kRows rows of `stride` elements, kColumns of each.
template <int kRows, int kColumns, int kThreads>
__device__ void copy_tile(unsigned char* tile, const float16* rows, int64_t stride) {
  constexpr int kParts = kColumns / 8;
  static_assert(kRows * kParts % kThreads == 0);
#pragma unroll
  for (int of = 0; of < kRows * kParts; of += kThreads) {
    const int row = (of + threadIdx.x) / kParts, part = (of + threadIdx.x) % kParts;
    copy_async(tile + swizzled<kColumns>(row, part), rows + row * stride + part * 8);
  }
}

// What a warp holds of a sum of products: kRows x kColumns.
template <int kRows, int kColumns>
struct TileSum {
  float of[kRows / 16][kColumns / 8][4];

  __device__ void clear() {
#pragma unroll
    for (auto& row : of) {
#pragma unroll
      for (auto& part : row) part[0] = part[1] = part[2] = part[3] = 0;
    }
  }

  // visit(first, second, m, row, column): two neighbours in a row. m numbers the rows that this thread holds.
  template <typename Visit>
  __device__ void for_each_pair(const Visit& visit) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRows / 8; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        float* pair = of[m / 2][n] + m % 2 * 2;
        visit(pair[0], pair[1], m, m * 8 + lane / 4, n * 8 + lane % 4 * 2);
      }
    }
  }
};

// sum += A B^T over kDepth columns, from `row` of tile a and `column` of tile b on; with kTransposed b holds B, so that
// kDepth counts its rows.
template <int kDepth, int kColumnsA, int kColumnsB, bool kTransposed, int kM, int kN>
__device__ void multiply(TileSum<kM, kN>& sum, const unsigned char* a, int row, const unsigned char* b, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[kM / 16][4];
#pragma unroll
    for (int m = 0; m < kM / 16; ++m) {
      load_matrices(left[m], a + swizzled<kColumnsA>(row + m * 16 + lane % 16, k / 8 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t right[4];
      if constexpr (kTransposed) {
        load_matrices_transposed(right, b + swizzled<kColumnsB>(k + lane % 16, (column + n) / 8 + lane / 16));
      } else {
        load_matrices(right, b + swizzled<kColumnsB>(column + n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        multiply_add(sum.of[m][n / 8], left[m], right);
        multiply_add(sum.of[m][n / 8 + 1], left[m], right + 2);
      }
    }
  }
}

}  // namespace ser_fast::cuda
