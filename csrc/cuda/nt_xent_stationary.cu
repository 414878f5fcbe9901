// The output-stationary steps of the losses: a block owns some rows and what it accumulates for them, and walks over
// the keys. What P, G, a and the shifts are, ser_fast/ops says.

#include "cuda/nt_xent_stationary.h"

#include "cuda/launch.h"
#include "cuda/nt_xent_entries.cuh"

namespace ser_fast::cuda {
namespace {

// The largest term of a mean is about 2^14, so that float16 holds 2^-28 of it; with a bound it is below 2^15.
constexpr float kLargestTerm = kLargestWeightLog2;
constexpr float kLargestBoundedTerm = kLargestWeightLog2 + 1;

// A block keeps kRows rows, and what it accumulates for them, and walks over the keys, kKeys at a time. Its warps
// divide the similarities as kRows / kM x kKeys / kN, and the result as kRows / kOutM x kColumns / kOutN.
template <int columns, int rows, int keys, int warps, int m, int n, int out_m, int out_n>
struct RowBlock {
  static constexpr int kColumns = columns, kRows = rows, kKeys = keys, kThreads = 32 * warps;
  static constexpr int kM = m, kN = n, kOutM = out_m, kOutN = out_n;
  static_assert(rows / m * (keys / n) == warps && rows / out_m * (columns / out_n) == warps);

  struct Shared {
    unsigned char q[rows * columns * 2], k[2][keys * columns * 2], weights[rows * keys * 2];
    TileLabels<rows, keys> labels;
    float row_max[2][rows], by_part[keys / n][rows];
  };
};

// Rows of the warps' parts of the similarities that a thread holds, one after another: m * 8 + lane / 4.
template <typename S, bool kDetached>
__device__ __forceinline__ void walk_keys(const Operand& q, const Operand& k, int64_t tiles, float* state, float* out,
                                          int64_t splits, float scale, bool bounded) {
  constexpr int kColumns = S::kColumns, kRows = S::kRows, kKeys = S::kKeys;
  auto& shared = *reinterpret_cast<typename S::Shared*>(shared_memory());
  const int64_t row_blocks = q.padded / kRows, i = blockIdx.x % row_blocks * kRows, split = blockIdx.x / row_blocks;
  const int64_t begin = split * tiles / splits, end = (split + 1) * tiles / splits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = warp % (kKeys / S::kN), row = warp / (kKeys / S::kN) * S::kM, column = part * S::kN;
  const int out_row = warp / (kColumns / S::kOutN) * S::kOutM, out_column = warp % (kColumns / S::kOutN) * S::kOutN;
  const auto* keys = static_cast<const float16*>(k.u);
  const auto load = [&](int64_t tile) {
    copy_tile<kKeys, kColumns, S::kThreads>(shared.k[tile % 2], keys + tile * kKeys * kColumns, kColumns);
    commit_copies();
  };

  copy_tile<kRows, kColumns, S::kThreads>(shared.q, static_cast<const float16*>(q.u) + i * kColumns, kColumns);
  if (begin < end) load(begin);
  const ImageRange images_i = image_range(q, i, kRows);
  const float first_max = bounded ? scale - kLargestBoundedTerm : kNone;
  for (int r = threadIdx.x; r < kRows; r += S::kThreads) shared.row_max[begin % 2][r] = first_max;
  float total[S::kM / 8] = {};
  TileSum<S::kOutM, S::kOutN> result;
  result.clear();

#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < end) load(tile + 1);
    const unsigned char* key_tile = shared.k[tile % 2];
    const int64_t j = tile * kKeys;
    const ImageRange images_j = image_range(k, j, kKeys);
    TileSum<S::kM, S::kN> s;
    s.clear();
    multiply<kColumns, kColumns, kColumns, false>(s, shared.q, row, key_tile, column);
    if (!all_negative(images_i, images_j)) {
      shared.labels.load(q, i, k, j);
      shared.labels.keep_negatives(s, row, column);
    }
    if constexpr (kDetached) {
      const float* row_max = shared.row_max[tile % 2];
      float* next_max = shared.row_max[(tile + 1) % 2];
      if (!bounded) {
        float highest[S::kM / 8];
#pragma unroll
        for (float& of : highest) of = kNone;
        s.for_each_pair(
            [&](float first, float second, int m, int, int) { highest[m] = fmaxf(highest[m], fmaxf(first, second)); });
#pragma unroll
        for (int m = 0; m < S::kM / 8; ++m) {
          highest[m] = fmaxf(highest[m], __shfl_xor_sync(~0u, highest[m], 1));
          highest[m] = fmaxf(highest[m], __shfl_xor_sync(~0u, highest[m], 2));
          if (lane % 4 == 0) shared.by_part[part][row + m * 8 + lane / 4] = highest[m];
        }
        __syncthreads();
        for (int r = threadIdx.x; r < kRows; r += S::kThreads) {
          float of_row = shared.by_part[0][r];
#pragma unroll
          for (int other = 1; other < kKeys / S::kN; ++other) of_row = fmaxf(of_row, shared.by_part[other][r]);
          next_max[r] = fmaxf(row_max[r], of_row * scale - kLargestTerm);
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < S::kM / 8; ++m) {
          const int r = row + m * 8 + lane / 4;
          total[m] *= exp2_fast(row_max[r] - (next_max[r] == kNone ? 0 : next_max[r]));
        }
        result.for_each_pair([&](float& first, float& second, int, int r, int) {
          const float now = next_max[out_row + r];
          const float shrink = exp2_fast(row_max[out_row + r] - (now == kNone ? 0 : now));
          first *= shrink;
          second *= shrink;
        });
      }
      s.for_each_pair([&](float& first, float& second, int m, int r, int) {
        const float of_row = bounded ? first_max : next_max[row + r], shift = of_row == kNone ? 0 : of_row;
        first = exp2_fast(first * scale - shift);
        second = exp2_fast(second * scale - shift);
        total[m] += first + second;
      });
    } else {
      to_gradient(s, q, i + row, k, j + column, scale, bounded);
    }
    s.for_each_pair([&](float first, float second, int, int r, int c) {
      const uint32_t both = pack(first, second);
      memcpy(shared.weights + swizzled<kKeys>(row + r, (column + c) / 8) + c % 8 * 2, &both, 4);
    });
    __syncthreads();
    multiply<kKeys, kKeys, kColumns, true>(result, shared.weights, out_row, key_tile, out_column);
  }

  float* block_out = out + (split * q.padded + i) * kColumns;
  result.for_each_pair([&](float first, float second, int, int r, int c) {
    float* to = block_out + (out_row + r) * kColumns + out_column + c;
    to[0] = first;
    to[1] = second;
  });
  if constexpr (kDetached) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < S::kM / 8; ++m) {
      total[m] += __shfl_xor_sync(~0u, total[m], 1);
      total[m] += __shfl_xor_sync(~0u, total[m], 2);
      if (lane % 4 == 0) shared.by_part[part][row + m * 8 + lane / 4] = total[m];
    }
    __syncthreads();
    for (int r = threadIdx.x; r < kRows; r += S::kThreads) {
      float of_row = shared.by_part[0][r];
#pragma unroll
      for (int other = 1; other < kKeys / S::kN; ++other) of_row += shared.by_part[other][r];
      state[split * q.padded + i + r] = bounded ? first_max : shared.row_max[end % 2][r];
      state[(splits + split) * q.padded + i + r] = of_row;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads)
    stationary_gradient_kernel(Operand q, Operand k, int64_t tiles, float* out, int64_t splits, float scale,
                               bool bounded) {
  walk_keys<S, false>(q, k, tiles, nullptr, out, splits, scale, bounded);
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads)
    detached_sums_kernel(Operand q, Operand k, int64_t tiles, float* state, float* out, int64_t splits, float scale,
                         bool bounded) {
  walk_keys<S, true>(q, k, tiles, state, out, splits, scale, bounded);
}

using RowBlock64 = RowBlock<64, 128, 64, 4, 64, 32, 32, 64>;
using RowBlock128 = RowBlock<128, 128, 64, 4, 64, 32, 64, 64>;
using RowBlock256 = RowBlock<256, 128, 64, 8, 32, 32, 64, 64>;
using RowBlock512 = RowBlock<512, 64, 64, 8, 32, 16, 64, 64>;
using SmallRowBlock512 = RowBlock<512, 64, 32, 8, 16, 16, 64, 64>;

// What ser_fast/ops chooses the splits and the paths by.
template <typename S>
constexpr bool is(const StationaryBlock& block) {
  return block.columns == S::kColumns && block.rows == S::kRows && block.keys == S::kKeys &&
         sizeof(typename S::Shared) <= static_cast<size_t>(block.shared_memory);
}
static_assert(is<RowBlock64>(kStationaryBlocks[0]) && is<RowBlock128>(kStationaryBlocks[1]));
static_assert(is<RowBlock256>(kStationaryBlocks[2]));
static_assert(is<RowBlock512>(kStationaryBlocks[3]) && is<SmallRowBlock512>(kStationaryBlocks[4]));

}  // namespace

const char* stationary_gradient(const Operand& q, const Operand& k, int64_t columns, int64_t keys, float* out,
                                int64_t splits, float scale, bool bounded, void* stream) {
  const auto run = [&](auto block) {
    using S = decltype(block);
    return launch(stationary_gradient_kernel<S>, q.padded / S::kRows * splits, S::kThreads, sizeof(typename S::Shared),
                  stream, q, k, divide_up(keys, S::kKeys), out, splits, scale, bounded);
  };
  switch (columns) {
    case 64: return run(RowBlock64{});
    case 128: return run(RowBlock128{});
    case 256: return run(RowBlock256{});
    default: return "stationary_gradient takes 64, 128 or 256 columns";
  }
}

const char* detached_sums(const Operand& q, const Operand& k, int64_t columns, int64_t keys, float* state, float* out,
                          int64_t splits, float scale, bool bounded, void* stream) {
  const auto run = [&](auto block) {
    using S = decltype(block);
    return launch(detached_sums_kernel<S>, q.padded / S::kRows * splits, S::kThreads, sizeof(typename S::Shared),
                  stream, q, k, divide_up(keys, S::kKeys), state, out, splits, scale, bounded);
  };
  int limit;
  if (const cudaError_t error = shared_limit(limit); error != cudaSuccess) return error_string(error);
  switch (columns) {
    case 64: return run(RowBlock64{});
    case 128: return run(RowBlock128{});
    case 256: return run(RowBlock256{});
    case 512:
      return limit >= static_cast<int>(sizeof(RowBlock512::Shared)) ? run(RowBlock512{}) : run(SmallRowBlock512{});
    default: return "detached keys take 64, 128, 256 or 512 columns";
  }
}

}  // namespace ser_fast::cuda
