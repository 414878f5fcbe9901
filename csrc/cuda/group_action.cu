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
#include <limits>

#include "cuda/channel_sums.cuh"
#include "cuda/launch.h"
#include "cuda/plan.cuh"

namespace ser_fast::cuda {
namespace {

constexpr int kBlocks = 3;       // that a multiprocessor should hold at a time
constexpr int kNever = 1 << 30;  // the first token of a thread that has none

template <typename T, bool WIDE, bool TRANSPOSE>
__global__ void __launch_bounds__(kThreads, kBlocks) group_action_kernel(const Action<Weight<T>> a) {
  using Real = Weight<T>;
  constexpr int N = WIDE ? 16 / sizeof(T) : 1;
  using Tokens = Pack<T, N>;
  using Sums = ChannelSum<Real, N>;
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
      const SparseRows<Real> to = plan.found[axis];
      const int begin = r * plan.axes[axis].most;
      to.begin(r) = begin;
      to.end(r) = begin + plan.axes[axis].at(a, position, to.taps() + begin);
    }
    __syncthreads();
    if constexpr (TRANSPOSE) {
      uint16_t* cursors = reinterpret_cast<uint16_t*>(shared_memory() + plan.cursors_at);
#pragma unroll 1
      for (int part = 0; part < (separable ? 2 : 1); ++part) {
        const SparseRows<Real> one = plan.found[part], other = plan.found[1];
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
          const SparseRows<Real> rows = (TRANSPOSE ? plan.transposed : plan.found)[axis];
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
      const SparseRows<Real> second = (TRANSPOSE ? plan.transposed : plan.found)[0];
      const SparseRows<Real> first = (TRANSPOSE ? plan.transposed : plan.found)[1];
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
        const SparseRows<Real> rows = plan.transposed[0];
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
        const SparseRows<Real> rows = plan.found[0], columns = plan.found[1];
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
Geometry geometry_of(int64_t element, int64_t batch, int64_t channels, const Lattices& l, const Resampling& resampling,
                     bool transpose, bool aligned, int64_t multiprocessors, int64_t shared_limit) {
  const int64_t inputs = l.height_in * l.width_in, outputs = l.height_out * l.width_out;
  const int64_t read = transpose ? outputs : inputs, written = transpose ? inputs : outputs;
  const int size[2] = {static_cast<int>(l.height_in), static_cast<int>(l.width_in)};

  // Taps that are likely, where the lattice shrinks to no less than half.
  const int taps = resampling.interpolation == Interpolation::area ? 4
                   : resampling.antialias || resampling.interpolation == Interpolation::lanczos3
                       ? static_cast<int>(2 * radius(resampling.interpolation) * (resampling.antialias ? 2 : 1)) + 1
                   : resampling.interpolation == Interpolation::nearest  ? 1
                   : resampling.interpolation == Interpolation::bilinear ? 2
                                                                         : 4;
  const int likely[2] = {std::min(taps, size[0]), std::min(taps, size[1])};
  const auto wanted = [&](int64_t width) {
    int64_t most = bytes_for_general<Real>(outputs, outputs, likely, written, width, transpose);
    for (const bool turned : {false, true}) {
      const int rows[2] = {static_cast<int>(turned ? l.width_out : l.height_out),
                           static_cast<int>(turned ? l.height_out : l.width_out)};
      const int64_t between = transpose ? int64_t{rows[0]} * size[1] : int64_t{size[0]} * rows[1];
      most = std::max(most, bytes_for_separable<Real>(rows, size, likely, between * width, transpose));
    }
    return most;
  };
  const auto least = [&](int64_t tile, int64_t width) {
    return bytes_for_general<Real>(1, std::max<int64_t>(outputs, 2), size, tile, width, transpose);
  };
  const auto complete = [&](Geometry n) {
    n.slabs = static_cast<int>((channels + n.slab * n.vector - 1) / (n.slab * n.vector));
    n.group =
        static_cast<int>(std::clamp<int64_t>(batch * n.slabs * n.tiles / (kWanted * multiprocessors), 1, n.slabs));
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

template <typename T>
const char* act(const void* x, const double* linear, const double* offset, void* out, int64_t channels,
                const Lattices& l, Resampling resampling, const Geometry& n, bool transpose, void* stream) {
  using Real = Weight<T>;
  if (resampling.antialias && resampling.interpolation == Interpolation::bicubic)
    resampling.interpolation = Interpolation::catmull_rom;
  Action<Real> action{x,
                      linear,
                      offset,
                      out,
                      channels,
                      {static_cast<int>(l.height_in), static_cast<int>(l.width_in)},
                      {static_cast<int>(l.height_out), static_cast<int>(l.width_out)},
                      resampling.interpolation,
                      resampling.padding,
                      resampling.antialias,
                      {},
                      {},
                      radius(resampling.interpolation),
                      n};
  const Cubics of = cubics(resampling.interpolation);
  std::copy_n(of.inner, 4, action.inner);
  std::copy_n(of.outer, 4, action.outer);
  const auto kernel = n.wide ? (transpose ? group_action_kernel<T, true, true> : group_action_kernel<T, true, false>)
                             : (transpose ? group_action_kernel<T, false, true> : group_action_kernel<T, false, false>);
  return launch(kernel, n.blocks, kThreads, n.shared, stream, action);
}

}  // namespace

Geometry geometry(Type type, int64_t batch, int64_t channels, const Lattices& lattices, const Resampling& resampling,
                  bool transpose, bool aligned, int64_t multiprocessors, int64_t shared_limit) {
  const auto run = type == Type::float64 ? geometry_of<double> : geometry_of<float>;
  return run(bytes_of(type), batch, channels, lattices, resampling, transpose, aligned, multiprocessors, shared_limit);
}

const char* group_action(const void* x, const double* linear, const double* offset, void* out, Type type, int64_t batch,
                         int64_t channels, const Lattices& l, const Resampling& resampling, bool transpose,
                         void* stream) {
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
    return error_string(error);
  }
  if (error != cudaSuccess) return error_string(error);

  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const Geometry n =
      geometry(type, batch, channels, l, resampling, transpose, aligned, multiprocessors, limit - kStatic);
  if (n.shared > limit - kStatic) return "a side of a lattice is too long for the shared memory";
  return with_type(type, [&](auto of) {
    return act<decltype(of)>(x, linear, offset, out, channels, l, resampling, n, transpose, stream);
  });
}

}  // namespace ser_fast::cuda
