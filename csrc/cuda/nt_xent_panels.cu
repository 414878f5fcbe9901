// Panels are read and written 16 bytes at a time, once each.

#include "cuda/nt_xent_panels.h"

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/nt_xent_table.h"
#include "cuda/warp.h"

namespace ser_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// a and its shift.
template <typename Real>
struct Weights {
  const Real* at;
  int64_t padded;

  __device__ Real a(int64_t r) const { return at == nullptr ? Real{0} : at[r]; }
  __device__ Real shift(int64_t r) const { return at == nullptr ? Real{0} : at[padded + r]; }
};

template <typename Real>
__device__ Real finite_or_0(Real top) {  // no negative so far
  return top == -INFINITY ? Real{0} : top;
}

// A warp a row; each lane has a maximum and a sum of its own, and the first one begins with those of `state`.
template <typename Real>
__global__ void __launch_bounds__(kThreads) add_rows(Panel panel, Table q, Table k, Real* state) {
  constexpr int N = kChunk<Real>;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, r = panel.first_row + row;
  if (!q.valid(r)) return;
  const int64_t image = q.image(r);
  const Real* from = static_cast<const Real*>(panel.at) + row * panel.width;
  Real top = lane == 0 ? state[r] : static_cast<Real>(-INFINITY), total = lane == 0 ? state[q.padded + r] : Real{0};
  for (int64_t c = lane * N; c < panel.width; c += 32 * N) {
    const int64_t key = panel.first_key + c;
    const bool alike = k.lowest(key) <= image && image <= k.highest(key), holes = !k.all_valid(key);
    Real s[N], higher = top, sum = 0;
    load(s, from + c, N, true);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((alike && k.image(key + i) == image) || (holes && !k.valid(key + i))) s[i] = -INFINITY;
      higher = fmax(higher, s[i]);
    }
    const Real shift = finite_or_0(higher);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp2(s[i] - shift);
    total = total * exp2(top - shift) + sum;
    top = higher;
  }
  const Real highest = warp_max(top);
  total = warp_sum(total * exp2(top - finite_or_0(highest)));
  if (lane == 0) {
    state[r] = highest;
    state[q.padded + r] = total;
  }
}

// The first row and the first key of the tile that is this block's.
struct Corner {
  int64_t i, j;

  __device__ explicit Corner(const Panel& panel)
      : i(panel.first_row + blockIdx.x / (panel.width / kSide) * kSide),
        j(panel.first_key + blockIdx.x % (panel.width / kSide) * kSide) {}

  // Whether all rows and all keys of the tile are of one image.
  __device__ bool one_image(const Table& q, const Table& k) const {
    const int64_t image = q.lowest(i);
    bool one = true;
    for (int span = 0; span < kSide; span += kSpan) {
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
    weigh_similarities(Panel panel, Table q, Table k, Weights<Real> q_weights, Weights<Real> k_weights) {
  constexpr int N = kChunk<Real>, kLanes = kSide / N;
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
  for (int row = threadIdx.x / kLanes; row < kSide; row += kThreads / kLanes) {
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
    weigh_kept_similarities(Panel panel, const float16* kept, Table q, Table k, Weights<float> q_weights,
                            Weights<float> k_weights) {
  constexpr int N = kChunk<float16>, kLanes = kSide / N;
  constexpr int kStride = kSide + 1;  // columns of a turned tile meet different banks
  __shared__ float16 turned[kSide * kStride];
  const Corner corner(panel);
  const int64_t row_tile = corner.i / kSide, key_tile = corner.j / kSide;
  const int64_t below = max(row_tile, key_tile), beside = min(row_tile, key_tile);
  const float16* tile = kept + (below * (below + 1) / 2 + beside) * (kSide * kSide);
  const bool one_image = corner.one_image(q, k), turn = row_tile <= key_tile && !one_image;
  const int key = threadIdx.x % kLanes * N;
  if (turn) {
    for (int row = threadIdx.x / kLanes; row < kSide; row += kThreads / kLanes) {
      float p[N];
      load(p, tile + row * kSide + key, N, true);
#pragma unroll
      for (int n = 0; n < N; ++n) narrow(turned[row * kStride + key + n], p[n]);
    }
    __syncthreads();
  }
  float a[N];
#pragma unroll
  for (int n = 0; n < N; ++n) a[n] = k_weights.a(corner.j + key + n);
  for (int row = threadIdx.x / kLanes; row < kSide; row += kThreads / kLanes) {
    float g[N] = {};
    if (!one_image) {
      if (turn) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const bool mirrored = row_tile < key_tile || row < key + n;
          g[n] = widen(turned[mirrored ? (key + n) * kStride + row : row * kStride + key + n]);
        }
      } else {
        load(g, tile + row * kSide + key, N, true);
      }
      const float a_i = q_weights.a(corner.i + row);
#pragma unroll
      for (int n = 0; n < N; ++n) g[n] *= 1 / kLift * (a_i + a[n]);
    }
    store(corner.at<float16>(panel, row, key), g, N, true);
  }
}

Table table_of(const PanelSide& side) { return {side.table, side.padded}; }

template <typename Real>
Weights<Real> weights_of(const PanelSide& side) {
  return {static_cast<const Real*>(side.coefficients), side.padded};
}

template <typename Real>
const char* weigh(const Panel& panel, const PanelSide& q, const PanelSide& k, void* stream) {
  return launch(weigh_similarities<Real>, panel.rows / kSide * (panel.width / kSide), kThreads, 0, stream, panel,
                table_of(q), table_of(k), weights_of<Real>(q), weights_of<Real>(k));
}

}  // namespace

const char* panel_row_sums(const Panel& panel, Type type, const PanelSide& q, const PanelSide& k, void* state,
                           void* stream) {
  const auto run = [&](auto kernel, auto* sums) {
    return launch(kernel, panel.rows / kWarps, kThreads, 0, stream, panel, table_of(q), table_of(k), sums);
  };
  return type == Type::float64 ? run(add_rows<double>, static_cast<double*>(state))
                               : run(add_rows<float>, static_cast<float*>(state));
}

const char* weigh_panel(const Panel& panel, Type type, const PanelSide& q, const PanelSide& k, void* stream) {
  return type == Type::float64 ? weigh<double>(panel, q, k, stream) : weigh<float>(panel, q, k, stream);
}

const char* weigh_kept(const Panel& panel, const void* kept, const PanelSide& q, const PanelSide& k, void* stream) {
  return launch(weigh_kept_similarities, panel.rows / kSide * (panel.width / kSide), kThreads, 0, stream, panel,
                static_cast<const float16*>(kept), table_of(q), table_of(k), weights_of<float>(q),
                weights_of<float>(k));
}

}  // namespace ser_fast::cuda
