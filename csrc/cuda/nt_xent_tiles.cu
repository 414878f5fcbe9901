// Tiles of the similarity matrix on tensor cores: float16 operands, sums in float32, one exp an entry (two where the
// temperature leaves no bound). What P, G, a and the shifts are, ser_fast/ops/tiled.py says.
//
// Operands reach shared memory by 16-byte asynchronous copies, and registers by ldmatrix; in shared memory the 16-byte
// parts of a row are permuted so that eight rows meet eight different groups of banks.

#include "cuda/nt_xent_tiles.h"

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/nt_xent_table.h"

namespace ser_fast::cuda {
namespace {

constexpr float kTop = 14;         // the largest term of a mean is about 2^14: float16 holds 2^-28 of it
constexpr float kBoundedTop = 15;  // with a bound it is below 2^15
constexpr float kNone = -INFINITY;

// ------------------------------------------------------------------------------------------------ products of tiles

// The byte at which part `part` (16 bytes) of row `row` lies in a tile with kColumns columns.
template <int kColumns>
__device__ int place(int row, int part) {
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
    copy_async(tile + place<kColumns>(row, part), rows + row * stride + part * 8);
  }
}

// What a warp holds of a sum of products: kRows x kColumns.
template <int kRows, int kColumns>
struct Sum {
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
__device__ void multiply(Sum<kM, kN>& sum, const unsigned char* a, int row, const unsigned char* b, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t left[kM / 16][4];
#pragma unroll
    for (int m = 0; m < kM / 16; ++m) {
      load_matrices(left[m], a + place<kColumnsA>(row + m * 16 + lane % 16, k / 8 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t right[4];
      if constexpr (kTransposed) {
        load_matrices_transposed(right, b + place<kColumnsB>(k + lane % 16, (column + n) / 8 + lane / 16));
      } else {
        load_matrices(right, b + place<kColumnsB>(column + n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        multiply_add(sum.of[m][n / 8], left[m], right);
        multiply_add(sum.of[m][n / 8 + 1], left[m], right + 2);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ negatives

// The rows of a tile: the range of their images, and whether all are valid.
struct Kind {
  int64_t lowest, highest;
  bool valid;
};

__device__ Kind kind_of(const Share& share, int64_t start, int rows) {
  const Table table{share.table, share.padded};
  Kind kind{table.lowest(start), table.highest(start), table.all_valid(start)};
  for (int64_t r = start + kSpan; r < start + rows; r += kSpan) {
    kind.lowest = min(kind.lowest, table.lowest(r));
    kind.highest = max(kind.highest, table.highest(r));
    kind.valid = kind.valid && table.all_valid(r);
  }
  return kind;
}

__device__ bool all_negative(const Kind& a, const Kind& b) {
  return (a.lowest > b.highest || b.lowest > a.highest) && a.valid && b.valid;
}
__device__ bool one_image(const Kind& a, const Kind& b) {
  return a.lowest == a.highest && b.lowest == b.highest && a.lowest == b.lowest;
}

// Images and valid bits of a tile's kRows rows and, behind them, of its kKeys columns, in shared memory.
template <int kRows, int kKeys>
struct Labels {
  int64_t image[kRows + kKeys];
  int valid[kRows + kKeys];

  // For all threads of the block.
  __device__ void load(const Share& q, int64_t i, const Share& k, int64_t j) {
    __syncthreads();
    for (int at = threadIdx.x; at < kRows + kKeys; at += blockDim.x) {
      const Share& share = at < kRows ? q : k;
      const int64_t r = at < kRows ? i + at : j + at - kRows;
      const Table table{share.table, share.padded};
      image[at] = table.image(r);
      valid[at] = table.valid(r);
    }
    __syncthreads();
  }

  template <int kM, int kN>
  __device__ void keep_negatives(Sum<kM, kN>& s, int row, int column) const {
    s.for_each_pair([&](float& first, float& second, int, int r, int c) {
      const int64_t mine = image[row + r];
      const int takes_part = valid[row + r], at = kRows + column + c;
      if (mine == image[at] || !(takes_part & valid[at])) first = kNone;
      if (mine == image[at + 1] || !(takes_part & valid[at + 1])) second = kNone;
    });
  }
};

// ------------------------------------------------------------------------------------------------ 128 x 128 at a time

constexpr int kDepth = 32, kStages = 4, kThreads = 128, kGroup = 8;
constexpr int kHalf = kSide / 2;  // a warp has a quarter of a tile
constexpr int kTileBytes = kSide * kDepth * 2;
constexpr int kStaged = kStages * 2 * kTileBytes;

struct SquareShared {
  unsigned char staged[kStaged];
  Labels<kSide, kSide> labels;
  float by_row[2][2][kSide], by_column[2][kSide];
};

// use(tile, s) for tiles of kSide columns one after another: s is this warp's part of q k^T, row_of_warp() and
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
      copy_tile<kSide, kDepth, kThreads>(stage, q + depth_to_load, columns);
      copy_tile<kSide, kDepth, kThreads>(stage + kTileBytes, k + to_load * kSide * columns + depth_to_load, columns);
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
    Sum<kHalf, kHalf> s;
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
__device__ void store_tile(unsigned char* staged, Sum<kHalf, kHalf>& s, float16* out, int64_t stride) {
  __syncthreads();
  s.for_each_pair([&](float first, float second, int, int r, int c) {
    const int row = row_of_warp() + r, column = column_of_warp() + c;
    const uint32_t both = pack(first, second);
    memcpy(staged + place<kSide>(row, column / 8) + column % 8 * 2, &both, 4);
  });
  __syncthreads();
#pragma unroll 4
  for (int at = threadIdx.x; at < kSide * kSide / 8; at += kThreads) {
    const int row = at / (kSide / 8), part = at % (kSide / 8);
    store_16(out + row * stride + part * 8, staged + place<kSide>(row, part));
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
    sum_pairs(Share x, int columns, int64_t count, int64_t* sums, float16* kept, float scale) {
  auto& shared = *reinterpret_cast<SquareShared*>(shared_memory());
  int64_t tile_i, tile_j;
  pair_of(blockIdx.x, tile_i, tile_j);
  const int64_t i = tile_i * kSide, j = tile_j * kSide;
  if (i >= count || j > i) return;
  const Kind kind_i = kind_of(x, i, kSide), kind_j = kind_of(x, j, kSide);
  if (one_image(kind_i, kind_j) && kept == nullptr) return;
  const auto* u = static_cast<const float16*>(x.u);
  for_each_tile(shared.staged, u + i * columns, u + j * columns, columns, 1, [&](int64_t, Sum<kHalf, kHalf>& s) {
    const int row = row_of_warp(), column = column_of_warp(), lane = threadIdx.x % 32;
    if (!all_negative(kind_i, kind_j)) {
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
        first *= kLift;
        second *= kLift;
      });
      store_tile(shared.staged, s, kept + (tile_i * (tile_i + 1) / 2 + tile_j) * (kSide * kSide), kSide);
    }
  });
}

// The maximum and the sum of 2^(s - maximum) of two sets together.
__device__ void join(float& top, float& total, float other_top, float other_total) {
  const float higher = fmaxf(top, other_top), shift = higher == kNone ? 0 : higher;
  total = total * exp2_fast(top - shift) + other_total * exp2_fast(other_top - shift);
  top = higher;
}

// A block walks with its rows over one of `splits` shares of the keys.
__global__ void __launch_bounds__(kThreads, 2)
    sum_rows(Share q, Share k, int columns, int64_t tiles, float* state, int64_t splits, float scale) {
  auto& shared = *reinterpret_cast<SquareShared*>(shared_memory());
  const int64_t strips = q.padded / kSide, i = blockIdx.x % strips * kSide, split = blockIdx.x / strips;
  const int64_t begin = split * tiles / splits, end = (split + 1) * tiles / splits;
  const Kind kind_i = kind_of(q, i, kSide);
  const int row = row_of_warp(), column = column_of_warp(), lane = threadIdx.x % 32;
  float top[kHalf / 8], total[kHalf / 8];  // of the columns that this thread has seen
#pragma unroll
  for (int m = 0; m < kHalf / 8; ++m) top[m] = kNone, total[m] = 0;
  const auto *rows = static_cast<const float16*>(q.u), *keys = static_cast<const float16*>(k.u);
  for_each_tile(shared.staged, rows + i * columns, keys + begin * kSide * columns, columns, end - begin,
                [&](int64_t tile, Sum<kHalf, kHalf>& s) {
                  const int64_t j = (begin + tile) * kSide;
                  const Kind kind_j = kind_of(k, j, kSide);
                  if (!all_negative(kind_i, kind_j)) {
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
                  for (int m = 0; m < kHalf / 8; ++m) join(top[m], total[m], highest[m], 0);
                  s.for_each_pair([&](float first, float second, int m, int, int) {
                    const float shift = top[m] == kNone ? 0 : top[m];
                    total[m] += exp2_fast(first - shift) + exp2_fast(second - shift);
                  });
                });
#pragma unroll
  for (int m = 0; m < kHalf / 8; ++m) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other_top = __shfl_xor_sync(~0u, top[m], distance);
      const float other_total = __shfl_xor_sync(~0u, total[m], distance);
      // In the same order on both sides, for the same bits.
      if (lane & distance) {
        float joined = other_top, joined_total = other_total;
        join(joined, joined_total, top[m], total[m]);
        top[m] = joined, total[m] = joined_total;
      } else {
        join(top[m], total[m], other_top, other_total);
      }
    }
    if (lane % 4 == 0) {
      shared.by_row[0][column / kHalf][row + m * 8 + lane / 4] = top[m];
      shared.by_row[1][column / kHalf][row + m * 8 + lane / 4] = total[m];
    }
  }
  __syncthreads();
  const int at = threadIdx.x;
  float of_row = shared.by_row[0][0][at], of_sum = shared.by_row[1][0][at];
  join(of_row, of_sum, shared.by_row[0][1][at], shared.by_row[1][1][at]);
  state[split * q.padded + i + at] = of_row;
  state[(splits + split) * q.padded + i + at] = of_sum;
}

// a and its shift. Where a is not asked for, it is 0, and the shift one that 2^(s - shift) is finite with.
struct Weight {
  float a, shift;
};
__device__ Weight weight_of(const Share& share, int64_t at, float scale) {
  if (share.coefficients == nullptr) return {0, scale};
  return {share.coefficients[at], share.coefficients[share.padded + at]};
}

// G in place of the products of rows from i on with keys from j on. Without a bound the shifts are the rows' own.
template <int kM, int kN>
__device__ void weigh(Sum<kM, kN>& s, const Share& q, int64_t i, const Share& k, int64_t j, float scale, bool bounded) {
  if (bounded) {
    s.for_each_pair([&](float& first, float& second, int, int r, int c) {
      const float a = weight_of(q, i + r, scale).a;
      first = exp2_fast(first * scale - scale) * (a + weight_of(k, j + c, scale).a);
      second = exp2_fast(second * scale - scale) * (a + weight_of(k, j + c + 1, scale).a);
    });
  } else {
    s.for_each_pair([&](float& first, float& second, int, int r, int c) {
      const Weight row = weight_of(q, i + r, scale);
      const Weight left = weight_of(k, j + c, scale), right = weight_of(k, j + c + 1, scale);
      first *= scale;
      second *= scale;
      first = exp2_fast(first - row.shift) * row.a + exp2_fast(first - left.shift) * left.a;
      second = exp2_fast(second - row.shift) * row.a + exp2_fast(second - right.shift) * right.a;
    });
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    fill_panel(Share q, Share k, int columns, float16* panel, int64_t first_row, int64_t first_key, int64_t row_tiles,
               int64_t key_tiles, float scale, bool bounded) {
  auto& shared = *reinterpret_cast<SquareShared*>(shared_memory());
  // kGroup rows of tiles together, so that their keys stay in the second-level cache.
  const int64_t group = blockIdx.x / (kGroup * key_tiles), in_group = blockIdx.x % (kGroup * key_tiles);
  const int64_t height = min(static_cast<int64_t>(kGroup), row_tiles - group * kGroup);
  const int64_t tile_i = group * kGroup + in_group % height, tile_j = in_group / height;
  const int64_t i = first_row + tile_i * kSide, j = first_key + tile_j * kSide, width = key_tiles * kSide;
  float16* out = panel + tile_i * kSide * width + tile_j * kSide;
  const Kind kind_i = kind_of(q, i, kSide), kind_j = kind_of(k, j, kSide);
  if (one_image(kind_i, kind_j)) {
    Sum<kHalf, kHalf> nothing;
    nothing.clear();
    store_tile(shared.staged, nothing, out, width);
    return;
  }
  const auto *rows = static_cast<const float16*>(q.u), *keys = static_cast<const float16*>(k.u);
  for_each_tile(shared.staged, rows + i * columns, keys + j * columns, columns, 1, [&](int64_t, Sum<kHalf, kHalf>& s) {
    if (!all_negative(kind_i, kind_j)) {
      shared.labels.load(q, i, k, j);
      shared.labels.keep_negatives(s, row_of_warp(), column_of_warp());
    }
    weigh(s, q, i + row_of_warp(), k, j + column_of_warp(), scale, bounded);
    store_tile(shared.staged, s, out, width);
  });
}

// ------------------------------------------------------------------------------------------------ strips of rows

// A block keeps kRows rows, and what it accumulates for them, and walks over keys, kKeys at a time. Its warps share the
// similarities as kRows / kM x kKeys / kN, and the result as kRows / kOutM x kColumns / kOutN.
template <int columns, int rows, int keys, int warps, int m, int n, int out_m, int out_n>
struct Strip {
  static constexpr int kColumns = columns, kRows = rows, kKeys = keys, kThreads = 32 * warps;
  static constexpr int kM = m, kN = n, kOutM = out_m, kOutN = out_n;
  static_assert(rows / m * (keys / n) == warps && rows / out_m * (columns / out_n) == warps);

  struct Shared {
    unsigned char q[rows * columns * 2], k[2][keys * columns * 2], weights[rows * keys * 2];
    Labels<rows, keys> labels;
    float top[2][rows], by_part[keys / n][rows];
  };
};

// Rows of the warps' parts of the similarities that a thread holds, one after another: m * 8 + lane / 4.
template <typename S, bool kDetached>
__global__ void __launch_bounds__(S::kThreads)
    accumulate(Share q, Share k, int64_t tiles, float* state, float* out, int64_t splits, float scale, bool bounded) {
  constexpr int kColumns = S::kColumns, kRows = S::kRows, kKeys = S::kKeys;
  auto& shared = *reinterpret_cast<typename S::Shared*>(shared_memory());
  const int64_t strips = q.padded / kRows, i = blockIdx.x % strips * kRows, split = blockIdx.x / strips;
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
  const Kind kind_i = kind_of(q, i, kRows);
  const float first_top = bounded ? scale - kBoundedTop : kNone;
  for (int r = threadIdx.x; r < kRows; r += S::kThreads) shared.top[begin % 2][r] = first_top;
  float total[S::kM / 8] = {};
  Sum<S::kOutM, S::kOutN> result;
  result.clear();

#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < end) load(tile + 1);
    const unsigned char* key_tile = shared.k[tile % 2];
    const int64_t j = tile * kKeys;
    const Kind kind_j = kind_of(k, j, kKeys);
    Sum<S::kM, S::kN> s;
    s.clear();
    multiply<kColumns, kColumns, kColumns, false>(s, shared.q, row, key_tile, column);
    if (!all_negative(kind_i, kind_j)) {
      shared.labels.load(q, i, k, j);
      shared.labels.keep_negatives(s, row, column);
    }
    if constexpr (kDetached) {
      const float* top = shared.top[tile % 2];
      float* next_top = shared.top[(tile + 1) % 2];
      if (!bounded) {
        float highest[S::kM / 8];
#pragma unroll
        for (float& of : highest) of = kNone;
        s.for_each_pair([&](float first, float second, int m, int, int) {
          highest[m] = fmaxf(highest[m], fmaxf(first, second));
        });
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
          next_top[r] = fmaxf(top[r], of_row * scale - kTop);
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < S::kM / 8; ++m) {
          const int r = row + m * 8 + lane / 4;
          total[m] *= exp2_fast(top[r] - (next_top[r] == kNone ? 0 : next_top[r]));
        }
        result.for_each_pair([&](float& first, float& second, int, int r, int) {
          const float now = next_top[out_row + r];
          const float shrink = exp2_fast(top[out_row + r] - (now == kNone ? 0 : now));
          first *= shrink;
          second *= shrink;
        });
      }
      s.for_each_pair([&](float& first, float& second, int m, int r, int) {
        const float of_row = bounded ? first_top : next_top[row + r], shift = of_row == kNone ? 0 : of_row;
        first = exp2_fast(first * scale - shift);
        second = exp2_fast(second * scale - shift);
        total[m] += first + second;
      });
    } else {
      weigh(s, q, i + row, k, j + column, scale, bounded);
    }
    s.for_each_pair([&](float first, float second, int, int r, int c) {
      const uint32_t both = pack(first, second);
      memcpy(shared.weights + place<kKeys>(row + r, (column + c) / 8) + c % 8 * 2, &both, 4);
    });
    __syncthreads();
    multiply<kKeys, kKeys, kColumns, true>(result, shared.weights, out_row, key_tile, out_column);
  }

  float* strip = out + (split * q.padded + i) * kColumns;
  result.for_each_pair([&](float first, float second, int, int r, int c) {
    float* to = strip + (out_row + r) * kColumns + out_column + c;
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
      state[split * q.padded + i + r] = bounded ? first_top : shared.top[end % 2][r];
      state[(splits + split) * q.padded + i + r] = of_row;
    }
  }
}

using Strip64 = Strip<64, 128, 64, 4, 64, 32, 32, 64>;
using Strip128 = Strip<128, 128, 64, 4, 64, 32, 64, 64>;
using Strip256 = Strip<256, 128, 64, 8, 32, 32, 64, 64>;
using Strip512 = Strip<512, 64, 64, 8, 32, 16, 64, 64>;
using SmallStrip512 = Strip<512, 64, 32, 8, 16, 16, 64, 64>;

// What a block may have: 99 KB on every chip from sm_80 on, 163 on an A100, 227 on an H100. ops/cuda.py knows.
static_assert(sizeof(SquareShared) <= 99 << 10 && 2 * sizeof(SquareShared) <= 163 << 10);
static_assert(sizeof(Strip64::Shared) <= 99 << 10 && sizeof(Strip128::Shared) <= 99 << 10);
static_assert(sizeof(Strip256::Shared) <= 150 << 10 && sizeof(SmallStrip512::Shared) <= 150 << 10);
static_assert(sizeof(Strip512::Shared) <= 204 << 10);

// ------------------------------------------------------------------------------------------------ launches

int64_t up(int64_t size, int64_t block) { return (size + block - 1) / block; }

template <typename S, bool kDetached>
const char* launch_strips(const Share& q, const Share& k, int64_t keys, float* state, float* out, int64_t splits,
                          float scale, bool bounded, void* stream) {
  return launch(accumulate<S, kDetached>, q.padded / S::kRows * splits, S::kThreads, sizeof(typename S::Shared), stream,
                q, k, up(keys, S::kKeys), state, out, splits, scale, bounded);
}

}  // namespace

int64_t pair_blocks(int64_t padded) {
  const int64_t squares = up(padded, kSide * kGroup);
  return squares * (squares + 1) / 2 * kGroup * kGroup;
}
void pair_of_block(int64_t block, int64_t& tile_i, int64_t& tile_j) { pair_of(block, tile_i, tile_j); }

const char* symmetric_sums(const void* u, const int64_t* table, int64_t count, int64_t padded, int64_t columns,
                           int64_t* sums, void* kept, float scale, void* stream) {
  return launch(sum_pairs, pair_blocks(padded), kThreads, sizeof(SquareShared), stream,
                Share{table, nullptr, u, padded}, static_cast<int>(columns), count, sums, static_cast<float16*>(kept),
                scale);
}

const char* row_sums(const void* q, const int64_t* q_table, int64_t q_padded, const void* k, const int64_t* k_table,
                     int64_t k_padded, int64_t columns, int64_t keys, float* state, int64_t splits, float scale,
                     void* stream) {
  return launch(sum_rows, q_padded / kSide * splits, kThreads, sizeof(SquareShared), stream,
                Share{q_table, nullptr, q, q_padded}, Share{k_table, nullptr, k, k_padded}, static_cast<int>(columns),
                up(keys, kSide), state, splits, scale);
}

const char* owner(Share q, Share k, int64_t columns, int64_t keys, float* out, int64_t splits, float scale,
                  bool bounded, void* stream) {
  const auto run = columns == 64    ? launch_strips<Strip64, false>
                   : columns == 128 ? launch_strips<Strip128, false>
                   : columns == 256 ? launch_strips<Strip256, false>
                                    : nullptr;
  if (run == nullptr) return "an owner of rows takes 64, 128 or 256 columns";
  return run(q, k, keys, nullptr, out, splits, scale, bounded, stream);
}

const char* panel(Share q, Share k, int64_t columns, void* panel, int64_t first_row, int64_t first_key, int64_t rows,
                  int64_t width, float scale, bool bounded, void* stream) {
  const int64_t row_tiles = rows / kSide, key_tiles = width / kSide;
  return launch(fill_panel, row_tiles * key_tiles, kThreads, sizeof(SquareShared), stream, q, k,
                static_cast<int>(columns), static_cast<float16*>(panel), first_row, first_key, row_tiles, key_tiles,
                scale, bounded);
}

const char* detached(Share q, Share k, int64_t columns, int64_t keys, float* state, float* out, int64_t splits,
                     float scale, bool bounded, void* stream) {
  int limit;
  if (const cudaError_t error = shared_limit(limit); error != cudaSuccess) return words_of(error);
  const bool ample = limit >= static_cast<int>(sizeof(Strip512::Shared));
  const auto run = columns == 64    ? launch_strips<Strip64, true>
                   : columns == 128 ? launch_strips<Strip128, true>
                   : columns == 256 ? launch_strips<Strip256, true>
                   : columns == 512 ? (ample ? launch_strips<Strip512, true> : launch_strips<SmallStrip512, true>)
                                    : nullptr;
  if (run == nullptr) return "detached keys take 64, 128, 256 or 512 columns";
  return run(q, k, keys, state, out, splits, scale, bounded, stream);
}

}  // namespace ser_fast::cuda
