// What nt_xent and info_nce do to rows one by one (ser_fast/ops has the mathematics).
//
// Real is double for float64 rows and float for others: the type of losses, states, weights and of what is
// accumulated. Pointers of the current device. All return what went wrong, or null; none waits for the device.
#pragma once

#include <cstdint>

#include "common/tiles.h"
#include "common/types.h"

namespace ser_fast::cuda {

// Rows [x0; x1] of so many columns, x0 the first `split` of `count`.
struct RowSet {
  const void *x0, *x1;
  int64_t split, count, columns;
};

// Which rows losses are of, and what holds for the positives.
struct Positives {
  RowSet queries, keys;
  Type type;              // of both
  bool normalize, views;  // views: of the same rows, and row r's is in the other view
  const int64_t* of;      // (count,), the key of each query, unless views
  const int64_t* table;   // of the queries, as `prepare` writes it
  int64_t padded;
  double temperature;
};

// u (padded, dim): the rows over max(|x|, 1e-12) if `normalize`, and 0 where not valid or past the last row or column;
// NaN for Inf. table (2 padded + 3 padded / 32,): image and valid of each row, and of each 32 rows the lowest image,
// the highest, and whether all are valid. image, valid: of the rows x0, and of x1. u_type: float16, or Real. u and what
// is accumulated begin at multiples of 16 bytes, and dim is a multiple of 64.
const char* prepare(const RowSet& rows, Type type, bool normalize, const int64_t* image, const bool* valid, void* u,
                    Type u_type, int64_t padded, int64_t dim, int64_t* table, void* stream);

// loss (count,) = log(1 + e^(log-sum of the negatives - s of the positive)). state: the integers (4, padded) of
// symmetric_sums if `summed`, else Real (2, splits, padded): maxima and sums, in base 2.
const char* losses(const Positives& p, const void* state, bool summed, int64_t splits, void* loss, void* stream);

// out (3, padded): a and its shift, G_ij = a_i 2^(c s_ij - shift_i), and the weight of the positive. Unless `library`,
// a is in units that make `largest`, the most that a row of G sums to, 2^14.
const char* gradient_weights(const Positives& p, const void* weight, const void* largest, const void* loss,
                             bool bounded, bool library, void* out, void* stream);

// What `finish_gradient` turns into a gradient.
struct Gradient {
  Side side;
  const void* weights;  // (3, weights_padded), of the rows whose losses they are
  int64_t weights_padded;
  const int64_t* positive;       // side query: the positive of x's row r is y's row positive[r]
  const int64_t *order, *first;  // side key: x's row r is that of y's rows order[first[r]] to order[first[r + 1] - 1]
  const void* accumulated;       // (splits, padded, dim), G k
  int64_t splits, dim;
  const void* largest;
  bool library;
};

// d_x0 and d_x1, shaped like x. d_type: the rows' type, or Real. table, padded: of the rows x.
const char* finish_gradient(const RowSet& x, const RowSet& y, Type type, bool normalize, const int64_t* table,
                            int64_t padded, const Gradient& of, double temperature, void* d_x0, void* d_x1, Type d_type,
                            void* stream);

// loss (count,), and its gradient (count, columns) in each query, both float: (1 - e^-loss) (mean of the negatives -
// positive) / temperature. accumulated (splits, padded, dim), state (2, splits, padded): as detached_sums writes them,
// for rows of 16 bits.
const char* finish_detached(const Positives& p, const float* state, const float* accumulated, int64_t splits,
                            int64_t dim, float* loss, float* gradient, void* stream);

}  // namespace ser_fast::cuda
