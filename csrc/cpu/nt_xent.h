// NT-Xent and InfoNCE without the similarity matrix, on rows that are sorted by image; Real is float or double.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace ser_fast {

// C (rows x columns) = alpha op(A) op(B) + beta C, row-major, on the caller's thread.
template <typename Real>
using Gemm = void (*)(bool transpose_a, bool transpose_b, int64_t rows, int64_t columns, int64_t depth, Real alpha,
                      const Real* a, int64_t lda, const Real* b, int64_t ldb, Real beta, Real* c, int64_t ldc);

// Embeddings of the rows that take part, in ascending order of their image.
template <typename Real>
struct Embeddings {
  const Real* u;         // (count, dim), of length 1 at most if normalized
  const int64_t* image;  // (count,)
  int64_t count;
};

// log sum over b of other images of e^(<q_t, k_b> / temperature), for each row of `query`; -inf where there is none.
//
// `bounded`: |s| <= 1/temperature, and 2/temperature is no exponent to fear. `query` and `key` may be one set
// (nt_xent): then only half of the tiles are computed, and `kept`, if it is not null, takes them for
// negatives_gradient: it has room for kept_similarities(count), and they must be bounded.
template <typename Real>
void log_negatives(const Embeddings<Real>& query, const Embeddings<Real>& key, int64_t dim, Real temperature,
                   bool bounded, double* result, Real* kept, Gemm<Real> gemm, const ParallelFor& parallel);

// How many numbers the similarities of one set of rows take, as they are kept; it grows with `count`.
int64_t kept_similarities(int64_t count);

// The same, and the mean (count, dim) of the keys, weighted by their shares of that sum: 0 where there is none.
template <typename Real>
void log_and_mean_negatives(const Embeddings<Real>& query, const Embeddings<Real>& key, int64_t dim, Real temperature,
                            bool bounded, double* result, Real* mean, Gemm<Real> gemm, const ParallelFor& parallel);

// Adds the negatives' part of the gradient of sum_t weight_t loss_t, with lse_t = s_tp + loss_t:
//
//   d_query[t] += sum_b G_tb k_b / temperature,  d_key[b] += sum_t G_tb q_t / temperature,
//   G_tb = weight_t e^(s_tb - lse_t)
//
// d_query or d_key may be null: nothing is computed for it. If `query` and `key` are one set, d_query takes both sums.
// `kept`: what log_negatives kept, or null.
template <typename Real>
void negatives_gradient(const Embeddings<Real>& query, const Embeddings<Real>& key, int64_t dim, Real temperature,
                        bool bounded, const Real* weight, const double* lse, const Real* kept, Real* d_query,
                        Real* d_key, Gemm<Real> gemm, const ParallelFor& parallel);

}  // namespace ser_fast
