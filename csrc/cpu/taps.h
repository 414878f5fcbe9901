// The rows of weights of the group action, on one axis: ser_fast/interpolation.py in C++, in double.
#pragma once

#include <cstdint>
#include <vector>

#include "common/resampling.h"
#include "cpu/buffer.h"

namespace ser_fast {

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
    for (int64_t r = 0; r < rows; ++r)
      start[r + 1] = start[r] + row(r, index.data() + start[r], weight.data() + start[r]);
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
  Axis(const Resampling& resampling, double step, bool exact, int64_t size);

  struct Taps {
    int64_t count;
    const int32_t* index;  // ascending
    const double* weight;
  };
  Taps at(double position);                                             // they hold until the next call
  int64_t most() const { return static_cast<int64_t>(index_.size()); }  // taps of a position

 private:
  Resampling resampling_;
  Interpolation interpolation_;  // bicubic with antialias is torch's a = -0.5
  bool exact_, cut_, plain_;
  double squeeze_, reach_;  // 1 / stretch of the kernel; the farthest centre with a weight
  int64_t size_;
  Cubics cubics_;
  std::vector<double> kernel_, weight_, row_;
  std::vector<int32_t> index_;
};

}  // namespace ser_fast
