// Runs the kernels of cuda/nt_xent_tiles.h and nt_xent_stationary.h on threads of the system, each on a few tiles: what
// the sanitizers watch. Exits with 1, and says where, if a value is wrong.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/nt_xent_stationary.h"
#include "cuda/nt_xent_tiles.h"
#include "host_cuda.h"

using namespace ser_fast;

namespace {

constexpr int64_t kColumns = 64;
constexpr float kScale = 5;
int failures = 0;

void check(const char* what, const char* error, double value, double expected) {
  if (error == nullptr && std::abs(value - expected) <= 2e-3 * std::abs(expected)) return;
  std::printf("%s: %s, %g instead of %g\n", what, error ? error : "a wrong value", value, expected);
  ++failures;
}

// Rows of unit length in images of five; the last ones are not valid.
struct TestRows {
  int64_t count, padded;
  std::vector<float16> u;
  std::vector<int64_t> table;
  std::vector<float> weights;

  TestRows(int64_t count, int64_t padded) : count(count), padded(padded), u(padded * kColumns), weights(3 * padded) {
    std::mt19937 generator(count);
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < count; ++r) {
      float row[kColumns], squares = 0;
      for (float& x : row) x = normal(generator), squares += x * x;
      for (int64_t d = 0; d < kColumns; ++d) cuda::narrow(u[r * kColumns + d], row[d] / std::sqrt(squares));
    }
    for (int64_t r = 0; r < padded; ++r) {
      table.push_back(r < count ? r / 5 : 0);
      weights[r] = 1 + r % 3;
      weights[padded + r] = kScale;
    }
    for (int64_t r = 0; r < padded; ++r) table.push_back(r < count);
    for (int what = 0; what < 3; ++what) {
      for (int64_t r = 0; r < padded; r += 32) {
        const auto of = table.begin() + (what == 2 ? padded + r : r);
        table.push_back(what == 1 ? *std::max_element(of, of + 32) : *std::min_element(of, of + 32));
      }
    }
  }
  cuda::Operand operand() const { return {table.data(), weights.data(), u.data(), padded}; }
  double product(int64_t r, const TestRows& k, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < kColumns; ++d) {
      sum += cuda::widen(u[r * kColumns + d]) * cuda::widen(k.u[j * kColumns + d]);
    }
    return sum;
  }
  bool negative(int64_t r, const TestRows& k, int64_t j) const { return r < count && j < k.count && r / 5 != j / 5; }
};

}  // namespace

int main() {
  const TestRows x(130, 256), k(70, 128);
  const int64_t row = 129, splits = 2;  // the row that is looked at
  double over_rows = 0, over_keys = 0, mean = 0, gradient = 0;
  for (int64_t j = 0; j < x.count; ++j) {
    if (x.negative(row, x, j)) over_rows += std::exp2(kScale * x.product(row, x, j) - kScale);
  }
  for (int64_t j = 0; j < k.count; ++j) {
    if (!x.negative(row, k, j)) continue;
    const double p = std::exp2(kScale * x.product(row, k, j)), part = cuda::widen(k.u[j * kColumns]);
    over_keys += p;
    mean += p * part;
    gradient += p * std::exp2(-kScale) * (1 + row % 3 + 1 + j % 3) * part;
  }

  std::vector<int64_t> sums(4 * x.padded);
  std::vector<float16> kept(3 * 128 * 128), panel(128 * 128);
  const char* error = cuda::symmetric_sums(x.u.data(), x.table.data(), x.count, x.padded, kColumns, sums.data(),
                                           kept.data(), kScale, nullptr);
  const int64_t* of_row = sums.data() + row;
  check("symmetric_sums", error, of_row[0] * 0x1p-42 + of_row[x.padded] * 0x1p-70 + of_row[2 * x.padded] * 0x1p-98,
        over_rows);
  check("kept", error, cuda::widen(kept[128 * 128 + (row - 128) * 128]) * 0x1p-15,
        std::exp2(kScale * x.product(row, x, 0) - kScale));

  std::vector<float> state(2 * splits * x.padded), out(splits * x.padded * kColumns);
  const auto total = [&](const float* parts, int64_t stride) {
    double sum = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const double top = state[split * x.padded + row];
      if (top > -INFINITY) sum += std::exp2(top) * parts[split * stride];
    }
    return sum;
  };
  error = cuda::row_sums(x.u.data(), x.table.data(), x.padded, k.u.data(), k.table.data(), k.padded, kColumns, k.count,
                         state.data(), splits, kScale, nullptr);
  check("row_sums", error, total(&state[splits * x.padded + row], x.padded), over_keys);
  error = cuda::detached_sums(x.operand(), k.operand(), kColumns, k.count, state.data(), out.data(), splits, kScale,
                              false, nullptr);
  check("detached_sums, sums", error, total(&state[splits * x.padded + row], x.padded), over_keys);
  check("detached_sums", error, total(&out[row * kColumns], x.padded * kColumns), mean);
  error =
      cuda::stationary_gradient(x.operand(), k.operand(), kColumns, k.count, out.data(), splits, kScale, true, nullptr);
  check("stationary_gradient", error, out[row * kColumns] + out[(x.padded + row) * kColumns], gradient);
  error =
      cuda::gradient_panel(x.operand(), k.operand(), kColumns, panel.data(), 128, 0, 128, 128, kScale, true, nullptr);
  check("gradient_panel", error, cuda::widen(panel[(row - 128) * 128]),
        std::exp2(kScale * x.product(row, k, 0) - kScale) * (1 + row % 3 + 1));
  return failures != 0;
}
