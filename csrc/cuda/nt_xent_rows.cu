// A warp owns a row, and reads it two or three times: it is in the first-level cache after the first. What has one
// number a row is in double.

#include "cuda/nt_xent_rows.h"

#include <algorithm>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/nt_xent_operands.h"
#include "cuda/warp.h"

namespace ser_fast::cuda {
namespace {

constexpr int kWarps = 4;               // of a block
constexpr int kPrepareWarps = 8;        // of a block that has a span
constexpr double kLeastLength = 1e-12;  // as in torch.nn.functional.normalize
constexpr double kLn2 = 0.693147180559945309417232121458;

__device__ int lane() { return threadIdx.x % 32; }

template <typename T>
struct InputRow;

template <typename T>
struct InputRows {
  const T *x0, *x1;
  int64_t split, count;
  int columns;
  bool normalize, wide;  // wide: every row begins at a multiple of 16 bytes, and is one

  __device__ InputRow<T> operator[](int64_t r) const;
  // A row that is here: indices are data, which nothing looks at before they are used.
  __device__ int64_t inside(int64_t r) const { return r < 0 ? 0 : r < count ? r : count - 1; }
};

// x = u / (inverse factor). Numbers are scaled by a power of two before they are squared, and that is exact.
template <typename T>
struct InputRow {
  using Real = Accumulator<T>;
  static constexpr int N = kChunk<T>;

  const T* x;
  int columns;
  bool wide;
  Real inverse = 1, factor = 1;
  bool radial = false;  // the gradient along u is lost
  bool flat = false;    // shorter than kLeastLength: no direction, and no gradient

  // visit(c) for the first column of each chunk of this lane.
  template <typename Visit>
  __device__ void for_each_chunk(const Visit& visit) const {
    for (int c = lane() * N; c < columns; c += 32 * N) visit(c);
  }

  // The columns from c on, NaN for Inf.
  __device__ void load_scaled(int c, Real (&to)[N]) const {
    load(to, x + c, columns - c, wide);
#pragma unroll
    for (Real& value : to) value = fabs(value) < INFINITY ? value * inverse : static_cast<Real>(NAN);
  }
  __device__ void load_unit(int c, Real (&to)[N]) const {
    load_scaled(c, to);
#pragma unroll
    for (Real& value : to) value *= factor;
  }

  __device__ void measure() {
    Real largest = static_cast<Real>(kLeastLength), squares = 0;
    for_each_chunk([&](int c) {
      Real values[N];
      load_scaled(c, values);
      for (Real value : values) largest = fmax(largest, fabs(value));  // not NaN
    });
    inverse = scalbn(Real{1}, -ilogb(warp_max(largest)));
    for_each_chunk([&](int c) {
      Real values[N];
      load_scaled(c, values);
      for (Real value : values) squares += value * value;
    });
    const Real length = sqrt(warp_sum(squares)), least = static_cast<Real>(kLeastLength) * inverse;
    flat = length < least;
    radial = !flat;
    factor = 1 / (radial ? length : least);
  }
};

template <typename T>
__device__ InputRow<T> InputRows<T>::operator[](int64_t r) const {
  InputRow<T> row{r < split ? x0 + r * columns : x1 + (r - split) * columns, columns, wide};
  if (normalize) row.measure();
  return row;
}

// <u, v>
template <typename T>
__device__ double dot(const InputRow<T>& u, const InputRow<T>& v) {
  double sum = 0;
  u.for_each_chunk([&](int c) {
    Accumulator<T> a[kChunk<T>], b[kChunk<T>];
    u.load_scaled(c, a);
    v.load_scaled(c, b);
    for (int i = 0; i < kChunk<T>; ++i) sum += static_cast<double>(a[i]) * b[i];
  });
  return warp_sum(sum) * u.factor * v.factor;
}

template <typename T>
struct Pairs {
  InputRows<T> queries, keys;
  bool views;
  const int64_t *of, *table;
  int64_t padded;
  double inverse;  // 1 / temperature
  float scale;     // the same in base 2, as tiles have it

  __device__ bool take(int64_t r) const { return r < queries.count && table[padded + r] != 0; }
  __device__ InputRow<T> positive(int64_t r) const {
    if (views) return keys[r < queries.split ? r + queries.split : r - queries.split];
    return keys[keys.inside(of[r])];
  }
};

__device__ double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }  // 0 at -inf, NaN at NaN

// The logarithm, to base 2, of a row's sum over the negatives.
__device__ double log2_of(double total, double row_max) { return total == 0 ? -INFINITY : log2(total) + row_max; }

__device__ double log2_sum(const int64_t* sums, int64_t r, int64_t padded, double row_max) {
  if (sums[3 * padded + r] != 0) return NAN;
  return log2_of(sums[r] * 0x1p-42 + sums[padded + r] * 0x1p-70 + sums[2 * padded + r] * 0x1p-98, row_max);
}

template <typename Real>
__device__ double log2_sum(const Real* state, int64_t r, int64_t padded, int splits) {
  double row_max = -INFINITY, total = 0;
  for (int split = 0; split < splits; ++split) {
    const double part = state[split * padded + r], sums = state[(splits + split) * padded + r];
    const double higher = fmax(row_max, part), shift = higher == -INFINITY ? 0 : higher;
    total = total * exp2(row_max - shift) + sums * exp2(part - shift);
    row_max = higher;
  }
  return log2_of(total, row_max);
}

// ------------------------------------------------------------------------------------------------ operands

template <typename T, typename U>
__global__ void __launch_bounds__(kPrepareWarps * 32)
    prepare_kernel(InputRows<T> rows, const int64_t* image, const bool* valid, U* u, int64_t padded, int dim,
                   int64_t* table) {
  constexpr int N = kChunk<T>;
  const auto take = [&](int64_t r) { return r < rows.count && valid[r < rows.split ? r : r - rows.split]; };
  const int64_t span = blockIdx.x;
  if (threadIdx.x < 32) {
    const int64_t r = span * kSpan + lane(), takes_part = take(r);
    const int64_t of = r < rows.count ? image[r < rows.split ? r : r - rows.split] : 0;
    table[r] = of;
    table[padded + r] = takes_part;
    const int64_t lowest = warp_min(of), highest = warp_max(of), all = warp_min(takes_part);
    if (lane() == 0) {
      int64_t* at = table + 2 * padded + span;
      at[0] = lowest;
      at[padded / kSpan] = highest;
      at[2 * (padded / kSpan)] = all;
    }
  }
  for (int64_t r = span * kSpan + threadIdx.x / 32; r < (span + 1) * kSpan; r += kPrepareWarps) {
    const bool taken = take(r);
    InputRow<T> row{};
    if (taken) row = rows[r];
    for (int c = lane() * N; c < dim; c += 32 * N) {
      Accumulator<T> values[N] = {};
      if (taken && c < rows.columns) row.load_unit(c, values);
      store(u + r * dim + c, values, N, true);
    }
  }
}

// ------------------------------------------------------------------------------------------------ one number a row

template <typename T>
__global__ void __launch_bounds__(kWarps * 32, 8)
    losses_kernel(Pairs<T> pairs, const void* state, bool summed, int splits, Accumulator<T>* loss) {
  const int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (r >= pairs.queries.count) return;
  double result = 0;
  if (pairs.take(r)) {
    const double s = dot(pairs.queries[r], pairs.positive(r)) * pairs.inverse;
    const double negatives =
        summed ? log2_sum(static_cast<const int64_t*>(state), r, pairs.padded, static_cast<double>(pairs.scale))
               : log2_sum(static_cast<const Accumulator<T>*>(state), r, pairs.padded, splits);
    result = softplus(negatives * kLn2 - s);
  }
  if (lane() == 0) loss[r] = static_cast<Accumulator<T>>(result);
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    gradient_weights_kernel(Pairs<T> pairs, const Accumulator<T>* weight, const Accumulator<T>* largest,
                            const Accumulator<T>* loss, bool bounded, bool library, Accumulator<T>* out) {
  using Real = Accumulator<T>;
  const int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (r >= pairs.padded) return;
  double a = 0, shift = 0, positive_gradient = 0;
  if (pairs.take(r)) {
    const double s = dot(pairs.queries[r], pairs.positive(r)) * pairs.inverse;
    const double value = loss[r], w = weight[r], most = library ? kLargestWeight : *largest, exact = (s + value) / kLn2;
    positive_gradient = w * expm1(-value) * pairs.inverse;
    shift = bounded ? pairs.scale : static_cast<Real>(exact);
    a = w / (most == 0 ? 1 : most) * kLargestWeight * exp2(shift - exact);  // with what rounding took from the shift
  }
  if (lane() == 0) {
    out[r] = static_cast<Real>(a);
    out[pairs.padded + r] = static_cast<Real>(shift);
    out[2 * pairs.padded + r] = static_cast<Real>(positive_gradient);
  }
}

// ------------------------------------------------------------------------------------------------ gradients

// Shared memory for a row's gradient in its unit row, of which each lane has its own columns.
template <typename T>
struct UnitGradient {
  static constexpr int N = kChunk<T>;
  using Real = Accumulator<T>;
  Real* g;

  __device__ explicit UnitGradient(int columns) {
    g = reinterpret_cast<Real*>(shared_memory()) + threadIdx.x / 32 * ((columns + N - 1) / N * N);
    for (int c = lane() * N; c < columns; c += 32 * N) {
      for (int i = 0; i < N; ++i) g[c + i] = 0;
    }
  }
  // Adds a row of G k, which reaches past the last column to a multiple of 64.
  __device__ void add(Real factor, const Real* part, int columns) {
    for (int c = lane() * N; c < columns; c += 32 * N) {
      Real values[N];
      load(values, part + c, N, true);
      for (int i = 0; i < N; ++i) g[c + i] += factor * values[i];
    }
  }
  __device__ void add(Real factor, const InputRow<T>& row) {
    row.for_each_chunk([&](int c) {
      Real values[N];
      row.load_unit(c, values);
      for (int i = 0; i < N; ++i) g[c + i] += factor * values[i];
    });
  }
  // The gradient in `row` itself: what points along u is lost.
  template <typename Out>
  __device__ void store_in(const InputRow<T>& row, Out* to, bool wide) const {
    Real along = 0;
    if (row.radial) {
      row.for_each_chunk([&](int c) {
        Real u[N];
        row.load_unit(c, u);
        for (int i = 0; i < N; ++i) along += u[i] * g[c + i];
      });
      along = warp_sum(along);
    }
    row.for_each_chunk([&](int c) {
      Real values[N];
      row.load_unit(c, values);
      for (int i = 0; i < N; ++i) {
        if (row.flat) g[c + i] = 0;
        values[i] = (row.radial ? g[c + i] - values[i] * along : g[c + i]) * row.factor * row.inverse;
      }
      store(to + c, values, row.columns - c, wide);
    });
  }
};

template <typename T, typename Out>
__device__ void store_nothing(Out* to, int columns, bool wide) {
  constexpr int N = kChunk<T>;
  for (int c = lane() * N; c < columns; c += 32 * N) {
    const Accumulator<T> nothing[N] = {};
    store(to + c, nothing, columns - c, wide);
  }
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kWarps * 32, 6)
    finish_gradient_kernel(InputRows<T> x, InputRows<T> y, const int64_t* table, int64_t padded, Gradient of,
                           double inverse, Out* d_x0, Out* d_x1, bool wide) {
  using Real = Accumulator<T>;
  const int64_t r = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (r >= x.count) return;
  Out* to = r < x.split ? d_x0 + r * x.columns : d_x1 + (r - x.split) * x.columns;
  if (table[padded + r] == 0) {
    store_nothing<T>(to, x.columns, wide);
    return;
  }
  const Real* positive_gradient = static_cast<const Real*>(of.weights) + 2 * of.weights_padded;
  const Real unit =
      static_cast<Real>(of.library ? inverse : inverse * (*static_cast<const Real*>(of.largest) / kLargestWeight));
  UnitGradient<T> g(x.columns);
  for (int64_t split = 0; split < of.splits; ++split) {
    g.add(unit, static_cast<const Real*>(of.accumulated) + (split * padded + r) * of.dim, x.columns);
  }
  if (of.side == Side::key) {
    const int64_t begin = max(of.first[r], int64_t{0}), end = min(of.first[r + 1], y.count);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t t = y.inside(of.order[k]);
      g.add(positive_gradient[t], y[t]);
    }
  } else if (of.side == Side::query) {
    g.add(positive_gradient[r], y[y.inside(of.positive[r])]);
  } else {
    const int64_t p = r < x.split ? r + x.split : r - x.split;
    g.add(positive_gradient[r] + positive_gradient[p], y[p]);
  }
  g.store_in(x[r], to, wide);
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    finish_detached_kernel(Pairs<T> pairs, const float* state, const float* accumulated, int splits, int dim,
                           float* loss, float* gradient, bool wide) {
  const int64_t r = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  const int columns = pairs.queries.columns;
  if (r >= pairs.queries.count) return;
  float* to = gradient + r * columns;
  if (!pairs.take(r)) {
    if (lane() == 0) loss[r] = 0;
    store_nothing<T>(to, columns, wide);
    return;
  }
  const InputRow<T> query = pairs.queries[r], positive = pairs.positive(r);
  const double negatives = log2_sum(state, r, pairs.padded, splits);
  const double value = softplus(negatives * kLn2 - dot(query, positive) * pairs.inverse);
  const double positive_gradient = expm1(-value) * pairs.inverse;
  if (lane() == 0) loss[r] = static_cast<float>(value);

  UnitGradient<T> g(columns);
  for (int split = 0; split < splits; ++split) {
    const double share = negatives == -INFINITY ? 0 : exp2(state[split * pairs.padded + r] - negatives);
    g.add(static_cast<float>(-positive_gradient * share), accumulated + (split * pairs.padded + r) * dim, columns);
  }
  g.add(static_cast<float>(positive_gradient), positive);
  g.store_in(query, to, wide);
}

// ------------------------------------------------------------------------------------------------ launches

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
InputRows<T> rows_of(const RowSet& rows, bool normalize) {
  const bool wide = aligned(rows.x0) && aligned(rows.x1) && rows.columns % kChunk<T> == 0;
  return {static_cast<const T*>(rows.x0),
          static_cast<const T*>(rows.x1),
          rows.split,
          rows.count,
          static_cast<int>(rows.columns),
          normalize,
          wide};
}

template <typename T>
Pairs<T> pairs_of(const Positives& p) {
  return {rows_of<T>(p.queries, p.normalize),
          rows_of<T>(p.keys, p.normalize),
          p.views,
          p.of,
          p.table,
          p.padded,
          1 / p.temperature,
          static_cast<float>(1 / (p.temperature * kLn2))};
}

// A warp a row.
template <typename Kernel, typename... Arguments>
const char* launch_rows(Kernel kernel, int64_t rows, void* stream, Arguments... arguments) {
  return launch(kernel, (rows + kWarps - 1) / kWarps, kWarps * 32, 0, stream, arguments...);
}

// The same with shared memory for a row of T's accumulators for each warp.
template <typename T, typename Kernel, typename... Arguments>
const char* launch_with_shared(Kernel kernel, int64_t rows, int64_t columns, void* stream, Arguments... arguments) {
  constexpr int64_t kBytes = 48 << 10;  // bytes of shared memory that every device has
  const int64_t chunks = (columns + kChunk<T> - 1) / kChunk<T>;
  const int64_t bytes = chunks * kChunk<T> * static_cast<int64_t>(sizeof(Accumulator<T>));
  const int64_t warps = std::clamp<int64_t>(kBytes / std::max<int64_t>(bytes, 1), 1, kWarps);
  return launch(kernel, (rows + warps - 1) / warps, static_cast<int>(warps * 32), warps * bytes, stream, arguments...);
}

}  // namespace

const char* prepare(const RowSet& rows, Type type, bool normalize, const int64_t* image, const bool* valid, void* u,
                    Type u_type, int64_t padded, int64_t dim, int64_t* table, void* stream) {
  return with_type(type, [&](auto of) {
    using T = decltype(of);
    const auto run = [&](auto* to) {
      return launch(prepare_kernel<T, std::remove_pointer_t<decltype(to)>>, padded / kSpan, kPrepareWarps * 32, 0,
                    stream, rows_of<T>(rows, normalize), image, valid, to, padded, static_cast<int>(dim), table);
    };
    if constexpr (sizeof(T) == 2) {
      if (u_type == Type::float16) return run(static_cast<float16*>(u));
    }
    return run(static_cast<Accumulator<T>*>(u));
  });
}

const char* losses(const Positives& p, const void* state, bool summed, int64_t splits, void* loss, void* stream) {
  return with_type(p.type, [&](auto of) {
    using T = decltype(of);
    return launch_rows(losses_kernel<T>, p.queries.count, stream, pairs_of<T>(p), state, summed,
                       static_cast<int>(splits), static_cast<Accumulator<T>*>(loss));
  });
}

const char* gradient_weights(const Positives& p, const void* weight, const void* largest, const void* loss,
                             bool bounded, bool library, void* out, void* stream) {
  return with_type(p.type, [&](auto of) {
    using T = decltype(of);
    using Real = Accumulator<T>;
    return launch_rows(gradient_weights_kernel<T>, p.padded, stream, pairs_of<T>(p), static_cast<const Real*>(weight),
                       static_cast<const Real*>(largest), static_cast<const Real*>(loss), bounded, library,
                       static_cast<Real*>(out));
  });
}

const char* finish_gradient(const RowSet& x, const RowSet& y, Type type, bool normalize, const int64_t* table,
                            int64_t padded, const Gradient& of, double temperature, void* d_x0, void* d_x1, Type d_type,
                            void* stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto* to) {
      using Out = std::remove_pointer_t<decltype(to)>;
      const bool wide = aligned(d_x0) && aligned(d_x1) && x.columns % kChunk<T> == 0;
      return launch_with_shared<T>(finish_gradient_kernel<T, Out>, x.count, x.columns, stream, rows_of<T>(x, normalize),
                                   rows_of<T>(y, normalize), table, padded, of, 1 / temperature, to,
                                   static_cast<Out*>(d_x1), wide);
    };
    if (d_type == type) return run(static_cast<T*>(d_x0));
    return run(static_cast<Accumulator<T>*>(d_x0));
  });
}

const char* finish_detached(const Positives& p, const float* state, const float* accumulated, int64_t splits,
                            int64_t dim, float* loss, float* gradient, void* stream) {
  return with_type(p.type, [&](auto of) {
    using T = decltype(of);
    if constexpr (sizeof(T) == 2) {
      const bool wide = aligned(gradient) && p.queries.columns % kChunk<T> == 0;
      return launch_with_shared<T>(finish_detached_kernel<T>, p.queries.count, p.queries.columns, stream,
                                   pairs_of<T>(p), state, accumulated, static_cast<int>(splits), static_cast<int>(dim),
                                   loss, gradient, wide);
    } else {
      return "a type without a kernel";
    }
  });
}

}  // namespace ser_fast::cuda
