// What a block of the group action does with its sample, and where in shared memory it keeps the taps and the sums.
#pragma once

#include "cuda/taps.cuh"

namespace ser_fast::cuda {

__host__ __device__ constexpr int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of a matrix with so many rows, and taps in all.
template <typename Real>
__host__ __device__ int64_t bytes_for_rows(int64_t rows, int64_t taps) {
  return padded(taps * static_cast<int64_t>(sizeof(Tap<Real>))) + 2 * padded(rows * static_cast<int64_t>(sizeof(int)));
}

__host__ __device__ inline int64_t bytes_for_cursors(int64_t columns) {
  return padded(kWarps * columns * static_cast<int64_t>(sizeof(uint16_t)));
}

// Bytes of a map along the axes: with most[i] taps of each of the rows[i] positions on axis i of size[i] tokens, and
// `between` sums after the first axis.
template <typename Real>
__host__ __device__ int64_t bytes_for_separable(const int* rows, const int* size, const int* most, int64_t between,
                                                bool transpose) {
  int64_t bytes = padded(between * static_cast<int64_t>(sizeof(Real)));
  int longest = 0;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t taps = int64_t{rows[axis]} * most[axis];
    bytes += bytes_for_rows<Real>(rows[axis], taps) + (transpose ? bytes_for_rows<Real>(size[axis], taps) : 0);
    longest = size[axis] > longest ? size[axis] : longest;
  }
  return bytes + (transpose ? bytes_for_cursors(longest) : 0);
}

// Bytes of a general map for `chunk` of all `outputs` at a time; the transpose writes a tile of tokens, and keeps
// `width` sums of each from chunk to chunk.
template <typename Real>
__host__ __device__ int64_t bytes_for_general(int64_t chunk, int64_t outputs, const int* most, int64_t tile,
                                              int64_t width, bool transpose) {
  int64_t bytes = bytes_for_rows<Real>(chunk, chunk * most[0]) + bytes_for_rows<Real>(chunk, chunk * most[1]);
  if (!transpose) return bytes;
  const int64_t product = int64_t{most[0]} * most[1];
  bytes += bytes_for_rows<Real>(tile, chunk * (product < tile ? product : tile)) + bytes_for_cursors(tile);
  return bytes + (chunk < outputs ? padded(tile * width * static_cast<int64_t>(sizeof(Real))) : 0);
}

// Hands out shared memory, in the sizes that the functions above count.
struct Pool {
  int at;  // a place in bytes

  __device__ int take(int64_t bytes) {
    const int taken = at;
    at += static_cast<int>(padded(bytes));
    return taken;
  }
  template <typename Real>
  __device__ SparseRows<Real> rows(int64_t rows, int64_t taps) {
    SparseRows<Real> taken;
    taken.taps_at = take(taps * static_cast<int64_t>(sizeof(Tap<Real>)));
    taken.begin_at = take(rows * static_cast<int64_t>(sizeof(int)));
    taken.end_at = take(rows * static_cast<int64_t>(sizeof(int)));
    return taken;
  }
};

// What a block does with its sample, the same for all its threads and in shared memory.
template <typename Real>
struct Plan {
  double linear[4], centre[2];  // the map; where the centre of the output lattice comes from
  Axis<Real> axes[2];
  bool separable, turned;
  SparseRows<Real> found[2];  // the taps on each axis, of positions along it (separable) or of a chunk of the outputs
  SparseRows<Real> transposed[2];  // of these; general: the transpose of their products
  int positions[2];                // of found
  int chunk;                       // outputs at a time
  int sums_at, cursors_at;         // places in bytes

  // `pool_at`: where the pool begins. tile, width: tokens that the transpose writes, and sums of each.
  __device__ void set(const Action<Real>& a, int64_t sample, int pool_at, int tile, int width, bool transpose) {
    double step[2];
    const bool all = usable(a, sample), exact = centres(a, sample);
    for (int i = 0; i < 4; ++i) linear[i] = all ? a.linear[4 * sample + i] : 0;
    for (int axis = 0; axis < 2; ++axis) {
      centre[axis] = (all ? a.offset[2 * sample + axis] : 0) + a.size_in[axis] / 2.0;
      step[axis] = sqrt(linear[2 * axis] * linear[2 * axis] + linear[2 * axis + 1] * linear[2 * axis + 1]);
      axes[axis].set(a, step[axis], exact, a.size_in[axis]);
      if (!all) axes[axis].take_nothing();
    }
    const int most[2] = {axes[0].most, axes[1].most}, outputs = a.size_out[0] * a.size_out[1];
    turned = linear[0] == 0 && linear[3] == 0;
    positions[0] = a.size_out[turned ? 1 : 0];
    positions[1] = a.size_out[turned ? 0 : 1];
    const int64_t pool_size = a.geometry.pool;
    const int64_t between = transpose ? int64_t{positions[0]} * a.size_in[1] : int64_t{a.size_in[0]} * positions[1];
    separable = (turned || (linear[1] == 0 && linear[2] == 0)) && a.geometry.tiles == 1 &&
                bytes_for_separable<Real>(positions, a.size_in, most, between * width, transpose) <= pool_size;
    chunk = outputs;
    Pool pool{pool_at};
    if (separable) {
      sums_at = pool.take(between * width * static_cast<int64_t>(sizeof(Real)));
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t taps = int64_t{positions[axis]} * most[axis];
        found[axis] = pool.template rows<Real>(positions[axis], taps);
        if (transpose) transposed[axis] = pool.template rows<Real>(a.size_in[axis], taps);
      }
      cursors_at = pool.at;
      return;
    }
    // The most outputs at a time for which there is room.
    if (bytes_for_general<Real>(outputs, outputs, most, tile, width, transpose) > pool_size) {
      int fits = 1;
      while (chunk - fits > 1) {
        const int middle = fits + (chunk - fits) / 2;
        (bytes_for_general<Real>(middle, outputs, most, tile, width, transpose) <= pool_size ? fits : chunk) = middle;
      }
      chunk = fits;
    }
    for (int axis = 0; axis < 2; ++axis) {
      positions[axis] = chunk;
      found[axis] = pool.template rows<Real>(chunk, int64_t{chunk} * most[axis]);
    }
    if (!transpose) return;
    transposed[0] = pool.template rows<Real>(tile, chunk * min(int64_t{most[0]} * most[1], int64_t{tile}));
    cursors_at = pool.take(kWarps * tile * static_cast<int64_t>(sizeof(uint16_t)));
    sums_at = pool.at;
  }

  // Every number of the map is finite, and no larger than kLargest.
  __device__ static bool usable(const Action<Real>& a, int64_t sample) {
    bool all = true;
    for (int i = 0; i < 4; ++i) all = all && fabs(a.linear[4 * sample + i]) <= kLargest;
    for (int i = 0; i < 2; ++i) all = all && fabs(a.offset[2 * sample + i]) <= kLargest;
    return all;
  }

  // Every entry is 0 or +-1, and one in each row is not 0.
  __device__ static bool centres(const Action<Real>& a, int64_t sample) {
    bool all = true;
    for (int axis = 0; axis < 2; ++axis) {
      const double u = fabs(a.linear[4 * sample + 2 * axis]), v = fabs(a.linear[4 * sample + 2 * axis + 1]);
      all = all && ((u == 0 && v == 1) || (u == 1 && v == 0));
    }
    return all;
  }
};

}  // namespace ser_fast::cuda
