// The rows of weights of the group action, on one axis: the C++ twin of ser_fast/interpolation.py, in double.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"

namespace ser_fast {

enum class Interpolation { nearest, bilinear, bicubic, catmull_rom, mitchell, lanczos3, area };
enum class Padding { zeros, border, reflection };

struct Resampling {
  Interpolation interpolation;
  Padding padding;
  bool antialias;
};

constexpr double kTolerance = 1e-4;  // LatticeMap's: this close to a border between two tokens is on it

// A kernel of radius 1 or 2 as cubics in |t|, one for [0, 1) and one for [1, 2); the first coefficient is that of 1.
struct Cubics {
  double inner[4], outer[4];
};

// The (B, C) family of Mitchell and Netravali; (0, -a) is Keys' kernel with parameter a.
constexpr Cubics family(double b, double c) {
  return {{1 - b / 3, 0, -3 + 2 * b + c, 2 - 1.5 * b - c},
          {4 * b / 3 + 4 * c, -2 * b - 8 * c, b + 5 * c, -b / 6 - c}};
}

constexpr Cubics cubics(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::bilinear: return {{1, -1, 0, 0}, {}};
    case Interpolation::bicubic: return family(0, 0.75);
    case Interpolation::catmull_rom: return family(0, 0.5);
    case Interpolation::mitchell: return family(1.0 / 3, 1.0 / 3);
    default: return {};
  }
}

// How far a token of weight may be.
constexpr double radius(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::nearest: return 0.5 + kTolerance;
    case Interpolation::bilinear: return 1;
    case Interpolation::lanczos3: return 3;
    default: return 2;
  }
}

// A sparse matrix by rows: row r has the taps [start[r], start[r + 1]), in the order of their columns.
template <typename Real>
struct Sparse {
  int64_t columns = 0;
  Buffer<int64_t> start;
  Buffer<int32_t> index;
  Buffer<Real> weight;

  int64_t rows() const { return static_cast<int64_t>(start.size()) - 1; }
  // The column of row r if it has one tap, of weight 1: a copy; else -1.
  int32_t source(int64_t r) const {
    return start[r + 1] - start[r] == 1 && weight[start[r]] == 1 ? index[start[r]] : -1;
  }
  // Row r has the taps that row(r, index, weight) writes, `most` at most, and returns the number of.
  template <typename Row>
  void fill(int64_t rows, int64_t of_columns, int64_t most, const Row& row) {
    columns = of_columns;
    start.resize(rows + 1);
    index.resize(rows * most);
    weight.resize(rows * most);
    start[0] = 0;
    for (int64_t r = 0; r < rows; ++r) start[r + 1] = start[r] + row(r, index.data() + start[r], weight.data() + start[r]);
    index.resize(start[rows]);
    weight.resize(start[rows]);
  }
  void transpose();
  // Every row has one tap of weight 1, or none: rows are copied (or zero).
  bool copies() const;
};

// The rows of weights of positions on one axis of `size` tokens, where neighbouring output tokens are `step` apart.
class Axis {
 public:
  // `exact`: the map carries centres onto centres, and every kernel copies there.
  Axis(const Resampling& how, double step, bool exact, int64_t size);

  struct Taps {
    int64_t count;
    const int32_t* index;  // ascending
    const double* weight;
  };
  Taps at(double position);  // they hold until the next call
  int64_t most() const { return static_cast<int64_t>(index_.size()); }  // taps of a position

 private:
  Resampling how_;
  Interpolation interpolation_;  // bicubic with antialias is torch's a = -0.5
  bool exact_, cut_, plain_;
  double squeeze_, reach_;  // 1 / stretch of the kernel; the farthest centre with a weight
  int64_t size_;
  Cubics cubics_;
  std::vector<double> kernel_, weight_, row_;
  std::vector<int32_t> index_;
};

}  // namespace ser_fast
