// Steps of the losses that go through the similarity matrix in tiles of 128 x 128, one exp an entry (two where the
// temperature leaves no bound). What P, G, a and the shifts are, ser_fast/ops says.

#include "cuda/nt_xent_tiles.h"

#include "cuda/launch.h"
#include "cuda/nt_xent_entries.cuh"

namespace ser_fast::cuda {
namespace {

constexpr int kDepth = 32, kStages = 4, kThreads = 128, kGroup = 8;
constexpr int kHalf = kTile / 2;  // a warp has a quarter of a tile
constexpr int kTileBytes = kTile * kDepth * 2;
constexpr int kStaged = kStages * 2 * kTileBytes;

struct TileShared {
  unsigned char staged[kStaged];
  TileLabels<kTile, kTile> labels;
  float by_row[2][2][kTile], by_column[2][kTile];
};

// use(tile, s) for tiles of kTile columns one after another: s is this warp's part of q k^T, row_of_warp() and
// column_of_warp() where it begins. The copies for the next tile are on their way meanwhile.
__device__ int row_of_warp() { return threadIdx.x / 64 * kHalf; }
__device__ int column_of_warp() { return threadIdx.x / 32 % 2 * kHalf; }

template <typename Use>
__device__ void for_each_tile(unsigned char* staged, const float16* q, const float16* k, int columns, int64_t tiles,
                              const Use& use) {
  int64_t to_load = 0;
  int depth_to_load = 0, stage_to_load = 0;
  const auto load = [&] {
    if (to_load < tiles) {
      unsigned char* stage = staged + stage_to_load * 2 * kTileBytes;
      copy_tile<kTile, kDepth, kThreads>(stage, q + depth_to_load, columns);
      copy_tile<kTile, kDepth, kThreads>(stage + kTileBytes, k + to_load * kTile * columns + depth_to_load, columns);
      depth_to_load += kDepth;
      if (depth_to_load == columns) depth_to_load = 0, ++to_load;
      stage_to_load = (stage_to_load + 1) % kStages;
    }
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) load();
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = 0; tile < tiles; ++tile) {
    TileSum<kHalf, kHalf> s;
    s.clear();
#pragma unroll 1
    for (int depth = 0; depth < columns; depth += kDepth) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load();
      const unsigned char* a = staged + stage * 2 * kTileBytes;
      multiply<kDepth, kDepth, kDepth, false>(s, a, row_of_warp(), a + kTileBytes, column_of_warp());
      stage = (stage + 1) % kStages;
    }
    use(tile, s);
  }
}

// A tile, as this warp's part of it, to global memory in float16, by way of the shared memory of the copies.
__device__ void store_tile(unsigned char* staged, TileSum<kHalf, kHalf>& s, float16* out, int64_t stride) {
  __syncthreads();
  s.for_each_pair([&](float first, float second, int, int r, int c) {
    const int row = row_of_warp() + r, column = column_of_warp() + c;
    const uint32_t both = pack(first, second);
    memcpy(staged + swizzled<kTile>(row, column / 8) + column % 8 * 2, &both, 4);
  });
  __syncthreads();
#pragma unroll 4
  for (int at = threadIdx.x; at < kTile * kTile / 8; at += kThreads) {
    const int row = at / (kTile / 8), part = at % (kTile / 8);
    store_16(out + row * stride + part * 8, staged + swizzled<kTile>(row, part));
  }
}

// sums[k, at] += value, 0 <= value <= 256, in the integers of the k that holds all bits of a float32: integer sums have
// no order, so they repeat. Units of 2^-42, 2^-70 and 2^-98, and a count of NaN.
__device__ void add(int64_t* sums, int64_t padded, int64_t at, float value) {
  if (value != value) {
    atomic_add(sums + 3 * padded + at, 1);
    return;
  }
  const int kind = value >= 0x1p-20f ? 0 : value >= 0x1p-48f ? 1 : 2;
  const float unit = kind == 0 ? 0x1p42f : kind == 1 ? 0x1p70f : 0x1p98f;
  const int64_t whole = static_cast<int64_t>(value * unit);
  if (whole != 0) atomic_add(sums + kind * padded + at, whole);
}

// (i, j), i >= j, of number t in the order (0, 0), (1, 0), (1, 1), (2, 0), ...
__host__ __device__ void triangle(int64_t t, int64_t& i, int64_t& j) {
  i = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(t) + 1) - 1) / 2);
  if (i * (i + 1) / 2 > t) --i;
  if ((i + 1) * (i + 2) / 2 <= t) ++i;
  j = t - i * (i + 1) / 2;
}

// Blocks go through squares of kGroup tile rows, so that a square's rows stay in the second-level cache.
__host__ __device__ void pair_of(int64_t block, int64_t& tile_i, int64_t& tile_j) {
  triangle(block / (kGroup * kGroup), tile_i, tile_j);
  tile_i = tile_i * kGroup + block % kGroup;
  tile_j = tile_j * kGroup + block / kGroup % kGroup;
}

__global__ void __launch_bounds__(kThreads, 2)
    symmetric_sums_kernel(Operand x, int columns, int64_t count, int64_t* sums, float16* kept, float scale) {
  auto& shared = *reinterpret_cast<TileShared*>(shared_memory());
  int64_t tile_i, tile_j;
  pair_of(blockIdx.x, tile_i, tile_j);
  const int64_t i = tile_i * kTile, j = tile_j * kTile;
  if (i >= count || j > i) return;
  const ImageRange images_i = image_range(x, i, kTile), images_j = image_range(x, j, kTile);
  if (one_image(images_i, images_j) && kept == nullptr) return;
  const auto* u = static_cast<const float16*>(x.u);
  for_each_tile(shared.staged, u + i * columns, u + j * columns, columns, 1, [&](int64_t, TileSum<kHalf, kHalf>& s) {
    const int row = row_of_warp(), column = column_of_warp(), lane = threadIdx.x % 32;
    if (!all_negative(images_i, images_j)) {
      shared.labels.load(x, i, x, j);
      shared.labels.keep_negatives(s, row, column);
    }
    if (i == j) {
      s.for_each_pair([&](float& first, float& second, int, int r, int c) {
        if (row + r <= column + c) first = kNone;
        if (row + r <= column + c + 1) second = kNone;
      });
    }
    float by_row[kHalf / 8] = {}, by_column[kHalf / 4] = {};
    s.for_each_pair([&](float& first, float& second, int m, int, int c) {
      first = exp2_fast(first * scale - scale);
      second = exp2_fast(second * scale - scale);
      by_row[m] += first + second;
      by_column[c / 8 * 2] += first;
      by_column[c / 8 * 2 + 1] += second;
    });
#pragma unroll
    for (int m = 0; m < kHalf / 8; ++m) {
      by_row[m] += __shfl_xor_sync(~0u, by_row[m], 1);
      by_row[m] += __shfl_xor_sync(~0u, by_row[m], 2);
      if (lane % 4 == 0) shared.by_row[0][column / kHalf][row + m * 8 + lane / 4] = by_row[m];
    }
#pragma unroll
    for (int n = 0; n < kHalf / 4; ++n) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) by_column[n] += __shfl_xor_sync(~0u, by_column[n], distance);
      if (lane < 4) shared.by_column[row / kHalf][column + n / 2 * 8 + lane * 2 + n % 2] = by_column[n];
    }
    __syncthreads();
    const int at = threadIdx.x;
    add(sums, x.padded, i + at, shared.by_row[0][0][at] + shared.by_row[0][1][at]);
    add(sums, x.padded, j + at, shared.by_column[0][at] + shared.by_column[1][at]);
    if (kept != nullptr) {
      s.for_each_pair([&](float& first, float& second, int, int, int) {
        first *= kKeptScale;
        second *= kKeptScale;
      });
      store_tile(shared.staged, s, kept + (tile_i * (tile_i + 1) / 2 + tile_j) * (kTile * kTile), kTile);
    }
  });
}

// The maximum and the sum of 2^(s - maximum) of two sets together.
__device__ void merge(float& row_max, float& total, float other_max, float other_total) {
  const float higher = fmaxf(row_max, other_max), shift = higher == kNone ? 0 : higher;
  total = total * exp2_fast(row_max - shift) + other_total * exp2_fast(other_max - shift);
  row_max = higher;
}

// A block walks with its rows over one of `splits` parts of the keys.
__global__ void __launch_bounds__(kThreads, 2)
    row_sums_kernel(Operand q, Operand k, int columns, int64_t tiles, float* state, int64_t splits, float scale) {
  auto& shared = *reinterpret_cast<TileShared*>(shared_memory());
  const int64_t row_blocks = q.padded / kTile, i = blockIdx.x % row_blocks * kTile, split = blockIdx.x / row_blocks;
  const int64_t begin = split * tiles / splits, end = (split + 1) * tiles / splits;
  const ImageRange images_i = image_range(q, i, kTile);
  const int row = row_of_warp(), column = column_of_warp(), lane = threadIdx.x % 32;
  float row_max[kHalf / 8], total[kHalf / 8];  // of the columns that this thread has seen
#pragma unroll
  for (int m = 0; m < kHalf / 8; ++m) row_max[m] = kNone, total[m] = 0;
  const auto *rows = static_cast<const float16*>(q.u), *keys = static_cast<const float16*>(k.u);
  for_each_tile(shared.staged, rows + i * columns, keys + begin * kTile * columns, columns, end - begin,
                [&](int64_t tile, TileSum<kHalf, kHalf>& s) {
                  const int64_t j = (begin + tile) * kTile;
                  const ImageRange images_j = image_range(k, j, kTile);
                  if (!all_negative(images_i, images_j)) {
                    shared.labels.load(q, i, k, j);
                    shared.labels.keep_negatives(s, row, column);
                  }
                  float highest[kHalf / 8];
#pragma unroll
                  for (float& of : highest) of = kNone;
                  s.for_each_pair([&](float& first, float& second, int m, int, int) {
                    first *= scale;
                    second *= scale;
                    highest[m] = fmaxf(highest[m], fmaxf(first, second));
                  });
#pragma unroll
                  for (int m = 0; m < kHalf / 8; ++m) merge(row_max[m], total[m], highest[m], 0);
                  s.for_each_pair([&](float first, float second, int m, int, int) {
                    const float shift = row_max[m] == kNone ? 0 : row_max[m];
                    total[m] += exp2_fast(first - shift) + exp2_fast(second - shift);
                  });
                });
#pragma unroll
  for (int m = 0; m < kHalf / 8; ++m) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other_max = __shfl_xor_sync(~0u, row_max[m], distance);
      const float other_total = __shfl_xor_sync(~0u, total[m], distance);
      // In the same order on both sides, for the same bits.
      if (lane & distance) {
        float merged = other_max, merged_total = other_total;
        merge(merged, merged_total, row_max[m], total[m]);
        row_max[m] = merged, total[m] = merged_total;
      } else {
        merge(row_max[m], total[m], other_max, other_total);
      }
    }
    if (lane % 4 == 0) {
      shared.by_row[0][column / kHalf][row + m * 8 + lane / 4] = row_max[m];
      shared.by_row[1][column / kHalf][row + m * 8 + lane / 4] = total[m];
    }
  }
  __syncthreads();
  const int at = threadIdx.x;
  float of_row = shared.by_row[0][0][at], of_sum = shared.by_row[1][0][at];
  merge(of_row, of_sum, shared.by_row[0][1][at], shared.by_row[1][1][at]);
  state[split * q.padded + i + at] = of_row;
  state[(splits + split) * q.padded + i + at] = of_sum;
}

__global__ void __launch_bounds__(kThreads, 2)
    gradient_panel_kernel(Operand q, Operand k, int columns, float16* panel, int64_t first_row, int64_t first_key,
                          int64_t row_tiles, int64_t key_tiles, float scale, bool bounded) {
  auto& shared = *reinterpret_cast<TileShared*>(shared_memory());
  // kGroup rows of tiles together, so that their keys stay in the second-level cache.
  const int64_t group = blockIdx.x / (kGroup * key_tiles), in_group = blockIdx.x % (kGroup * key_tiles);
  const int64_t height = min(static_cast<int64_t>(kGroup), row_tiles - group * kGroup);
  const int64_t tile_i = group * kGroup + in_group % height, tile_j = in_group / height;
  const int64_t i = first_row + tile_i * kTile, j = first_key + tile_j * kTile, width = key_tiles * kTile;
  float16* out = panel + tile_i * kTile * width + tile_j * kTile;
  const ImageRange images_i = image_range(q, i, kTile), images_j = image_range(k, j, kTile);
  if (one_image(images_i, images_j)) {
    TileSum<kHalf, kHalf> nothing;
    nothing.clear();
    store_tile(shared.staged, nothing, out, width);
    return;
  }
  const auto *rows = static_cast<const float16*>(q.u), *keys = static_cast<const float16*>(k.u);
  for_each_tile(shared.staged, rows + i * columns, keys + j * columns, columns, 1,
                [&](int64_t, TileSum<kHalf, kHalf>& s) {
                  if (!all_negative(images_i, images_j)) {
                    shared.labels.load(q, i, k, j);
                    shared.labels.keep_negatives(s, row_of_warp(), column_of_warp());
                  }
                  to_gradient(s, q, i + row_of_warp(), k, j + column_of_warp(), scale, bounded);
                  store_tile(shared.staged, s, out, width);
                });
}

}  // namespace

int64_t pair_blocks(int64_t padded) {
  const int64_t squares = divide_up(padded, kTile * kGroup);
  return squares * (squares + 1) / 2 * kGroup * kGroup;
}
void pair_of_block(int64_t block, int64_t& tile_i, int64_t& tile_j) { pair_of(block, tile_i, tile_j); }

static_assert(sizeof(TileShared) <= 99 << 10 && 2 * sizeof(TileShared) <= 163 << 10);  // two blocks of an A100

const char* symmetric_sums(const void* u, const int64_t* table, int64_t count, int64_t padded, int64_t columns,
                           int64_t* sums, void* kept, float scale, void* stream) {
  return launch(symmetric_sums_kernel, pair_blocks(padded), kThreads, sizeof(TileShared), stream,
                Operand{table, nullptr, u, padded}, static_cast<int>(columns), count, sums, static_cast<float16*>(kept),
                scale);
}

const char* row_sums(const void* q, const int64_t* q_table, int64_t q_padded, const void* k, const int64_t* k_table,
                     int64_t k_padded, int64_t columns, int64_t keys, float* state, int64_t splits, float scale,
                     void* stream) {
  return launch(row_sums_kernel, q_padded / kTile * splits, kThreads, sizeof(TileShared), stream,
                Operand{q_table, nullptr, q, q_padded}, Operand{k_table, nullptr, k, k_padded},
                static_cast<int>(columns), divide_up(keys, kTile), state, splits, scale);
}

const char* gradient_panel(const Operand& q, const Operand& k, int64_t columns, void* panel, int64_t first_row,
                           int64_t first_key, int64_t rows, int64_t width, float scale, bool bounded, void* stream) {
  const int64_t row_tiles = rows / kTile, key_tiles = width / kTile;
  return launch(gradient_panel_kernel, row_tiles * key_tiles, kThreads, sizeof(TileShared), stream, q, k,
                static_cast<int>(columns), static_cast<float16*>(panel), first_row, first_key, row_tiles, key_tiles,
                scale, bounded);
}

}  // namespace ser_fast::cuda
