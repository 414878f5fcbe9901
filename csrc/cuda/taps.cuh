// The taps of the group action: which tokens an output position takes, with what weights, and the transpose of that.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/resampling.h"
#include "cuda/device.h"
#include "cuda/group_action.h"

namespace ser_fast::cuda {

constexpr int kThreads = 192, kWarps = kThreads / 32;  // of a block
constexpr double kFar = 1e6;                           // farther out nothing changes, and an int holds it

template <typename T>
using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The argument of the kernel.
template <typename Real>
struct Action {
  const void* x;
  const double *linear, *offset;
  void* out;
  int64_t channels;
  int size_in[2], size_out[2];
  Interpolation interpolation;  // bicubic with antialias is torch's a = -0.5
  Padding padding;
  bool antialias;
  Real inner[4], outer[4];  // Cubics
  double radius;
  Geometry geometry;
};

template <typename Real>
struct Tap {
  int index;
  Real weight;
};

constexpr int kBlend = -1, kNothing = -2;

// A sparse matrix by rows, in shared memory: row r has the taps [begin(r), end(r)). The members are places in bytes.
template <typename Real>
struct SparseRows {
  int taps_at, begin_at, end_at;

  __device__ Tap<Real>* taps() const { return reinterpret_cast<Tap<Real>*>(shared_memory() + taps_at); }
  __device__ int& begin(int r) const { return reinterpret_cast<int*>(shared_memory() + begin_at)[r]; }
  __device__ int& end(int r) const { return reinterpret_cast<int*>(shared_memory() + end_at)[r]; }
  __device__ int count(int r) const { return end(r) - begin(r); }
  // The column of row r if it has one tap, of weight 1.
  __device__ int source(int r) const {
    const int n = count(r);
    if (n == 0) return kNothing;
    const Tap<Real> tap = taps()[begin(r)];
    return n == 1 && tap.weight == 1 ? tap.index : kBlend;
  }
};

template <typename Real>
__device__ Real polynomial(const Real* c, Real t) {
  return c[0] + t * (c[1] + t * (c[2] + t * c[3]));
}

// The rows of weights on one axis, as ser_fast::Axis has them: positions in double, distances to them in Real.
template <typename Real>
struct Axis {
  double reach;  // the farthest centre with a weight
  Real squeeze;  // 1 / stretch of the kernel
  bool exact;    // the map carries centres onto centres, and every kernel copies there
  bool cut, one, plain;
  int taps, most, size;  // to look at, and that a position may have; tokens

  __device__ void set(const Action<Real>& a, double step, bool centres, int tokens) {
    const bool area = a.interpolation == Interpolation::area, nearest = a.interpolation == Interpolation::nearest;
    step = fmin(step, static_cast<double>(kMostStretch) * tokens);
    const double stretch = a.antialias ? fmax(1.0, step) : 1.0;
    exact = centres;
    size = tokens;
    squeeze = static_cast<Real>(1 / stretch);
    reach = fmin(area ? (step + 1) / 2 - kTolerance : a.radius * stretch, kFar);
    cut = a.padding == Padding::border && (area || a.antialias);
    one = nearest && stretch == 1;
    plain = stretch == 1 && !cut && !area && !nearest && a.interpolation != Interpolation::lanczos3;
    taps = one ? 1 : plain ? 4 : static_cast<int>(2 * reach) + 1;
    most = min(plain && a.interpolation == Interpolation::bilinear ? 2 : taps, size);
  }

  // No position has a tap.
  __device__ void take_nothing() {
    one = exact = false;
    taps = 0;
  }

  // Writes the taps of a position, each of another token, and returns their number.
  __device__ int at(const Action<Real>& a, double position, Tap<Real>* to) const {
    if (a.padding == Padding::reflection) {
      position = fmin(fmax(position, -kFarthest), kFarthest);
      position -= floor(position / (2.0 * size)) * (2.0 * size);
    } else if (cut) {
      // On the far edge "nearest" would want the token past it, and be left with none.
      position = fmin(fmax(position, 0.0), a.interpolation == Interpolation::nearest ? size - 2 * kTolerance : size);
    } else {
      position = fmin(fmax(position, -kFar), kFar);
    }
    const bool copied = one || (exact && position - floor(position) == 0.5);
    const double lowest = copied ? position + kTolerance : plain ? position - 1.5 : position - reach + 0.5;
    const int first = static_cast<int>(floor(lowest)), looked_at = copied ? 1 : taps;
    const Real distance = static_cast<Real>(first + 0.5 - position);
    const int begin = cut ? max(0, -first) : 0, end = cut ? min(looked_at, size - first) : looked_at;
    Real total = 1;
    if (!copied) {
      total = 0;
#pragma unroll 1
      for (int t = begin; t < end; ++t) total += kernel(a, distance + t);
    }
    int count = 0;
#pragma unroll 1
    for (int t = begin; t < end; ++t) {
      const Real weight = copied ? 1 : kernel(a, distance + t) / total;
      const int tap = first + t;
      if (weight == 0 || (a.padding == Padding::zeros && (tap < 0 || tap >= size))) continue;
      int index = min(max(tap, 0), size - 1), seen = max(count - 1, 0);
      if (a.padding == Padding::reflection) {
        const int around = (tap % (2 * size) + 2 * size) % (2 * size);
        index = min(around, 2 * size - 1 - around);
        seen = 0;
      }
      while (seen < count && to[seen].index != index) ++seen;
      if (seen < count) {
        to[seen].weight += weight;
      } else {
        to[count++] = {index, weight};
      }
    }
    return count;
  }

  __device__ Real kernel(const Action<Real>& a, Real distance) const {
    if (a.interpolation == Interpolation::area) return fabs(distance) < static_cast<Real>(reach);
    Real t = distance * squeeze;
    if (a.interpolation == Interpolation::nearest) {
      return t > static_cast<Real>(-0.5 + kTolerance) && t <= static_cast<Real>(0.5 + kTolerance);
    }
    t = fabs(t);
    if (a.interpolation == Interpolation::lanczos3) {
      constexpr Real pi = static_cast<Real>(3.14159265358979323846);
      if (t == 0) return 1;
      return t < 3 ? 3 * sine_pi(t) * sine_pi(t / 3) / (pi * pi * t * t) : 0;
    }
    return t < 1 ? polynomial(a.inner, t) : t < 2 ? polynomial(a.outer, t) : 0;
  }
};

// The transpose of rows, whose e-th tap of count(r) is tap(r, e): each column's taps in the order of the rows.
//
// Every warp has a stretch of the rows and a cursor for each column. It takes the rows one by one, and a row's taps at
// once: they are of different columns. Columns below 0 or past the last are left out.
template <typename Real, typename Count, typename Get>
__device__ void transpose(const SparseRows<Real>& to, int columns, int rows, uint16_t* cursors, const Count& count,
                          const Get& tap) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint16_t* cursor = cursors + warp * columns;
  for (int c = threadIdx.x; c < columns * kWarps; c += kThreads) cursors[c] = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool count_only = pass == 0;
    __syncthreads();
#pragma unroll 1
    for (int r = rows * warp / kWarps; r < rows * (warp + 1) / kWarps; ++r) {
      for (int e = lane; e < count(r); e += 32) {
        const Tap<Real> found = tap(r, e);
        if (found.index < 0 || found.index >= columns) continue;
        const int at = cursor[found.index]++;
        if (!count_only) to.taps()[at] = {r, found.weight};
      }
      __syncwarp();
    }
    __syncthreads();
    if (!count_only || warp > 0) continue;
    // From how many taps of a column each warp has to where each warp's taps of a column begin.
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < columns; first += 32) {
      const int c = first + lane;
      int own = 0;
      for (int w = 0; w < kWarps && c < columns; ++w) own += cursors[w * columns + c];
      int sum = own;  // over the lanes up to this one
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
      }
      int at = before + sum - own;
      if (c < columns) {
        to.begin(c) = at;
        to.end(c) = at + own;
        for (int w = 0; w < kWarps; ++w) {
          const int taps = cursors[w * columns + c];
          cursors[w * columns + c] = static_cast<uint16_t>(at);
          at += taps;
        }
      }
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
}

}  // namespace ser_fast::cuda
