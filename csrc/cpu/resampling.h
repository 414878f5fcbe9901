// The rows of weights of the group action, on one axis: the C++ twin of ser_fast/interpolation.py, in double.
#pragma once

#include <cstdint>
#include <vector>

namespace ser_fast {

enum class Interpolation { nearest, bilinear, bicubic, catmull_rom, mitchell, lanczos3, area };
enum class Padding { zeros, border, reflection };

struct Resampling {
  Interpolation interpolation;
  Padding padding;
  bool antialias;
};

// A sparse matrix by rows: row r has the taps [start[r], start[r + 1]), in the order of their columns.
struct Sparse {
  int64_t columns = 0;
  std::vector<int64_t> start{0};
  std::vector<int32_t> index;
  std::vector<double> weight;

  int64_t rows() const { return static_cast<int64_t>(start.size()) - 1; }
  // The column of row r if it has one tap, of weight 1: a copy; else -1.
  int32_t source(int64_t r) const {
    return start[r + 1] - start[r] == 1 && weight[start[r]] == 1 ? index[start[r]] : -1;
  }
  Sparse transposed() const;
  // Every row has one tap of weight 1, or none: rows are copied (or zero).
  bool copies() const;
};

// Appends the row of weights of one position on an axis of `size` tokens.
void append_row(Sparse& matrix, double position, double step, bool exact, int64_t size, const Resampling& how);

}  // namespace ser_fast
