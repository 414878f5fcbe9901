// What nt_xent and info_nce do to rows one by one, in one pass over them; Real is float or double.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace ser_fast {

// Row i is x[index[i]], where the rows of `second` follow the `first_rows` of `first`.
struct Selection {
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
void embed(const Selection& x, bool normalize, Real* u, Real* scales, const ParallelFor& parallel);

// dx = (du - u <u, du>) / |x|, without the second term where length < 1, for du = d_u + coefficient other[partner].
// Writes the rows of the index. `coefficient` may be null.
template <typename Real>
void embed_backward(const Selection& d_x, const Real* d_u, const Real* u, const Real* scales, const Real* coefficient,
                    const Real* other, const int64_t* partner, const ParallelFor& parallel);

// <u[i], other[partner[i]]>, summed in double.
template <typename Real>
void dot_rows(const Real* u, const Real* other, const int64_t* partner, int64_t count, int64_t dim, double* result,
              const ParallelFor& parallel);

}  // namespace ser_fast
