// One pass over memory: a thread takes (sample, channel block), whose slab of tokens fits its second-level cache, and
// writes each output token once, as a weighted sum of slab rows.
//
//   copy       D4, nearest, whole shifts: rows are moved, bit for bit.
//   separable  maps along the axes (D4 with scales, SER's own family): taps of x, then taps of y: 4 + 4, not 4 x 4.
//   general    any affine map: one list of taps a token.
//
// The transpose (the gradient) runs the same loops over the transposed lists: no atomics, and the same sums in the same
// order for any number of threads. Samples with the same map share its lists.

#include "group_action.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "clones.h"

namespace ser_fast {
namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { _Float16 value; };

// ------------------------------------------------------------------------------------------------ rows

// out[c] = sum over taps of weight[t] rows[t][c]. 64 channels at a time stay in registers over all taps.
#define SER_FAST_BLEND(NAME, REAL)                                                                        \
  SER_FAST_CLONES void NAME(REAL* out, const REAL* const* rows, const REAL* weight, int64_t taps,         \
                            int64_t channels) {                                                           \
    typedef REAL Vector __attribute__((vector_size(64), aligned(alignof(REAL)), may_alias));              \
    constexpr int64_t lanes = 64 / sizeof(REAL);                                                          \
    int64_t c = 0;                                                                                        \
    for (; c + 4 * lanes <= channels; c += 4 * lanes) {                                                   \
      Vector s0{}, s1{}, s2{}, s3{};                                                                      \
      for (int64_t t = 0; t < taps; ++t) {                                                                \
        const Vector* row = reinterpret_cast<const Vector*>(rows[t] + c);                                 \
        const REAL w = weight[t];                                                                         \
        s0 += w * row[0];                                                                                 \
        s1 += w * row[1];                                                                                 \
        s2 += w * row[2];                                                                                 \
        s3 += w * row[3];                                                                                 \
      }                                                                                                   \
      Vector* to = reinterpret_cast<Vector*>(out + c);                                                    \
      to[0] = s0;                                                                                         \
      to[1] = s1;                                                                                         \
      to[2] = s2;                                                                                         \
      to[3] = s3;                                                                                         \
    }                                                                                                     \
    for (; c < channels; ++c) {                                                                           \
      REAL sum = 0;                                                                                       \
      for (int64_t t = 0; t < taps; ++t) sum += weight[t] * rows[t][c];                                   \
      out[c] = sum;                                                                                       \
    }                                                                                                     \
  }
SER_FAST_BLEND(blend_float, float)
SER_FAST_BLEND(blend_double, double)
#undef SER_FAST_BLEND

void blend(float* out, const float* const* rows, const float* weight, int64_t taps, int64_t channels) {
  blend_float(out, rows, weight, taps, channels);
}
void blend(double* out, const double* const* rows, const double* weight, int64_t taps, int64_t channels) {
  blend_double(out, rows, weight, taps, channels);
}

SER_FAST_CLONES void widen_bfloat16(float* out, const uint16_t* in, int64_t count) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(in[i]) << 16;
}

// To the nearest, ties to even; NaN stays NaN.
SER_FAST_CLONES void narrow_bfloat16(uint16_t* out, const float* in, int64_t count) {
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(in);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rounded = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
    const bool nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

void widen(float* out, const bfloat16* in, int64_t count) {
  widen_bfloat16(out, reinterpret_cast<const uint16_t*>(in), count);
}
void narrow(bfloat16* out, const float* in, int64_t count) {
  narrow_bfloat16(reinterpret_cast<uint16_t*>(out), in, count);
}
void widen(float* out, const float16* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i].value);
}
void narrow(float16* out, const float* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i].value = static_cast<_Float16>(in[i]);
}

// ------------------------------------------------------------------------------------------------ plans

// What a map does to a slab. Token (p, q) of x is row p * p_in + q * q_in; token (s, r) of out is row s * s_out + r * r_out.
struct Plan {
  enum class Kind { copy, separable, general } kind;
  Sparse first;   // separable: (r, q), applied to each p
  Sparse second;  // separable: (s, p); copy and general: (out token, in token)
  int64_t p_in = 0, q_in = 0, s_out = 0, r_out = 0;
};

Plan make_plan(const double* linear, const double* offset, const Lattices& n, const Resampling& how, bool transpose) {
  const int64_t size_in[2] = {n.height_in, n.width_in}, size_out[2] = {n.height_out, n.width_out};
  const double step[2] = {std::hypot(linear[0], linear[1]), std::hypot(linear[2], linear[3])};
  bool exact = step[0] == 1 && step[1] == 1;
  for (int i = 0; i < 4; ++i) exact = exact && (linear[i] == 0 || std::abs(linear[i]) == 1);
  const bool straight = linear[1] == 0 && linear[2] == 0, turned = linear[0] == 0 && linear[3] == 0;

  Plan plan;
  if (straight || turned) {
    // Input y follows output axis 0, or 1 after a quarter turn; input x the other one.
    Sparse axes[2];
    for (int axis = 0; axis < 2; ++axis) {
      const int along = turned ? 1 - axis : axis;
      axes[axis].columns = size_in[axis];
      for (int64_t i = 0; i < size_out[along]; ++i) {
        const double position = linear[2 * axis + along] * (i + 0.5 - size_out[along] / 2.0) + offset[axis] + size_in[axis] / 2.0;
        append_row(axes[axis], position, step[axis], exact, size_in[axis], how);
      }
    }
    if (transpose) {
      plan.first = axes[1].transposed();
      plan.second = axes[0].transposed();
      plan.p_in = turned ? 1 : n.width_out;
      plan.q_in = turned ? n.width_out : 1;
      plan.s_out = n.width_in;
      plan.r_out = 1;
    } else {
      plan.first = std::move(axes[1]);
      plan.second = std::move(axes[0]);
      plan.p_in = n.width_in;
      plan.q_in = 1;
      plan.s_out = turned ? 1 : n.width_out;
      plan.r_out = turned ? n.width_out : 1;
    }
    plan.kind = Plan::Kind::separable;
    if (!plan.first.copies() || !plan.second.copies()) return plan;
    // One list of whole rows to move.
    Sparse moves;
    moves.columns = plan.first.columns * plan.second.columns;
    const int64_t rows = plan.first.rows() * plan.second.rows();
    std::vector<int32_t> source(rows, -1);
    for (int64_t s = 0; s < plan.second.rows(); ++s) {
      for (int64_t r = 0; r < plan.first.rows(); ++r) {
        const int64_t i = plan.second.start[s], j = plan.first.start[r];
        if (i == plan.second.start[s + 1] || j == plan.first.start[r + 1]) continue;
        source[s * plan.s_out + r * plan.r_out] =
            static_cast<int32_t>(plan.second.index[i] * plan.p_in + plan.first.index[j] * plan.q_in);
      }
    }
    for (int64_t o = 0; o < rows; ++o) {
      if (source[o] >= 0) {
        moves.index.push_back(source[o]);
        moves.weight.push_back(1);
      }
      moves.start.push_back(static_cast<int64_t>(moves.index.size()));
    }
    plan.kind = Plan::Kind::copy;
    plan.second = std::move(moves);
    return plan;
  }

  Sparse full;
  full.columns = size_in[0] * size_in[1];
  for (int64_t i = 0; i < size_out[0]; ++i) {
    for (int64_t j = 0; j < size_out[1]; ++j) {
      const double v[2] = {i + 0.5 - size_out[0] / 2.0, j + 0.5 - size_out[1] / 2.0};
      Sparse axes[2];
      for (int axis = 0; axis < 2; ++axis) {
        const double position = linear[2 * axis] * v[0] + linear[2 * axis + 1] * v[1] + offset[axis] + size_in[axis] / 2.0;
        append_row(axes[axis], position, step[axis], exact, size_in[axis], how);
      }
      for (size_t a = 0; a < axes[0].index.size(); ++a) {
        for (size_t b = 0; b < axes[1].index.size(); ++b) {
          full.index.push_back(static_cast<int32_t>(axes[0].index[a] * size_in[1] + axes[1].index[b]));
          full.weight.push_back(axes[0].weight[a] * axes[1].weight[b]);
        }
      }
      full.start.push_back(static_cast<int64_t>(full.index.size()));
    }
  }
  plan.second = transpose ? full.transposed() : std::move(full);
  plan.kind = plan.second.copies() ? Plan::Kind::copy : Plan::Kind::general;
  return plan;
}

// ------------------------------------------------------------------------------------------------ the mover

constexpr int64_t kBlock = 256;  // channels: a 14 x 14 slab of float32 is 200 KB

template <typename T, typename Real>
struct Mover {
  const T* x;
  T* out;
  int64_t tokens_in, tokens_out, channels;

  // Per thread, reused over its blocks.
  std::vector<Real> slab, between, row;
  std::vector<const Real*> rows;
  std::vector<Real> weight;

  void sum(const Sparse& matrix, int64_t r, const Real* base, int64_t stride, Real* to, int64_t count) {
    rows.clear();
    weight.clear();
    for (int64_t t = matrix.start[r]; t < matrix.start[r + 1]; ++t) {
      rows.push_back(base + matrix.index[t] * stride);
      weight.push_back(static_cast<Real>(matrix.weight[t]));
    }
    blend(to, rows.data(), weight.data(), static_cast<int64_t>(rows.size()), count);
  }

  // Output token: summed in place, or in `row` and rounded once.
  void token(const Sparse& matrix, int64_t r, const Real* base, int64_t stride, T* to, int64_t count) {
    if constexpr (std::is_same_v<T, Real>) {
      sum(matrix, r, base, stride, to, count);
    } else {
      row.resize(kBlock);
      sum(matrix, r, base, stride, row.data(), count);
      narrow(to, row.data(), count);
    }
  }

  void move(const Plan& plan, int64_t sample, int64_t begin, int64_t count) {
    const T* from = x + sample * tokens_in * channels + begin;
    T* to = out + sample * tokens_out * channels + begin;
    if (plan.kind == Plan::Kind::copy) {
      for (int64_t o = 0; o < tokens_out; ++o) {
        const int64_t t = plan.second.start[o];
        if (t == plan.second.start[o + 1]) {
          std::memset(to + o * channels, 0, count * sizeof(T));
        } else {
          std::memcpy(to + o * channels, from + plan.second.index[t] * channels, count * sizeof(T));
        }
      }
      return;
    }
    const Real* base;
    int64_t stride;
    if constexpr (std::is_same_v<T, Real>) {
      base = from;
      stride = channels;
    } else {
      slab.resize(tokens_in * kBlock);
      for (int64_t i = 0; i < tokens_in; ++i) widen(slab.data() + i * count, from + i * channels, count);
      base = slab.data();
      stride = count;
    }
    if (plan.kind == Plan::Kind::general) {
      for (int64_t o = 0; o < tokens_out; ++o) {
        const int64_t i = plan.second.source(o);
        if (i >= 0) {
          std::memcpy(to + o * channels, from + i * channels, count * sizeof(T));
        } else {
          token(plan.second, o, base, stride, to + o * channels, count);
        }
      }
      return;
    }
    const int64_t across = plan.first.rows();
    between.resize(plan.second.columns * across * kBlock);
    for (int64_t p = 0; p < plan.second.columns; ++p) {
      for (int64_t r = 0; r < across; ++r) {
        sum(plan.first, r, base + p * plan.p_in * stride, plan.q_in * stride, between.data() + (p * across + r) * count, count);
      }
    }
    for (int64_t s = 0; s < plan.second.rows(); ++s) {
      for (int64_t r = 0; r < across; ++r) {
        T* at = to + (s * plan.s_out + r * plan.r_out) * channels;
        const int64_t p = plan.second.source(s), q = plan.first.source(r);
        if (p >= 0 && q >= 0) {
          std::memcpy(at, from + (p * plan.p_in + q * plan.q_in) * channels, count * sizeof(T));
        } else {
          token(plan.second, s, between.data() + r * count, across * count, at, count);
        }
      }
    }
  }
};

template <typename T, typename Real>
void run(const void* x, void* out, const std::vector<const Plan*>& plans, int64_t tokens_in, int64_t tokens_out,
         int64_t channels, const ParallelFor& parallel) {
  // Copies have no slab to keep: their rows are moved whole.
  bool copies = true;
  for (const Plan* plan : plans) copies = copies && plan->kind == Plan::Kind::copy;
  const int64_t width = copies ? std::max<int64_t>(channels, 1) : kBlock;
  const int64_t blocks = (channels + width - 1) / width;
  parallel(static_cast<int64_t>(plans.size()) * blocks, [&](int64_t begin, int64_t end) {
    Mover<T, Real> mover{static_cast<const T*>(x), static_cast<T*>(out), tokens_in, tokens_out, channels, {}, {}, {}, {}, {}};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, first = i % blocks * width;
      mover.move(*plans[sample], sample, first, std::min(width, channels - first));
    }
  });
}

}  // namespace

void group_action(const void* x, const double* linear, const double* offset, void* out, Type type, int64_t batch,
                  int64_t channels, const Lattices& lattices, const Resampling& how, bool transpose,
                  const ParallelFor& parallel) {
  std::map<std::array<double, 6>, std::unique_ptr<Plan>> cache;
  std::vector<Plan*> plans(batch);
  std::vector<std::pair<Plan*, int64_t>> distinct;
  for (int64_t b = 0; b < batch; ++b) {
    std::array<double, 6> key;
    std::copy(linear + 4 * b, linear + 4 * b + 4, key.begin());
    std::copy(offset + 2 * b, offset + 2 * b + 2, key.begin() + 4);
    std::unique_ptr<Plan>& plan = cache[key];
    if (!plan) {
      plan = std::make_unique<Plan>();
      distinct.emplace_back(plan.get(), b);
    }
    plans[b] = plan.get();
  }
  parallel(static_cast<int64_t>(distinct.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = distinct[i].second;
      *distinct[i].first = make_plan(linear + 4 * b, offset + 2 * b, lattices, how, transpose);
    }
  });

  int64_t tokens_in = lattices.height_in * lattices.width_in, tokens_out = lattices.height_out * lattices.width_out;
  if (transpose) std::swap(tokens_in, tokens_out);
  const std::vector<const Plan*> ready(plans.begin(), plans.end());
  switch (type) {
    case Type::float32: return run<float, float>(x, out, ready, tokens_in, tokens_out, channels, parallel);
    case Type::float64: return run<double, double>(x, out, ready, tokens_in, tokens_out, channels, parallel);
    case Type::bfloat16: return run<bfloat16, float>(x, out, ready, tokens_in, tokens_out, channels, parallel);
    case Type::float16: return run<float16, float>(x, out, ready, tokens_in, tokens_out, channels, parallel);
  }
}

}  // namespace ser_fast
