#include "cpu/normalize_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/buffer.h"
#include "cpu/channel_vectors.h"
#include "cpu/clones.h"

namespace ser_fast {
namespace {

constexpr double kLeastLength = 1e-12;  // as in torch.nn.functional.normalize
constexpr int64_t kLanes = 16;          // independent partial sums: vector code, and always the same order

// largest_of: max |x|, or NaN if x holds an Inf or NaN. squares_of: |x / scale|^2. dot_double: <x, y>.
// divide: out = x / by * factor. add: out = x + factor y.
#define SER_FAST_ROWS(REAL)                                                                       \
  SER_FAST_CLONES REAL largest_of(const REAL* x, int64_t count) {                                 \
    REAL most[kLanes] = {}, poison[kLanes] = {}, result = 0;                                      \
    int64_t c = 0;                                                                                \
    for (; c + kLanes <= count; c += kLanes) {                                                    \
      for (int64_t l = 0; l < kLanes; ++l) {                                                      \
        const REAL size = x[c + l] < 0 ? -x[c + l] : x[c + l];                                    \
        most[l] = most[l] > size ? most[l] : size;                                                \
        poison[l] += size - size; /* 0, or NaN for Inf and NaN */                                 \
      }                                                                                           \
    }                                                                                             \
    for (; c < count; ++c) {                                                                      \
      const REAL size = x[c] < 0 ? -x[c] : x[c];                                                  \
      most[0] = most[0] > size ? most[0] : size;                                                  \
      poison[0] += size - size;                                                                   \
    }                                                                                             \
    for (REAL part : most) result = result > part ? result : part;                                \
    for (REAL part : poison) result += part;                                                      \
    return result;                                                                                \
  }                                                                                               \
  SER_FAST_CLONES REAL squares_of(const REAL* x, REAL scale, int64_t count) {                     \
    REAL sums[kLanes] = {}, result = 0;                                                           \
    int64_t c = 0;                                                                                \
    for (; c + kLanes <= count; c += kLanes) {                                                    \
      for (int64_t l = 0; l < kLanes; ++l) {                                                      \
        const REAL part = x[c + l] / scale;                                                       \
        sums[l] += part * part;                                                                   \
      }                                                                                           \
    }                                                                                             \
    for (; c < count; ++c) result += x[c] / scale * (x[c] / scale);                               \
    for (REAL part : sums) result += part;                                                        \
    return result;                                                                                \
  }                                                                                               \
  SER_FAST_CLONES double dot_double(const REAL* x, const REAL* y, int64_t count) {                \
    double sums[kLanes] = {}, result = 0;                                                         \
    int64_t c = 0;                                                                                \
    for (; c + kLanes <= count; c += kLanes) {                                                    \
      for (int64_t l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(x[c + l]) * y[c + l];   \
    }                                                                                             \
    for (; c < count; ++c) result += static_cast<double>(x[c]) * y[c];                            \
    for (double part : sums) result += part;                                                      \
    return result;                                                                                \
  }                                                                                               \
  SER_FAST_CLONES void divide(REAL* out, const REAL* x, REAL by, REAL factor, int64_t count) {    \
    for (int64_t c = 0; c < count; ++c) out[c] = x[c] / by * factor;                              \
  }                                                                                               \
  SER_FAST_CLONES void add(REAL* out, const REAL* x, REAL factor, const REAL* y, int64_t count) { \
    for (int64_t c = 0; c < count; ++c) out[c] = x[c] + factor * y[c];                            \
  }
SER_FAST_ROWS(float)
SER_FAST_ROWS(double)
#undef SER_FAST_ROWS

const char* row_of(const IndexedRows& x, int64_t i) {
  const int64_t row = x.index[i], bytes = x.dim * bytes_of(x.type);
  return row < x.first_rows ? static_cast<const char*>(x.first) + row * bytes
                            : static_cast<const char*>(x.second) + (row - x.first_rows) * bytes;
}

template <typename Real>
const Real* read(Type type, const char* row, Real* buffer, int64_t count) {
  if constexpr (std::is_same_v<Real, float>) {
    if (type == Type::bfloat16) {
      channel_kernels().widen_bfloat16(buffer, reinterpret_cast<const bfloat16*>(row), count);
      return buffer;
    }
    if (type == Type::float16) {
      channel_kernels().widen_float16(buffer, reinterpret_cast<const float16*>(row), count);
      return buffer;
    }
  }
  return reinterpret_cast<const Real*>(row);
}

}  // namespace

template <typename Real>
void normalize_rows(const IndexedRows& x, bool normalize, Real* u, Real* scales, const ParallelFor& parallel) {
  parallel(x.count, [&](int64_t begin, int64_t end) {
    Buffer<Real> buffer(x.dim);
    for (int64_t i = begin; i < end; ++i) {
      const Real* row = read(x.type, row_of(x, i), buffer.data(), x.dim);
      const Real largest = largest_of(row, x.dim);
      Real scale = 1, length = 0;
      if (largest != largest) {
        scale = largest;
      } else if (normalize) {
        scale = std::max(largest, static_cast<Real>(kLeastLength));
        length = std::sqrt(squares_of(row, scale, x.dim));
      }
      scales[2 * i] = scale;
      scales[2 * i + 1] = length;
      divide(u + i * x.dim, row, scale, 1 / std::max(length, Real(1)), x.dim);
    }
  });
}

template <typename Real>
void normalize_rows_backward(const IndexedRows& d_x, const Real* d_u, const Real* u, const Real* scales,
                             const Real* coefficient, const Real* other, const int64_t* positive,
                             const ParallelFor& parallel) {
  const int64_t dim = d_x.dim;
  parallel(d_x.count, [&](int64_t begin, int64_t end) {
    Buffer<Real> sum(dim);
    for (int64_t i = begin; i < end; ++i) {
      const Real* du = d_u + i * dim;
      const Real scale = scales[2 * i], length = scales[2 * i + 1];
      char* to = const_cast<char*>(row_of(d_x, i));  // these rows are outputs
      if (length < 1 && scale == static_cast<Real>(kLeastLength)) {
        std::memset(to, 0, dim * bytes_of(d_x.type));
        continue;
      }
      if (coefficient) {
        add(sum.data(), du, coefficient[i], other + positive[i] * dim, dim);
        du = sum.data();
      }
      if (length >= 1) {
        add(sum.data(), du, -static_cast<Real>(dot_double(u + i * dim, du, dim)), u + i * dim, dim);
        du = sum.data();
      }
      const Real factor = 1 / std::max(length, Real(1));
      if (d_x.type == Type::bfloat16 || d_x.type == Type::float16) {
        if constexpr (std::is_same_v<Real, float>) {
          divide(sum.data(), du, scale, factor, dim);
          const int32_t self = 0;
          const float one = 1;
          const Blend<float> rounded{sum.data(), 0, &self, &one, 1};
          if (d_x.type == Type::bfloat16) {
            channel_kernels().blend_bfloat16(reinterpret_cast<bfloat16*>(to), rounded, dim, false);
          } else {
            channel_kernels().blend_float16(reinterpret_cast<float16*>(to), rounded, dim, false);
          }
        }
      } else {
        divide(reinterpret_cast<Real*>(to), du, scale, factor, dim);
      }
    }
  });
}

template <typename Real>
void dot_rows(const Real* u, const Real* other, const int64_t* positive, int64_t count, int64_t dim, double* result,
              const ParallelFor& parallel) {
  parallel(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) result[i] = dot_double(u + i * dim, other + positive[i] * dim, dim);
  });
}

template void normalize_rows(const IndexedRows&, bool, float*, float*, const ParallelFor&);
template void normalize_rows(const IndexedRows&, bool, double*, double*, const ParallelFor&);
template void normalize_rows_backward(const IndexedRows&, const float*, const float*, const float*, const float*,
                                      const float*, const int64_t*, const ParallelFor&);
template void normalize_rows_backward(const IndexedRows&, const double*, const double*, const double*, const double*,
                                      const double*, const int64_t*, const ParallelFor&);
template void dot_rows(const float*, const float*, const int64_t*, int64_t, int64_t, double*, const ParallelFor&);
template void dot_rows(const double*, const double*, const int64_t*, int64_t, int64_t, double*, const ParallelFor&);

}  // namespace ser_fast
