// One pass over memory. A block owns some slabs of channels of a sample: it writes down the taps of the map once, and
// then for each slab stages the tokens in shared memory (the next slab while it works on this one) and writes each
// output token once, 16 bytes a thread, as a weighted sum of staged tokens.
//
//   copy       D4, whole shifts, nearest along the axes: tokens go from global to global memory, bit for bit.
//   separable  maps along the axes (D4 with scales, SER's own family): taps of x, then taps of y: 4 + 4, not 4 x 4.
//   general    any affine map: the taps of both axes of each output token, as many outputs at a time as there is room.
//
// The transpose (the gradient) sorts the same taps by the token they belong to, in the order of the outputs, with a
// cursor for each warp: no atomics, and the same sums in the same order every time.
//
// Where a slab of 16 bytes a token does not fit, or channels are not multiples of 16 bytes, tokens are read from global
// memory one channel at a time, and the transpose splits the tokens it writes among blocks.

#include "cuda/group_action.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace ser_fast::cuda {
namespace {

constexpr int kThreads = 192, kWarps = kThreads / 32;
constexpr int kBlocks = 3;       // that a multiprocessor should hold at a time
constexpr double kFar = 1e6;     // farther out nothing changes, and an int holds it
constexpr int kNever = 1 << 30;  // the first token of a thread that has none

template <typename T>
using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What the kernel is told.
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

// ------------------------------------------------------------------------------------------------ taps

template <typename Real>
struct Tap {
  int index;
  Real weight;
};

constexpr int kBlend = -1, kNothing = -2;

// A sparse matrix by rows, in shared memory: row r has the taps [begin(r), end(r)). The members are places in bytes.
template <typename Real>
struct Rows {
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

  // Writes the taps of a position, each of another token, and returns their number.
  __device__ int at(const Action<Real>& a, double position, Tap<Real>* to) const {
    if (a.padding == Padding::reflection) {
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
__device__ void transpose(const Rows<Real>& to, int columns, int rows, uint16_t* cursors, const Count& count,
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

// ------------------------------------------------------------------------------------------------ room

__host__ __device__ constexpr int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of a matrix with so many rows, and taps in all.
template <typename Real>
__host__ __device__ int64_t room_of_rows(int64_t rows, int64_t taps) {
  return padded(taps * static_cast<int64_t>(sizeof(Tap<Real>))) + 2 * padded(rows * static_cast<int64_t>(sizeof(int)));
}

__host__ __device__ inline int64_t room_of_cursors(int64_t columns) {
  return padded(kWarps * columns * static_cast<int64_t>(sizeof(uint16_t)));
}

// Bytes of a map along the axes: with most[i] taps of each of the rows[i] positions on axis i of size[i] tokens, and
// `between` sums after the first axis.
template <typename Real>
__host__ __device__ int64_t room_separable(const int* rows, const int* size, const int* most, int64_t between,
                                           bool transpose) {
  int64_t bytes = padded(between * static_cast<int64_t>(sizeof(Real)));
  int longest = 0;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t taps = int64_t{rows[axis]} * most[axis];
    bytes += room_of_rows<Real>(rows[axis], taps) + (transpose ? room_of_rows<Real>(size[axis], taps) : 0);
    longest = size[axis] > longest ? size[axis] : longest;
  }
  return bytes + (transpose ? room_of_cursors(longest) : 0);
}

// Bytes of a general map for `chunk` of all `outputs` at a time; the transpose writes a tile of tokens, and keeps
// `width` sums of each from chunk to chunk.
template <typename Real>
__host__ __device__ int64_t room_general(int64_t chunk, int64_t outputs, const int* most, int64_t tile, int64_t width,
                                         bool transpose) {
  int64_t bytes = room_of_rows<Real>(chunk, chunk * most[0]) + room_of_rows<Real>(chunk, chunk * most[1]);
  if (!transpose) return bytes;
  const int64_t product = int64_t{most[0]} * most[1];
  bytes += room_of_rows<Real>(tile, chunk * (product < tile ? product : tile)) + room_of_cursors(tile);
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
  __device__ Rows<Real> rows(int64_t rows, int64_t taps) {
    Rows<Real> taken;
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
  Rows<Real> found[2];       // the taps on each axis, of positions along it (separable) or of a chunk of the outputs
  Rows<Real> transposed[2];  // of these; general: the transpose of their products
  int positions[2];          // of found
  int chunk;                 // outputs at a time
  int sums_at, cursors_at;   // places in bytes

  // `pool_at`: where the pool begins. tile, width: tokens that the transpose writes, and sums of each.
  __device__ void set(const Action<Real>& a, int64_t sample, int pool_at, int tile, int width, bool transpose) {
    double step[2];
    for (int i = 0; i < 4; ++i) linear[i] = a.linear[4 * sample + i];
    const bool exact = centres(a, sample);
    for (int axis = 0; axis < 2; ++axis) {
      centre[axis] = a.offset[2 * sample + axis] + a.size_in[axis] / 2.0;
      step[axis] = sqrt(linear[2 * axis] * linear[2 * axis] + linear[2 * axis + 1] * linear[2 * axis + 1]);
      axes[axis].set(a, step[axis], exact, a.size_in[axis]);
    }
    const int most[2] = {axes[0].most, axes[1].most}, outputs = a.size_out[0] * a.size_out[1];
    turned = linear[0] == 0 && linear[3] == 0;
    positions[0] = a.size_out[turned ? 1 : 0];
    positions[1] = a.size_out[turned ? 0 : 1];
    const int64_t pool_size = a.geometry.pool;
    const int64_t between = transpose ? int64_t{positions[0]} * a.size_in[1] : int64_t{a.size_in[0]} * positions[1];
    separable = (turned || (linear[1] == 0 && linear[2] == 0)) && a.geometry.tiles == 1 &&
                room_separable<Real>(positions, a.size_in, most, between * width, transpose) <= pool_size;
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
    if (room_general<Real>(outputs, outputs, most, tile, width, transpose) > pool_size) {
      int fits = 1;
      while (chunk - fits > 1) {
        const int middle = fits + (chunk - fits) / 2;
        (room_general<Real>(middle, outputs, most, tile, width, transpose) <= pool_size ? fits : chunk) = middle;
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

// ------------------------------------------------------------------------------------------------ the kernel

// Neighbouring channels, loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <typename T, int N>
__device__ void store(T* to, const Pack<T, N>& values) {
  if constexpr (sizeof(values) == 16) {
    store_16(to, &values);
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = values;
  }
}

template <typename Real, int N>
struct Sum {
  static constexpr int kPart = N * sizeof(Real) > 16 ? 16 / sizeof(Real) : N;  // 16 bytes at a time
  using Part = Pack<Real, kPart>;

  Real at[N] = {};

  template <typename T>
  __device__ void add(Real weight, const Pack<T, N>& x) {
    for (int i = 0; i < N; ++i) at[i] += weight * widen(x.at[i]);
  }
  __device__ void add(Real weight, const Sum& x) {
    for (int i = 0; i < N; ++i) at[i] += weight * x.at[i];
  }
  template <typename T>
  __device__ Pack<T, N> rounded() const {
    Pack<T, N> out;
    for (int i = 0; i < N; ++i) narrow(out.at[i], at[i]);
    return out;
  }
  // In a row of the sums of `lanes` threads; neighbours' parts are neighbours.
  __device__ void store(Part* row, int lane, int lanes) const {
    for (int part = 0; part < N / kPart; ++part) {
      Part values;
      for (int i = 0; i < kPart; ++i) values.at[i] = at[part * kPart + i];
      row[part * lanes + lane] = values;
    }
  }
  __device__ static Sum load(const Part* row, int lane, int lanes) {
    Sum sum;
    for (int part = 0; part < N / kPart; ++part) {
      const Part values = row[part * lanes + lane];
      for (int i = 0; i < kPart; ++i) sum.at[part * kPart + i] = values.at[i];
    }
    return sum;
  }
};

// The cells (row, column) of a table with `columns`, from one on and then every `stride`th, without a division each.
struct Cell {
  int row, column, columns, down, across;

  __device__ Cell(int first, int columns, int stride)
      : row(first / columns), column(first % columns), columns(columns), down(stride / columns),
        across(stride % columns) {}
  __device__ void next() {
    row += down;
    column += across;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
};

template <typename T, bool WIDE, bool TRANSPOSE>
__global__ void __launch_bounds__(kThreads, kBlocks) resample(const Action<Weight<T>> a) {
  using Real = Weight<T>;
  constexpr int N = WIDE ? 16 / sizeof(T) : 1;
  using Tokens = Pack<T, N>;
  using Sums = Sum<Real, N>;
  using Part = typename Sums::Part;

  const Geometry& n = a.geometry;
  const unsigned groups = (n.slabs + n.group - 1) / n.group;
  const int first_slab = static_cast<int>(blockIdx.x % groups) * n.group;
  const int last_slab = min(first_slab + n.group, n.slabs);
  const unsigned sample = blockIdx.x / groups / n.tiles;
  const int inputs = a.size_in[0] * a.size_in[1], outputs = a.size_out[0] * a.size_out[1];
  const int read = TRANSPOSE ? outputs : inputs, written = TRANSPOSE ? inputs : outputs;
  const int tile_first = static_cast<int>(blockIdx.x / groups % n.tiles) * n.tile;
  const int tile = min(n.tile, written - tile_first);

  // A token's lanes are neighbours, and `ranks` tokens are worked on at a time.
  const int lanes = n.slab, ranks = kThreads / lanes, lane = threadIdx.x % lanes;
  const int rank = static_cast<int>(threadIdx.x) / lanes;
  // The channel and the first token of this thread.
  const auto channel_of = [&](int slab) { return (int64_t{slab} * lanes + lane) * N; };
  const auto first_of = [&](int slab) { return rank < ranks && channel_of(slab) < a.channels ? rank : kNever; };

  Tokens* staged = reinterpret_cast<Tokens*>(shared_memory());
  const auto stage = [&](int slab) {
    if constexpr (WIDE) {
      Tokens* to = staged + (slab - first_slab) % n.buffers * read * lanes + lane;
      const T* from = static_cast<const T*>(a.x) + int64_t{sample} * read * a.channels + channel_of(slab);
      for (int i = first_of(slab); i < read; i += ranks) copy_async(to + i * lanes, from + i * a.channels);
      commit_copies();
    }
  };
  // What is likely to be a copy is staged only when it turns out to be none.
  const bool early = !Plan<Real>::centres(a, sample) && a.interpolation != Interpolation::nearest;
  if (early) stage(first_slab);

  __shared__ Plan<Real> plan;
  if (threadIdx.x == 0) {
    const int64_t slabs = WIDE ? padded(int64_t{n.buffers} * read * lanes * static_cast<int64_t>(sizeof(Tokens))) : 0;
    plan.set(a, sample, static_cast<int>(slabs), tile, lanes * N, TRANSPOSE);
  }
  __syncthreads();
  const bool separable = plan.separable;
  const int chunk = plan.chunk;

  // Finds the taps along the axes, or those of the outputs [first, first + count).
  const auto find_taps = [&](int first, int count) {
    const int rows[2] = {separable ? plan.positions[0] : count, separable ? plan.positions[1] : count};
#pragma unroll 1
    for (int item = threadIdx.x; item < rows[0] + rows[1]; item += kThreads) {
      const int axis = item >= rows[0], r = item - (axis ? rows[0] : 0);
      // Along an axis the coefficient of the other coordinate is 0.
      const int y = separable ? r : (first + r) / a.size_out[1], x = separable ? r : (first + r) % a.size_out[1];
      const double position = plan.linear[2 * axis] * (y + 0.5 - a.size_out[0] / 2.0) +
                              plan.linear[2 * axis + 1] * (x + 0.5 - a.size_out[1] / 2.0) + plan.centre[axis];
      const Rows<Real> to = plan.found[axis];
      const int begin = r * plan.axes[axis].most;
      to.begin(r) = begin;
      to.end(r) = begin + plan.axes[axis].at(a, position, to.taps() + begin);
    }
    __syncthreads();
    if constexpr (TRANSPOSE) {
      uint16_t* cursors = reinterpret_cast<uint16_t*>(shared_memory() + plan.cursors_at);
#pragma unroll 1
      for (int part = 0; part < (separable ? 2 : 1); ++part) {
        const Rows<Real> one = plan.found[part], other = plan.found[1];
        transpose(
            plan.transposed[part], separable ? a.size_in[part] : tile, separable ? plan.positions[part] : count,
            cursors, [&](int r) { return separable ? one.count(r) : one.count(r) * other.count(r); },
            [&](int r, int e) {
              if (separable) return one.taps()[one.begin(r) + e];
              const Tap<Real> y = one.taps()[one.begin(r) + e / other.count(r)];
              const Tap<Real> x = other.taps()[other.begin(r) + e % other.count(r)];
              return Tap<Real>{y.index * a.size_in[1] + x.index - tile_first, y.weight * x.weight};
            });
      }
    }
  };

  bool copies = false;
#pragma unroll 1
  for (int slab = first_slab; slab < last_slab; ++slab) {
    if (slab == first_slab) {
      find_taps(0, min(chunk, outputs));
      if (separable) {
        bool blends = false;
#pragma unroll 1
        for (int axis = 0; axis < 2; ++axis) {
          const Rows<Real> rows = (TRANSPOSE ? plan.transposed : plan.found)[axis];
          const int count = TRANSPOSE ? a.size_in[axis] : plan.positions[axis];
          for (int r = threadIdx.x; r < count; r += kThreads) blends = blends || rows.source(r) == kBlend;
        }
        copies = __syncthreads_and(!blends);
      }
      if (!early && !copies) stage(slab);
    }
    if (WIDE && !copies) {
      if (slab + 1 < last_slab) {
        stage(slab + 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
    }

    const Tokens* here = staged + (slab - first_slab) % n.buffers * read * lanes + lane;
    const T* from = static_cast<const T*>(a.x) + int64_t{sample} * read * a.channels + channel_of(slab);
    T* to = static_cast<T*>(a.out) + int64_t{sample} * written * a.channels + channel_of(slab);
    const auto global = [&](int i) { return *reinterpret_cast<const Tokens*>(from + i * a.channels); };
    const auto token = [&](int i) {
      if constexpr (WIDE) {
        return here[i * lanes];
      } else {
        return global(i);
      }
    };
    const auto write = [&](int i, const Tokens& values) { store(to + i * a.channels, values); };
    Part* sums = reinterpret_cast<Part*>(shared_memory() + plan.sums_at);
    const int sums_of_token = lanes * (N / Sums::kPart);
    const int begin = first_of(slab);

    if (separable) {
      // Token (p, q) of x is p * p_in + q * q_in, and token (s, r) of out is s * s_out + r * r_out; r is a sum over q,
      // s one over p.
      const Rows<Real> second = (TRANSPOSE ? plan.transposed : plan.found)[0];
      const Rows<Real> first = (TRANSPOSE ? plan.transposed : plan.found)[1];
      const int along_y = plan.turned ? 1 : a.size_out[1], along_x = plan.turned ? a.size_out[1] : 1;
      const int p_in = TRANSPOSE ? along_y : a.size_in[1], q_in = TRANSPOSE ? along_x : 1;
      const int s_out = TRANSPOSE ? a.size_in[1] : along_y, r_out = TRANSPOSE ? 1 : along_x;
      const int down = TRANSPOSE ? plan.positions[0] : a.size_in[0];
      const int across = TRANSPOSE ? a.size_in[1] : plan.positions[1];
      if (!copies) {
        Cell cell(begin, across, ranks);
        for (int i = begin; i < down * across; i += ranks, cell.next()) {
          Sums sum;
          const int end = first.end(cell.column);
          for (int t = first.begin(cell.column); t < end; ++t) {
            const Tap<Real> tap = first.taps()[t];
            sum.add(tap.weight, token(cell.row * p_in + tap.index * q_in));
          }
          sum.store(sums + i * sums_of_token, lane, lanes);
        }
        __syncthreads();
      }
      Cell cell(begin, across, ranks);
      for (int i = begin; i < written; i += ranks, cell.next()) {
        const int at = cell.row * s_out + cell.column * r_out;
        const int p = second.source(cell.row), q = first.source(cell.column);
        if (copies) {
          write(at, p == kNothing || q == kNothing ? Tokens{} : global(p * p_in + q * q_in));
        } else if (p >= 0 && q >= 0) {
          write(at, token(p * p_in + q * q_in));
        } else {
          Sums sum;
          const int end = second.end(cell.row);
          for (int t = second.begin(cell.row); t < end; ++t) {
            const Tap<Real> tap = second.taps()[t];
            sum.add(tap.weight, Sums::load(sums + (tap.index * across + cell.column) * sums_of_token, lane, lanes));
          }
          write(at, sum.template rounded<T>());
        }
      }
      __syncthreads();
      continue;
    }

#pragma unroll 1
    for (int first = 0; first < outputs; first += chunk) {
      const int count = min(chunk, outputs - first);
      if (chunk < outputs && (first > 0 || slab > first_slab)) find_taps(first, count);
      if constexpr (TRANSPOSE) {
        const Rows<Real> rows = plan.transposed[0];
        for (int i = begin; i < tile; i += ranks) {
          Sums sum;
          if (first > 0) sum = Sums::load(sums + i * sums_of_token, lane, lanes);
          const int end = rows.end(i);
#pragma unroll 2
          for (int t = rows.begin(i); t < end; ++t) {
            const Tap<Real> tap = rows.taps()[t];
            sum.add(tap.weight, token(first + tap.index));
          }
          const int only = chunk < outputs ? kBlend : rows.source(i);
          if (first + count < outputs) {
            sum.store(sums + i * sums_of_token, lane, lanes);
          } else {
            write(tile_first + i, only >= 0 ? token(only) : sum.template rounded<T>());
          }
        }
      } else {
        const Rows<Real> rows = plan.found[0], columns = plan.found[1];
        for (int i = begin; i < count; i += ranks) {
          const int p = rows.source(i), q = columns.source(i);
          if (p >= 0 && q >= 0) {
            write(first + i, token(p * a.size_in[1] + q));
            continue;
          }
          Sums sum;
          const int end = rows.end(i), end_x = columns.end(i);
          for (int s = rows.begin(i); s < end; ++s) {
            const Tap<Real> y = rows.taps()[s];
#pragma unroll 2
            for (int t = columns.begin(i); t < end_x; ++t) {
              const Tap<Real> x = columns.taps()[t];
              sum.add(y.weight * x.weight, token(y.index * a.size_in[1] + x.index));
            }
          }
          write(first + i, sum.template rounded<T>());
        }
      }
      __syncthreads();
    }
  }
}

// ------------------------------------------------------------------------------------------------ launch

constexpr int64_t kWidest = 8;                 // accesses of 16 bytes: a cache line
constexpr int64_t kComfortable = 74 << 10;     // bytes of shared memory: two blocks of sm_80 at a time, three of sm_90
constexpr int64_t kWanted = 2 * kBlocks;       // blocks a multiprocessor, for an even end
constexpr int64_t kChannels = 32;              // of a slab that is not staged
constexpr int kStatic = sizeof(Plan<double>);  // bytes of shared memory besides what a launch asks for

template <typename Real>
Geometry geometry_of(int64_t element, int64_t batch, int64_t channels, const Lattices& l, const Resampling& how,
                     bool transpose, bool aligned, int64_t multiprocessors, int64_t shared_limit) {
  const int64_t inputs = l.height_in * l.width_in, outputs = l.height_out * l.width_out;
  const int64_t read = transpose ? outputs : inputs, written = transpose ? inputs : outputs;
  const int size[2] = {static_cast<int>(l.height_in), static_cast<int>(l.width_in)};

  // Taps that are likely, where the lattice shrinks to no less than half.
  const int taps = how.interpolation == Interpolation::area ? 4
                   : how.antialias || how.interpolation == Interpolation::lanczos3
                       ? static_cast<int>(2 * radius(how.interpolation) * (how.antialias ? 2 : 1)) + 1
                   : how.interpolation == Interpolation::nearest  ? 1
                   : how.interpolation == Interpolation::bilinear ? 2
                                                                  : 4;
  const int likely[2] = {std::min(taps, size[0]), std::min(taps, size[1])};
  const auto wanted = [&](int64_t width) {
    int64_t most = room_general<Real>(outputs, outputs, likely, written, width, transpose);
    for (const bool turned : {false, true}) {
      const int rows[2] = {static_cast<int>(turned ? l.width_out : l.height_out),
                           static_cast<int>(turned ? l.height_out : l.width_out)};
      const int64_t between = transpose ? int64_t{rows[0]} * size[1] : int64_t{size[0]} * rows[1];
      most = std::max(most, room_separable<Real>(rows, size, likely, between * width, transpose));
    }
    return most;
  };
  const auto least = [&](int64_t tile, int64_t width) {
    return room_general<Real>(1, std::max<int64_t>(outputs, 2), size, tile, width, transpose);
  };
  const auto complete = [&](Geometry n) {
    n.slabs = static_cast<int>((channels + n.slab * n.vector - 1) / (n.slab * n.vector));
    n.group = static_cast<int>(
        std::clamp<int64_t>(batch * n.slabs * n.tiles / (kWanted * multiprocessors), 1, n.slabs));
    if (n.wide && n.buffers == 1) n.group = 1;
    n.buffers = n.wide && n.group > 1 ? 2 : 1;
    n.shared = (n.wide ? n.buffers * padded(read * n.slab * 16) : 0) + n.pool;
    n.blocks = batch * n.tiles * ((n.slabs + n.group - 1) / n.group);
    return n;
  };

  Geometry n{};
  n.wide = true;
  n.vector = static_cast<int>(16 / element);
  n.tile = static_cast<int>(written);
  n.tiles = 1;
  if (aligned && channels * element % 16 == 0) {
    for (int64_t slab = kWidest; slab > 0; slab /= 2) {
      if (slab > 1 && slab / 2 * n.vector >= channels) continue;  // half of it holds them all
      const int64_t width = slab * n.vector, stage = padded(read * slab * 16);
      n.slab = static_cast<int>(slab);
      n.pool = std::max(wanted(width), least(written, width));
      n.buffers = 2;
      if (2 * stage + n.pool <= std::min(kComfortable, shared_limit)) return complete(n);
      if (slab > 1 || stage + least(written, width) > shared_limit) continue;
      n.pool = std::min(n.pool, shared_limit - stage);
      n.buffers = 1;
      return complete(n);
    }
  }
  n.wide = false;
  n.vector = 1;
  n.slab = static_cast<int>(std::min(channels, kChannels));
  n.buffers = 1;
  const int64_t limit = std::min(kComfortable, shared_limit);
  while (transpose && n.tile > 1 && least(n.tile, n.slab) > limit) n.tile = (n.tile + 1) / 2;
  n.tiles = static_cast<int>((written + n.tile - 1) / n.tile);
  n.pool = std::max(std::min(wanted(n.slab), limit), least(n.tile, n.slab));
  return complete(n);
}

int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

template <typename T>
const char* act(const void* x, const double* linear, const double* offset, void* out, int64_t channels,
                const Lattices& l, Resampling how, const Geometry& n, bool transpose, void* stream) {
  using Real = Weight<T>;
  if (how.antialias && how.interpolation == Interpolation::bicubic) how.interpolation = Interpolation::catmull_rom;
  Action<Real> action{x, linear, offset, out, channels,
                      {static_cast<int>(l.height_in), static_cast<int>(l.width_in)},
                      {static_cast<int>(l.height_out), static_cast<int>(l.width_out)},
                      how.interpolation, how.padding, how.antialias, {}, {}, radius(how.interpolation), n};
  const Cubics of = cubics(how.interpolation);
  std::copy_n(of.inner, 4, action.inner);
  std::copy_n(of.outer, 4, action.outer);
  const auto kernel = n.wide ? (transpose ? resample<T, true, true> : resample<T, true, false>)
                             : (transpose ? resample<T, false, true> : resample<T, false, false>);
  return launch(kernel, n.blocks, kThreads, n.shared, stream, action);
}

}  // namespace

Geometry geometry(Type type, int64_t batch, int64_t channels, const Lattices& lattices, const Resampling& how,
                  bool transpose, bool aligned, int64_t multiprocessors, int64_t shared_limit) {
  const auto run = type == Type::float64 ? geometry_of<double> : geometry_of<float>;
  return run(bytes_of(type), batch, channels, lattices, how, transpose, aligned, multiprocessors, shared_limit);
}

const char* group_action(const void* x, const double* linear, const double* offset, void* out, Type type, int64_t batch,
                         int64_t channels, const Lattices& l, const Resampling& how, bool transpose, void* stream) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 16;
  if (std::max(l.height_in, l.width_in) > most || std::max(l.height_out, l.width_out) > most ||
      l.height_in * l.width_in > most || l.height_out * l.width_out > most) {
    return "a lattice has too many tokens";
  }
  if (channels > std::numeric_limits<int>::max()) return "too many channels";
  const int64_t read = transpose ? l.height_out * l.width_out : l.height_in * l.width_in;
  const int64_t written = transpose ? l.height_in * l.width_in : l.height_out * l.width_out;
  if (batch * written * channels == 0) return nullptr;
  int device, multiprocessors, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = shared_limit(limit);
  if (error == cudaSuccess && read == 0) {
    error = cudaMemsetAsync(out, 0, batch * written * channels * bytes_of(type), static_cast<cudaStream_t>(stream));
    return words_of(error);
  }
  if (error != cudaSuccess) return words_of(error);

  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const Geometry n = geometry(type, batch, channels, l, how, transpose, aligned, multiprocessors, limit - kStatic);
  if (n.shared > limit - kStatic) return "a side of a lattice is too long for the shared memory";
  return with_type(type, [&](auto of) {
    return act<decltype(of)>(x, linear, offset, out, channels, l, how, n, transpose, stream);
  });
}

}  // namespace ser_fast::cuda
