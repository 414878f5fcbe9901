// Panels are read and written 16 bytes at a time, once each.

#include "cuda/nt_xent_panels.h"

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/nt_xent_operands.h"
#include "cuda/warp.h"

namespace ser_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Gradient weights a, and their shifts.
template <typename Real>
struct Weights {
  const Real* at;
  int64_t padded;

  __device__ Real a(int64_t r) const { return at == nullptr ? Real{0} : at[r]; }
  __device__ Real shift(int64_t r) const { return at == nullptr ? Real{0} : at[padded + r]; }
};

template <typename Real>
__device__ Real finite_or_0(Real row_max) {  // no negative so far
  return row_max == -INFINITY ? Real{0} : row_max;
}

// A warp a row; each lane has a maximum and a sum of its own, and the first one begins with those of `state`.
template <typename Real>
__global__ void __launch_bounds__(kThreads) panel_row_sums_kernel(Panel panel, Table q, Table k, Real* state) {
  constexpr int N = kChunk<Real>;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, r = panel.first_row + row;
  if (!q.valid(r)) return;
  const int64_t image = q.image(r);
  const Real* from = static_cast<const Real*>(panel.at) + row * panel.width;
  Real row_max = lane == 0 ? state[r] : static_cast<Real>(-INFINITY), total = lane == 0 ? state[q.padded + r] : Real{0};
  for (int64_t c = lane * N; c < panel.width; c += 32 * N) {
    const int64_t key = panel.first_key + c;
    const bool alike = k.lowest(key) <= image && image <= k.highest(key), holes = !k.all_valid(key);
    Real s[N], higher = row_max, sum = 0;
    load(s, from + c, N, true);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((alike && k.image(key + i) == image) || (holes && !k.valid(key + i))) s[i] = -INFINITY;
      higher = fmax(higher, s[i]);
    }
    const Real shift = finite_or_0(higher);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp2(s[i] - shift);
    total = total * exp2(row_max - shift) + sum;
    row_max = higher;
  }
  const Real highest = warp_max(row_max);
  total = warp_sum(total * exp2(row_max - finite_or_0(highest)));
  if (lane == 0) {
    state[r] = highest;
    state[q.padded + r] = total;
  }
}

// The first row and the first key of the tile that is this block's.
struct Corner {
  int64_t i, j;

  __device__ explicit Corner(const Panel& panel)
      : i(panel.first_row + blockIdx.x / (panel.width / kTile) * kTile),
        j(panel.first_key + blockIdx.x % (panel.width / kTile) * kTile) {}

  // Whether all rows and all keys of the tile are of one image.
  __device__ bool one_image(const Table& q, const Table& k) const {
    const int64_t image = q.lowest(i);
    bool one = true;
    for (int span = 0; span < kTile; span += kSpan) {
      one = one && q.lowest(i + span) == image && q.highest(i + span) == image && k.lowest(j + span) == image &&
            k.highest(j + span) == image;
    }
    return one;
  }
  template <typename T>
  __device__ T* at(const Panel& panel, int row, int key) const {
    return static_cast<T*>(panel.at) + (i - panel.first_row + row) * panel.width + j - panel.first_key + key;
  }
};

template <typename Real>
__global__ void __launch_bounds__(kThreads)
    gradient_panel_from_library_kernel(Panel panel, Table q, Table k, Weights<Real> q_weights,
                                       Weights<Real> k_weights) {
  constexpr int N = kChunk<Real>, kLanes = kTile / N;
  const Corner corner(panel);
  const bool one_image = corner.one_image(q, k);
  const int key = threadIdx.x % kLanes * N;  // the first of this thread's, the same in each row
  int64_t image[N];
  bool valid[N];
  Real a[N], shift[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t j = corner.j + key + n;
    image[n] = k.image(j);
    valid[n] = k.valid(j);
    a[n] = k_weights.a(j);
    shift[n] = k_weights.shift(j);
  }
  for (int row = threadIdx.x / kLanes; row < kTile; row += kThreads / kLanes) {
    const int64_t i = corner.i + row;
    Real* at = corner.at<Real>(panel, row, key);
    Real g[N] = {};
    if (!one_image && q.valid(i)) {
      const int64_t of = q.image(i);
      const Real a_i = q_weights.a(i), shift_i = q_weights.shift(i);
      Real s[N];
      load(s, at, N, true);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (!valid[n] || image[n] == of) continue;
        if (q_weights.at != nullptr) g[n] += exp2(s[n] - shift_i) * a_i;
        if (k_weights.at != nullptr) g[n] += exp2(s[n] - shift[n]) * a[n];
      }
    }
    store(at, g, N, true);
  }
}

// Tiles above the diagonal are the mirror images of those that were kept; they are turned in shared memory.
__global__ void __launch_bounds__(kThreads)
    gradient_panel_from_kept_kernel(Panel panel, const float16* kept, Table q, Table k, Weights<float> q_weights,
                                    Weights<float> k_weights) {
  constexpr int N = kChunk<float16>, kLanes = kTile / N;
  constexpr int kStride = kTile + 1;  // columns of a turned tile meet different banks
  __shared__ float16 turned[kTile * kStride];
  const Corner corner(panel);
  const int64_t row_tile = corner.i / kTile, key_tile = corner.j / kTile;
  const int64_t below = max(row_tile, key_tile), beside = min(row_tile, key_tile);
  const float16* tile = kept + (below * (below + 1) / 2 + beside) * (kTile * kTile);
  const bool one_image = corner.one_image(q, k), turn = row_tile <= key_tile && !one_image;
  const int key = threadIdx.x % kLanes * N;
  if (turn) {
    for (int row = threadIdx.x / kLanes; row < kTile; row += kThreads / kLanes) {
      float p[N];
      load(p, tile + row * kTile + key, N, true);
#pragma unroll
      for (int n = 0; n < N; ++n) narrow(turned[row * kStride + key + n], p[n]);
    }
    __syncthreads();
  }
  float a[N];
#pragma unroll
  for (int n = 0; n < N; ++n) a[n] = k_weights.a(corner.j + key + n);
  for (int row = threadIdx.x / kLanes; row < kTile; row += kThreads / kLanes) {
    float g[N] = {};
    if (!one_image) {
      if (turn) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const bool mirrored = row_tile < key_tile || row < key + n;
          g[n] = widen(turned[mirrored ? (key + n) * kStride + row : row * kStride + key + n]);
        }
      } else {
        load(g, tile + row * kTile + key, N, true);
      }
      const float a_i = q_weights.a(corner.i + row);
#pragma unroll
      for (int n = 0; n < N; ++n) g[n] *= 1 / kKeptScale * (a_i + a[n]);
    }
    store(corner.at<float16>(panel, row, key), g, N, true);
  }
}

Table table_of(const PanelOperand& side) { return {side.table, side.padded}; }

template <typename Real>
Weights<Real> weights_of(const PanelOperand& side) {
  return {static_cast<const Real*>(side.weights), side.padded};
}

template <typename Real>
const char* from_library(const Panel& panel, const PanelOperand& q, const PanelOperand& k, void* stream) {
  return launch(gradient_panel_from_library_kernel<Real>, panel.rows / kTile * (panel.width / kTile), kThreads, 0,
                stream, panel, table_of(q), table_of(k), weights_of<Real>(q), weights_of<Real>(k));
}

}  // namespace

const char* panel_row_sums(const Panel& panel, Type type, const PanelOperand& q, const PanelOperand& k, void* state,
                           void* stream) {
  const auto run = [&](auto kernel, auto* sums) {
    return launch(kernel, panel.rows / kWarps, kThreads, 0, stream, panel, table_of(q), table_of(k), sums);
  };
  return type == Type::float64 ? run(panel_row_sums_kernel<double>, static_cast<double*>(state))
                               : run(panel_row_sums_kernel<float>, static_cast<float*>(state));
}

const char* gradient_panel_from_library(const Panel& panel, Type type, const PanelOperand& q, const PanelOperand& k,
                                        void* stream) {
  return type == Type::float64 ? from_library<double>(panel, q, k, stream) : from_library<float>(panel, q, k, stream);
}

const char* gradient_panel_from_kept(const Panel& panel, const void* kept, const PanelOperand& q, const PanelOperand& k,
                                     void* stream) {
  return launch(gradient_panel_from_kept_kernel, panel.rows / kTile * (panel.width / kTile), kThreads, 0, stream, panel,
                static_cast<const float16*>(kept), table_of(q), table_of(k), weights_of<float>(q),
                weights_of<float>(k));
}

}  // namespace ser_fast::cuda
