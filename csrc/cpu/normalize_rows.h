// What nt_xent and info_nce do to rows one by one, in one pass over them; Real is float or double.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/parallel.h"

namespace ser_fast {

// Some rows of a matrix: row i is x[index[i]], where the rows of `second` follow the `first_rows` of `first`.
struct IndexedRows {
  const void* first;
  const void* second;
  int64_t first_rows;
  Type type;
  const int64_t* index;
  int64_t count, dim;
};

// u = x / |x| by factors that are safe to square: x = scale max(length, 1) u, and length < 1 only where |x| < 1e-12, or
// for all rows if not `normalize`, with scale 1. A row that holds a NaN or an Inf becomes NaN. scales: (count, 2).
template <typename Real>
void normalize_rows(const IndexedRows& x, bool normalize, Real* u, Real* scales, const ParallelFor& parallel);

// dx = (du - u <u, du>) / |x|, for du = d_u + coefficient other[positive]; dx = du if not normalized, and 0 for a row
// shorter than 1e-12, which has no direction. Writes the rows of the index. `coefficient` may be null.
template <typename Real>
void normalize_rows_backward(const IndexedRows& d_x, const Real* d_u, const Real* u, const Real* scales,
                             const Real* coefficient, const Real* other, const int64_t* positive,
                             const ParallelFor& parallel);

// <u[i], other[positive[i]]>, summed in double.
template <typename Real>
void dot_rows(const Real* u, const Real* other, const int64_t* positive, int64_t count, int64_t dim, double* result,
              const ParallelFor& parallel);

}  // namespace ser_fast
