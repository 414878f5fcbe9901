// The similarity matrix is computed and consumed tile by tile; tiles of 256 or 512 rows and columns stay in the cache.
//
// Embeddings are sorted by image, so the columns that an anchor leaves out are one range: the mask costs a fill.
// With |s| <= 1/temperature a fixed shift replaces the running maximum: P = e^(s - 1/temperature) is one exp an entry,
// and serves both sides of a tile. With Z against itself (nt_xent) only tiles on and above the diagonal are computed:
// forward U = n^2 D flops where the full product takes 2U, backward U + 2U with G_ij = P_ij (a_i + a_j).
//
// Each sum is taken in an order that depends on the number of rows alone: blocks are paired as in a round-robin
// tournament, no two pairs of a round share a block, and rounds follow one another. No atomics; any number of threads
// gives the same bits.

#include "cpu/nt_xent.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/clones.h"

namespace ser_fast {
namespace {

constexpr double kLog2e = 1.44269504088896340736;

int64_t block_of(int64_t rows) { return rows <= 4096 ? 256 : 512; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 2^x to 2 ulp for x <= 1; 0 below -126; NaN stays. Written so that loops over it become vector code.
inline float exp2_of(float x) {
  const float t = std::max(x, -126.0f) + 12582912.0f;  // 1.5 * 2^23: the low bits of t are round(x)
  const float f = x - (t - 12582912.0f);               // in [-1/2, 1/2]
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  uint32_t bits, low;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&low, &t, 4);
  bits += low << 23;
  float y;
  std::memcpy(&y, &bits, 4);
  y = x < -126.0f ? 0.0f : y;
  return x == x ? y : x;
}

inline double exp2_of(double x) { return std::exp2(x); }

// The loops over a tile's rows, for one type. exp2_row: row[c] = 2^(row[c] - shift), also added to columns[c] where
// given; returns the sum. gradient_row: row[c] = 2^(row[c] - shift) (a + b[c]), without b times a.
// gradient_row_from_kept: the same of a row that holds the powers already. gradient_row_unbounded:
// row[c] = a 2^(row[c] - shift) + b[c] 2^(row[c] - shifts[c]), without b the first term.
#define SER_FAST_ROWS(REAL)                                                                                       \
  SER_FAST_CLONES REAL exp2_row(REAL* row, REAL shift, int64_t count, REAL* columns) {                            \
    constexpr int64_t lanes = 16;                                                                                 \
    REAL sums[lanes] = {}, sum = 0;                                                                               \
    int64_t c = 0;                                                                                                \
    for (; c + lanes <= count; c += lanes) {                                                                      \
      for (int64_t l = 0; l < lanes; ++l) {                                                                       \
        const REAL e = exp2_of(row[c + l] - shift);                                                               \
        row[c + l] = e;                                                                                           \
        sums[l] += e;                                                                                             \
      }                                                                                                           \
    }                                                                                                             \
    for (; c < count; ++c) {                                                                                      \
      row[c] = exp2_of(row[c] - shift);                                                                           \
      sum += row[c];                                                                                              \
    }                                                                                                             \
    for (REAL part : sums) sum += part;                                                                           \
    if (columns) {                                                                                                \
      for (c = 0; c < count; ++c) columns[c] += row[c];                                                           \
    }                                                                                                             \
    return sum;                                                                                                   \
  }                                                                                                               \
  SER_FAST_CLONES void gradient_row(REAL* row, REAL shift, REAL a, const REAL* b, int64_t count) {                \
    if (b) {                                                                                                      \
      for (int64_t c = 0; c < count; ++c) row[c] = exp2_of(row[c] - shift) * (a + b[c]);                          \
    } else {                                                                                                      \
      for (int64_t c = 0; c < count; ++c) row[c] = exp2_of(row[c] - shift) * a;                                   \
    }                                                                                                             \
  }                                                                                                               \
  SER_FAST_CLONES void gradient_row_from_kept(REAL* out, const REAL* row, REAL a, const REAL* b, int64_t count) { \
    for (int64_t c = 0; c < count; ++c) out[c] = row[c] * (a + b[c]);                                             \
  }                                                                                                               \
  SER_FAST_CLONES void scale_row(REAL* row, REAL factor, int64_t count) {                                         \
    for (int64_t c = 0; c < count; ++c) row[c] *= factor;                                                         \
  }                                                                                                               \
  SER_FAST_CLONES void gradient_row_unbounded(REAL* row, REAL shift, REAL a, const REAL* shifts, const REAL* b,   \
                                              int64_t count) {                                                    \
    if (b) {                                                                                                      \
      for (int64_t c = 0; c < count; ++c) {                                                                       \
        row[c] = a * exp2_of(row[c] - shift) + b[c] * exp2_of(row[c] - shifts[c]);                                \
      }                                                                                                           \
    } else {                                                                                                      \
      for (int64_t c = 0; c < count; ++c) row[c] = a * exp2_of(row[c] - shift);                                   \
    }                                                                                                             \
  }
SER_FAST_ROWS(float)
SER_FAST_ROWS(double)
#undef SER_FAST_ROWS

// For each row of `query` the range [first, last) of `key` that is of its image.
struct Excluded {
  std::vector<int64_t> first, last;
  template <typename Real>
  Excluded(const Embeddings<Real>& query, const Embeddings<Real>& key) : first(query.count), last(query.count) {
    for (int64_t i = 0; i < query.count; ++i) {
      const auto range = std::equal_range(key.image, key.image + key.count, query.image[i]);
      first[i] = range.first - key.image;
      last[i] = range.second - key.image;
    }
  }
};

// Calls use(begin, end) for the columns of a tile row for_negatives [first, last), and zeroes those inside.
template <typename Real, typename Use>
void for_negatives(Real* row, int64_t begin, int64_t count, int64_t first, int64_t last, const Use& use) {
  const int64_t from = std::clamp<int64_t>(first - begin, 0, count),
                to = std::clamp<int64_t>(last - begin, from, count);
  if (from > 0) use(0, from);
  std::fill(row + from, row + to, Real(0));
  if (to < count) use(to, count);
}

struct Tile {
  int64_t i, j;  // blocks of query and key
};

// Rounds of tiles no two of which share a block of rows or a block of columns; within one set of rows (`same`) the
// tiles on and above the diagonal, and no block twice in a round.
std::vector<std::vector<Tile>> tournament(int64_t rows, int64_t columns, bool same) {
  std::vector<std::vector<Tile>> rounds;
  if (!same) {
    const int64_t n = std::max(rows, columns);
    for (int64_t r = 0; r < n; ++r) {
      std::vector<Tile> round;
      for (int64_t i = 0; i < rows; ++i) {
        if ((i + r) % n < columns) round.push_back({i, (i + r) % n});
      }
      rounds.push_back(std::move(round));
    }
    return rounds;
  }
  std::vector<Tile> diagonal;
  for (int64_t i = 0; i < rows; ++i) diagonal.push_back({i, i});
  rounds.push_back(std::move(diagonal));
  const int64_t n = rows + rows % 2;  // with an odd number one block rests in each round
  for (int64_t r = 0; r + 1 < n; ++r) {
    std::vector<Tile> round;
    for (int64_t k = 0; k < n / 2; ++k) {
      int64_t i = k == 0 ? n - 1 : (r + k) % (n - 1), j = k == 0 ? r : (r + n - 1 - k) % (n - 1);
      if (i > j) std::swap(i, j);
      if (j < rows) round.push_back({i, j});
    }
    rounds.push_back(std::move(round));
  }
  return rounds;
}

struct Span {
  int64_t begin, count;
  Span(int64_t block, int64_t size, int64_t total) : begin(block * size), count(std::min(size, total - block * size)) {}
};

}  // namespace

int64_t kept_similarities(int64_t count) {
  // A block of the larger size may hold fewer rows than there will be: count whole tiles, of either size.
  const auto tiles = [&](int64_t block) {
    const int64_t blocks = divide_up(count, block);
    return blocks * (blocks + 1) / 2 * block * block;
  };
  return std::max(tiles(block_of(count)), tiles(block_of(0)));
}

template <typename Real>
void log_negatives(const Embeddings<Real>& query, const Embeddings<Real>& key, int64_t dim, Real temperature,
                   bool bounded, double* result, Real* kept, Gemm<Real> gemm, const ParallelFor& parallel) {
  if (!bounded)
    return log_and_mean_negatives<Real>(query, key, dim, temperature, false, result, nullptr, gemm, parallel);
  const bool same = query.u == key.u;
  const int64_t block = block_of(std::max(query.count, key.count));
  const int64_t rows = divide_up(query.count, block), columns = divide_up(key.count, block);
  const Real scale = static_cast<Real>(kLog2e / temperature);
  const Excluded excluded(query, key);
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = same ? i : 0; j < columns; ++j) tiles.push_back({i, j});
  }
  // partial[j][t]: the sum of row t over block j of the keys.
  std::vector<Real> partial(columns * query.count, Real(0));
  parallel(static_cast<int64_t>(tiles.size()), [&](int64_t begin, int64_t end) {
    Buffer<Real> scratch(kept ? 0 : block * block), sums(block);
    for (int64_t t = begin; t < end; ++t) {
      const Span i(tiles[t].i, block, query.count), j(tiles[t].j, block, key.count);
      const bool mirrored = same && tiles[t].i != tiles[t].j;
      Real* tile = kept ? kept + t * block * block : scratch.data();
      gemm(false, true, i.count, j.count, dim, scale, query.u + i.begin * dim, dim, key.u + j.begin * dim, dim, Real(0),
           tile, j.count);
      std::fill(sums.begin(), sums.end(), Real(0));
      for (int64_t r = 0; r < i.count; ++r) {
        Real* row = tile + r * j.count;
        Real sum = 0;
        for_negatives(row, j.begin, j.count, excluded.first[i.begin + r], excluded.last[i.begin + r],
                      [&](int64_t from, int64_t to) {
                        sum += exp2_row(row + from, scale, to - from, mirrored ? sums.data() + from : nullptr);
                      });
        partial[tiles[t].j * query.count + i.begin + r] = sum;
      }
      if (mirrored) std::copy_n(sums.data(), j.count, partial.data() + tiles[t].i * query.count + j.begin);
    }
  });
  parallel(query.count, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      double sum = 0;
      for (int64_t j = 0; j < columns; ++j) sum += partial[j * query.count + t];
      result[t] = std::log(sum) + 1.0 / temperature;
    }
  });
}

// Every tile is computed for its rows, so that a block of rows can be finished on its own: the shift of a row may be
// its running maximum, and its mean is at hand with its sum.
template <typename Real>
void log_and_mean_negatives(const Embeddings<Real>& query, const Embeddings<Real>& key, int64_t dim, Real temperature,
                            bool bounded, double* result, Real* mean, Gemm<Real> gemm, const ParallelFor& parallel) {
  const int64_t row_block = query.count <= 4096 ? 128 : 256, block = block_of(key.count);  // as many parts as threads
  const int64_t rows = divide_up(query.count, row_block), columns = divide_up(key.count, block);
  const Real scale = static_cast<Real>(kLog2e / temperature), lowest = -std::numeric_limits<Real>::infinity();
  const Excluded excluded(query, key);
  if (mean && columns == 0) std::fill_n(mean, query.count * dim, Real(0));

  parallel(rows, [&](int64_t begin, int64_t end) {
    Buffer<Real> tile(row_block * block);
    for (int64_t b = begin; b < end; ++b) {
      const Span i(b, row_block, query.count);
      Real* means = mean ? mean + i.begin * dim : nullptr;
      std::vector<Real> row_max(i.count, bounded ? scale : lowest);
      std::vector<double> sum(i.count, 0.0);
      for (int64_t c = 0; c < columns; ++c) {
        const Span j(c, block, key.count);
        const Real* k = key.u + j.begin * dim;
        gemm(false, true, i.count, j.count, dim, scale, query.u + i.begin * dim, dim, k, dim, Real(0), tile.data(),
             j.count);
        for (int64_t r = 0; r < i.count; ++r) {
          Real* row = tile.data() + r * j.count;
          const int64_t first = excluded.first[i.begin + r], last = excluded.last[i.begin + r];
          if (!bounded) {
            Real highest = row_max[r];
            for_negatives(row, j.begin, j.count, first, last, [&](int64_t from, int64_t to) {
              for (int64_t k = from; k < to; ++k) highest = row[k] > highest || row[k] != row[k] ? row[k] : highest;
            });
            if (highest != row_max[r]) {
              const Real factor = std::exp2(row_max[r] - highest);
              sum[r] *= factor;
              if (means && c > 0) scale_row(means + r * dim, factor, dim);
              row_max[r] = highest;
            }
          }
          for_negatives(row, j.begin, j.count, first, last, [&](int64_t from, int64_t to) {
            sum[r] += exp2_row(row + from, row_max[r], to - from, nullptr);
          });
        }
        if (means) {
          gemm(false, false, i.count, dim, j.count, Real(1), tile.data(), j.count, k, dim, Real(c > 0), means, dim);
        }
      }
      for (int64_t r = 0; r < i.count; ++r) {
        result[i.begin + r] =
            sum[r] == 0 ? -std::numeric_limits<double>::infinity() : std::log(sum[r]) + row_max[r] / kLog2e;
        if (means) scale_row(means + r * dim, sum[r] == 0 ? Real(0) : static_cast<Real>(1 / sum[r]), dim);
      }
    }
  });
}

template <typename Real>
void negatives_gradient(const Embeddings<Real>& query, const Embeddings<Real>& key, int64_t dim, Real temperature,
                        bool bounded, const Real* weight, const double* lse, const Real* kept, Real* d_query,
                        Real* d_key, Gemm<Real> gemm, const ParallelFor& parallel) {
  const bool same = query.u == key.u;
  const int64_t block = block_of(std::max(query.count, key.count));
  const int64_t rows = divide_up(query.count, block), columns = divide_up(key.count, block);
  const Real scale = static_cast<Real>(kLog2e / temperature);
  const Excluded excluded(query, key);

  // Bounded: G = 2^(s - scale) a. Unbounded: G = weight 2^(s - shift).
  std::vector<Real> a(query.count), shift(query.count);
  for (int64_t t = 0; t < query.count; ++t) {
    shift[t] = static_cast<Real>(lse[t] * kLog2e);
    // What rounding took from the shift goes into the factor: at a low temperature it is not small.
    a[t] = static_cast<Real>(weight[t] *
                             (bounded ? std::exp(1.0 / temperature - lse[t]) : std::exp2(shift[t] - lse[t] * kLog2e)));
  }

  const auto accumulate = [&](const Tile& at, Buffer<Real>& tile) {
    const Span i(at.i, block, query.count), j(at.j, block, key.count);
    const Real* q = query.u + i.begin * dim;
    const Real* k = key.u + j.begin * dim;
    // Tiles are kept row by row of the upper triangle.
    const Real* powers = kept ? kept + (at.i * columns - at.i * (at.i - 1) / 2 + at.j - at.i) * block * block : nullptr;
    if (!kept) gemm(false, true, i.count, j.count, dim, scale, q, dim, k, dim, Real(0), tile.data(), j.count);
    for (int64_t r = 0; r < i.count; ++r) {
      Real* row = tile.data() + r * j.count;
      const int64_t t = i.begin + r;
      if (kept) {
        gradient_row_from_kept(row, powers + r * j.count, a[t], a.data() + j.begin, j.count);
        continue;
      }
      for_negatives(row, j.begin, j.count, excluded.first[t], excluded.last[t], [&](int64_t from, int64_t to) {
        const Real* other = same ? a.data() + j.begin + from : nullptr;
        if (bounded) {
          gradient_row(row + from, scale, a[t], other, to - from);
        } else {
          gradient_row_unbounded(row + from, shift[t], a[t], same ? shift.data() + j.begin + from : nullptr, other,
                                 to - from);
        }
      });
    }
    const Real factor = 1 / temperature;
    if (d_query)
      gemm(false, false, i.count, dim, j.count, factor, tile.data(), j.count, k, dim, Real(1), d_query + i.begin * dim,
           dim);
    // Within one set of rows a tile below the diagonal is the mirror image of one above.
    Real* other = same ? (at.i == at.j ? nullptr : d_query) : d_key;
    if (other)
      gemm(true, false, j.count, dim, i.count, factor, tile.data(), j.count, q, dim, Real(1), other + j.begin * dim,
           dim);
  };

  for (const std::vector<Tile>& round : tournament(rows, columns, same)) {
    parallel(static_cast<int64_t>(round.size()), [&](int64_t begin, int64_t end) {
      Buffer<Real> tile(block * block);
      for (int64_t t = begin; t < end; ++t) accumulate(round[t], tile);
    });
  }
}

template void log_negatives(const Embeddings<float>&, const Embeddings<float>&, int64_t, float, bool, double*, float*,
                            Gemm<float>, const ParallelFor&);
template void log_negatives(const Embeddings<double>&, const Embeddings<double>&, int64_t, double, bool, double*,
                            double*, Gemm<double>, const ParallelFor&);
template void log_and_mean_negatives(const Embeddings<float>&, const Embeddings<float>&, int64_t, float, bool, double*,
                                     float*, Gemm<float>, const ParallelFor&);
template void log_and_mean_negatives(const Embeddings<double>&, const Embeddings<double>&, int64_t, double, bool,
                                     double*, double*, Gemm<double>, const ParallelFor&);
template void negatives_gradient(const Embeddings<float>&, const Embeddings<float>&, int64_t, float, bool, const float*,
                                 const double*, const float*, float*, float*, Gemm<float>, const ParallelFor&);
template void negatives_gradient(const Embeddings<double>&, const Embeddings<double>&, int64_t, double, bool,
                                 const double*, const double*, const double*, double*, double*, Gemm<double>,
                                 const ParallelFor&);

}  // namespace ser_fast
