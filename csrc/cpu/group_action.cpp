// One pass over memory: a thread takes (sample, channel block), whose slab of tokens fits its second-level cache, and
// writes each output token once, as a weighted sum of slab rows.
//
//   copy       D4, nearest, whole shifts: rows are moved, bit for bit.
//   separable  maps along the axes (D4 with scales, SER's family): taps of an axis, then the other's: 4 + 4, not 4 x 4.
//   general    any affine map: one list of taps a token.
//
// The transpose (the gradient) runs the same loops over the transposed lists: no atomics, and the same sums in the same
// order for any number of threads. Samples with the same map follow one another, and a thread makes its lists once.

#include "cpu/group_action.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/channel_vectors.h"
#include "cpu/taps.h"

namespace ser_fast {
namespace {

// ------------------------------------------------------------------------------------------------ plans

// Every number of a map is finite, and no larger than kLargest; else it takes nothing.
bool usable(const double* linear, const double* offset) {
  bool all = true;
  for (int i = 0; i < 4; ++i) all = all && std::abs(linear[i]) <= kLargest;
  for (int i = 0; i < 2; ++i) all = all && std::abs(offset[i]) <= kLargest;
  return all;
}

// What a map does to a slab. Token (p, q) of x is row p * p_in + q * q_in; token (s, r) of out is row
// s * s_out + r * r_out.
template <typename Real>
struct Plan {
  enum class Kind { copy, separable, general } kind;
  Sparse<Real> first;   // separable: (s, p), a row of it applied to each q
  Sparse<Real> second;  // separable: (r, q), applied to that; copy and general: (out token, in token)
  int64_t p_in = 0, q_in = 0, s_out = 0, r_out = 0;
};

template <typename Real>
Plan<Real> make_plan(const double* linear, const double* offset, const Lattices& n, const Resampling& resampling,
                     bool transpose) {
  const int64_t size_in[2] = {n.height_in, n.width_in}, size_out[2] = {n.height_out, n.width_out};
  if (!usable(linear, offset)) {
    const int64_t read = size_in[0] * size_in[1], written = size_out[0] * size_out[1];
    Plan<Real> nothing;
    nothing.kind = Plan<Real>::Kind::copy;
    nothing.second.fill(transpose ? read : written, transpose ? written : read, 0,
                        [](int64_t, int32_t*, Real*) { return int64_t{0}; });
    return nothing;
  }
  const double step[2] = {std::hypot(linear[0], linear[1]), std::hypot(linear[2], linear[3])};
  bool exact = step[0] == 1 && step[1] == 1;
  for (int i = 0; i < 4; ++i) exact = exact && (linear[i] == 0 || std::abs(linear[i]) == 1);
  const bool straight = linear[1] == 0 && linear[2] == 0, turned = linear[0] == 0 && linear[3] == 0;
  Axis axes[2] = {{resampling, step[0], exact, size_in[0]}, {resampling, step[1], exact, size_in[1]}};

  if (straight || turned) {
    // Input y follows output axis 0, or 1 after a quarter turn; input x the other one.
    Sparse<Real> along[2];
    for (int axis = 0; axis < 2; ++axis) {
      const int other = turned ? 1 - axis : axis;
      const auto position = [&](int64_t i) {
        return linear[2 * axis + other] * (i + 0.5 - size_out[other] / 2.0) + offset[axis] + size_in[axis] / 2.0;
      };
      along[axis].fill(size_out[other], size_in[axis], axes[axis].most(), [&](int64_t i, int32_t* index, Real* weight) {
        const Axis::Taps taps = axes[axis].at(position(i));
        std::copy_n(taps.index, taps.count, index);
        std::copy_n(taps.weight, taps.count, weight);
        return taps.count;
      });
      if (transpose) along[axis].transpose();
    }
    // Strides between neighbours along input y and x, on the input lattice and on the output lattice.
    int64_t in[2] = {n.width_in, 1}, out[2] = {turned ? 1 : n.width_out, turned ? n.width_out : 1};
    if (transpose) std::swap(in, out);
    // The axis to begin with is the one that leaves less to do for the other.
    const auto cost = [&](int first) {
      return along[first].index.size() * along[1 - first].columns + along[1 - first].index.size() * along[first].rows();
    };
    const int first = cost(1) <= cost(0), second = 1 - first;
    Plan<Real> plan{Plan<Real>::Kind::separable,
                    std::move(along[first]),
                    std::move(along[second]),
                    in[first],
                    in[second],
                    out[first],
                    out[second]};
    if (!plan.first.copies() || !plan.second.copies()) return plan;
    // One list of whole rows to move.
    std::vector<int32_t> source(plan.first.rows() * plan.second.rows(), -1);
    for (int64_t s = 0; s < plan.first.rows(); ++s) {
      for (int64_t r = 0; r < plan.second.rows(); ++r) {
        const int32_t p = plan.first.source(s), q = plan.second.source(r);
        if (p >= 0 && q >= 0) source[s * plan.s_out + r * plan.r_out] = p * plan.p_in + q * plan.q_in;
      }
    }
    plan.kind = Plan<Real>::Kind::copy;
    plan.second.fill(source.size(), plan.first.columns * plan.second.columns, 1,
                     [&](int64_t o, int32_t* index, Real* weight) {
                       *index = source[o];
                       *weight = 1;
                       return int64_t(source[o] >= 0);
                     });
    return plan;
  }

  Plan<Real> plan;
  plan.second.fill(
      size_out[0] * size_out[1], size_in[0] * size_in[1], axes[0].most() * axes[1].most(),
      [&](int64_t o, int32_t* index, Real* weight) {
        const double v[2] = {o / size_out[1] + 0.5 - size_out[0] / 2.0, o % size_out[1] + 0.5 - size_out[1] / 2.0};
        const auto position = [&](int axis) {
          return linear[2 * axis] * v[0] + linear[2 * axis + 1] * v[1] + offset[axis] + size_in[axis] / 2.0;
        };
        const Axis::Taps y = axes[0].at(position(0)), x = axes[1].at(position(1));
        for (int64_t a = 0; a < y.count; ++a) {
          for (int64_t b = 0; b < x.count; ++b) {
            *index++ = static_cast<int32_t>(y.index[a] * size_in[1] + x.index[b]);
            *weight++ = static_cast<Real>(y.weight[a] * x.weight[b]);
          }
        }
        return y.count * x.count;
      });
  if (transpose) plan.second.transpose();
  plan.kind = plan.second.copies() ? Plan<Real>::Kind::copy : Plan<Real>::Kind::general;
  return plan;
}

// ------------------------------------------------------------------------------------------------ the mover

// Channels of a slab: 14 x 14 tokens of float32 are 100 KB, and a row of tokens stays in the first-level cache.
int64_t block_of(int64_t tokens) { return tokens <= 1024 ? 128 : 64; }

// An output of this size will not be in the cache when it is read.
constexpr int64_t kStreamedBytes = 8 << 20;

constexpr size_t kLine = 64;  // bytes of a cache line

template <typename T>
struct Traits {
  using Real = float;
};
template <>
struct Traits<double> {
  using Real = double;
};

void widen(float* out, const bfloat16* in, int64_t count) { channel_kernels().widen_bfloat16(out, in, count); }
void widen(float* out, const float16* in, int64_t count) { channel_kernels().widen_float16(out, in, count); }
void blend(float* out, const Blend<float>& sum, int64_t count, bool stream) {
  channel_kernels().blend_float(out, sum, count, stream);
}
void blend(double* out, const Blend<double>& sum, int64_t count, bool stream) {
  channel_kernels().blend_double(out, sum, count, stream);
}
void blend(bfloat16* out, const Blend<float>& sum, int64_t count, bool stream) {
  channel_kernels().blend_bfloat16(out, sum, count, stream);
}
void blend(float16* out, const Blend<float>& sum, int64_t count, bool stream) {
  channel_kernels().blend_float16(out, sum, count, stream);
}

// Brings the slab that a thread takes next into its cache, a part with each output token.
class Prefetch {
 public:
  Prefetch(const void* from, int64_t rows, int64_t stride, size_t bytes, int64_t parts)
      : at_(static_cast<const char*>(from)),
        rows_(from ? rows : 0),
        stride_(stride),
        bytes_(bytes),
        rows_a_part_((rows + parts - 1) / std::max<int64_t>(parts, 1)) {}
  void part() {
    for (int64_t r = 0; r < rows_a_part_ && rows_ > 0; ++r, --rows_, at_ += stride_) {
      for (size_t b = 0; b < bytes_; b += kLine) __builtin_prefetch(at_ + b, 0, 2);
    }
  }

 private:
  const char* at_;
  int64_t rows_, stride_;
  size_t bytes_;
  int64_t rows_a_part_;
};

template <typename T>
struct Mover {
  using Real = typename Traits<T>::Real;
  static constexpr bool same = std::is_same_v<T, Real>;

  const T* x;
  T* out;
  int64_t tokens_in, tokens_out, channels;
  bool stream;

  // Per thread, reused over its blocks.
  Buffer<Real> slab, between;

  const T* source(int64_t sample, int64_t channel) const { return x + sample * tokens_in * channels + channel; }

  static Blend<Real> taps(const Sparse<Real>& matrix, int64_t r, const Real* base, int64_t stride) {
    const int64_t begin = matrix.start[r];
    return {base, stride, matrix.index.data() + begin, matrix.weight.data() + begin, matrix.start[r + 1] - begin};
  }

  void copy(T* to, const T* from, int64_t count) const { channel_kernels().copy(to, from, count * sizeof(T), stream); }

  // The output tokens [begin, end), whole.
  void move_rows(const Plan<Real>& plan, int64_t sample, int64_t begin, int64_t end) {
    T* to = out + sample * tokens_out * channels;
    for (int64_t o = begin; o < end; ++o) {
      const int32_t i = plan.second.source(o);
      if (i >= 0) {
        copy(to + o * channels, source(sample, 0) + i * channels, channels);
      } else {
        std::memset(to + o * channels, 0, channels * sizeof(T));
      }
    }
  }

  // `count` channels of all tokens. `next`: the slab after this one, or null.
  void move(const Plan<Real>& plan, int64_t sample, int64_t channel, int64_t count, const T* next) {
    const T* from = source(sample, channel);
    T* to = out + sample * tokens_out * channels + channel;
    Prefetch prefetch(next, tokens_in, channels * sizeof(T), count * sizeof(T), tokens_out);
    const Real* base;
    int64_t stride;
    if constexpr (same) {
      base = from;
      stride = channels;
    } else {
      slab.resize(tokens_in * count);
      for (int64_t i = 0; i < tokens_in; ++i) widen(slab.data() + i * count, from + i * channels, count);
      base = slab.data();
      stride = count;
    }
    if (plan.kind == Plan<Real>::Kind::general) {
      for (int64_t o = 0; o < tokens_out; ++o) {
        const int64_t i = plan.second.source(o);
        if (i >= 0) {
          copy(to + o * channels, from + i * channels, count);
        } else {
          blend(to + o * channels, taps(plan.second, o, base, stride), count, stream);
        }
        prefetch.part();
      }
      return;
    }
    // A row of the first axis at a time: what lies between the two passes stays in the first-level cache.
    between.resize(plan.second.columns * count);
    for (int64_t s = 0; s < plan.first.rows(); ++s) {
      for (int64_t q = 0; q < plan.second.columns; ++q) {
        blend(between.data() + q * count, taps(plan.first, s, base + q * plan.q_in * stride, plan.p_in * stride), count,
              false);
      }
      for (int64_t r = 0; r < plan.second.rows(); ++r) {
        T* at = to + (s * plan.s_out + r * plan.r_out) * channels;
        const int64_t p = plan.first.source(s), q = plan.second.source(r);
        if (p >= 0 && q >= 0) {
          copy(at, from + (p * plan.p_in + q * plan.q_in) * channels, count);
        } else {
          blend(at, taps(plan.second, r, between.data(), count), count, stream);
        }
        prefetch.part();
      }
    }
  }
};

template <typename T>
void run(const void* x, const double* linear, const double* offset, void* out, int64_t batch, int64_t channels,
         const Lattices& lattices, const Resampling& resampling, bool transpose, const ParallelFor& parallel) {
  using Real = typename Traits<T>::Real;
  // Samples in an order in which those with the same map follow one another: a thread makes its plan once.
  const auto compare = [&](int64_t a, int64_t b) {
    const int by_linear = std::memcmp(linear + 4 * a, linear + 4 * b, 4 * sizeof(double));
    return by_linear ? by_linear : std::memcmp(offset + 2 * a, offset + 2 * b, 2 * sizeof(double));
  };
  std::vector<int64_t> order(batch);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return compare(a, b) < 0; });

  int64_t tokens_in = lattices.height_in * lattices.width_in, tokens_out = lattices.height_out * lattices.width_out;
  if (transpose) std::swap(tokens_in, tokens_out);
  const int64_t width = block_of(tokens_in), blocks = (channels + width - 1) / width;
  const bool stream = batch * tokens_out * channels * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
  parallel(batch * blocks, [&](int64_t begin, int64_t end) {
    Mover<T> mover{static_cast<const T*>(x), static_cast<T*>(out), tokens_in, tokens_out, channels, stream, {}, {}};
    Plan<Real> plan;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = order[i / blocks], block = i % blocks;
      if (i == begin || (block == 0 && compare(sample, order[i / blocks - 1]))) {
        plan = make_plan<Real>(linear + 4 * sample, offset + 2 * sample, lattices, resampling, transpose);
      }
      if (plan.kind == Plan<Real>::Kind::copy) {  // there is no slab to keep: as many tokens as blocks of channels
        mover.move_rows(plan, sample, block * tokens_out / blocks, (block + 1) * tokens_out / blocks);
        continue;
      }
      const T* next = i + 1 < end ? mover.source(order[(i + 1) / blocks], (i + 1) % blocks * width) : nullptr;
      mover.move(plan, sample, block * width, std::min(width, channels - block * width), next);
    }
    channel_kernels().finish();
  });
}

}  // namespace

void group_action(const void* x, const double* linear, const double* offset, void* out, Type type, int64_t batch,
                  int64_t channels, const Lattices& lattices, const Resampling& resampling, bool transpose,
                  const ParallelFor& parallel) {
  const auto run_as = [&](auto run) {
    run(x, linear, offset, out, batch, channels, lattices, resampling, transpose, parallel);
  };
  switch (type) {
    case Type::float32: return run_as(run<float>);
    case Type::float64: return run_as(run<double>);
    case Type::bfloat16: return run_as(run<bfloat16>);
    case Type::float16: return run_as(run<float16>);
  }
}

}  // namespace ser_fast
