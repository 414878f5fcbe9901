// Runs the kernels of cuda/nt_xent_rows.h and nt_xent_panels.h on threads of the system: what the sanitizers watch.
// Exits with 1, and says where, if a value is wrong.

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cuda/nt_xent_panels.h"
#include "cuda/nt_xent_rows.h"
#include "host_cuda.h"

using namespace ser_fast;

namespace {

constexpr int64_t kViews = 6, kRows = 2 * kViews, kColumns = 33, kDim = 64, kPadded = 128, kInvalid = 3;
constexpr double kTemperature = 0.5, kScale = 1 / (kTemperature * 0.693147180559945309417);

int failures = 0;

void check(const char* what, const char* error, double value, double expected, double tolerance) {
  if (error == nullptr && std::abs(value - expected) <= tolerance * std::abs(expected)) return;
  std::printf("%s: %s, %g instead of %g\n", what, error ? error : "a wrong value", value, expected);
  ++failures;
}

using Numbers = std::vector<double>;

double dot(const double* a, const double* b) {
  double sum = 0;
  for (int64_t d = 0; d < kColumns; ++d) sum += a[d] * b[d];
  return sum;
}
double similarity(const Numbers& x, int64_t i, int64_t j) {
  const double *a = &x[i * kColumns], *b = &x[j * kColumns];
  return dot(a, b) / std::sqrt(dot(a, a) * dot(b, b)) / kTemperature;
}
bool negative(int64_t i, int64_t j) { return i % kViews / 2 != j % kViews / 2 && j % kViews != kInvalid; }

double loss_of(const Numbers& x, int64_t i) {
  if (i % kViews == kInvalid) return 0;
  double sum = 0;
  for (int64_t j = 0; j < kRows; ++j) sum += negative(i, j) ? std::exp(similarity(x, i, j)) : 0;
  return std::log1p(sum / std::exp(similarity(x, i, (i + kViews) % kRows)));
}

}  // namespace

int main() {
  Numbers x(kRows * kColumns);
  std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  for (double& value : x) value = normal(generator);
  x[kInvalid * kColumns] = std::numeric_limits<double>::quiet_NaN();
  const std::vector<int64_t> image{0, 0, 1, 1, 2, 2};
  bool valid[kViews] = {true, true, true, true, true, true};
  valid[kInvalid] = false;

  // Loss and gradient of nt_xent in double, step by step as ser_fast/ops takes them; the products are computed here.
  const cuda::RowSet rows{x.data(), x.data() + kViews * kColumns, kViews, kRows, kColumns};
  Numbers u(kPadded * kDim), panel(kPadded * kPadded), state(2 * kPadded), loss(kRows), weight(kRows, 1), largest(1, 1);
  Numbers weights(3 * kPadded), accumulated(kPadded * kDim), gradient(kRows * kColumns);
  std::vector<int64_t> table(2 * kPadded + 3 * kPadded / 32);
  const char* error = cuda::prepare(rows, Type::float64, true, image.data(), valid, u.data(), Type::float64, kPadded,
                                    kDim, table.data(), nullptr);
  check("prepare", error, dot(&u[5 * kDim], &u[5 * kDim]), 1, 1e-14);
  for (int64_t i = 0; i < kPadded; ++i) {
    for (int64_t j = 0; j < kPadded; ++j) panel[i * kPadded + j] = kScale * dot(&u[i * kDim], &u[j * kDim]);
  }
  std::fill_n(state.begin(), kPadded, -INFINITY);
  const cuda::Positives positives{rows, rows, Type::float64, true, true, nullptr, table.data(), kPadded, kTemperature};
  const cuda::PanelOperand side{table.data(), weights.data(), kPadded};
  const cuda::Panel whole{panel.data(), 0, 0, kPadded, kPadded};
  error = cuda::panel_row_sums(whole, Type::float64, side, side, state.data(), nullptr);
  if (error == nullptr) error = cuda::losses(positives, state.data(), false, 1, loss.data(), nullptr);
  for (int64_t i = 0; i < kRows; ++i) check("losses", error, loss[i], loss_of(x, i), 1e-12);
  error = cuda::gradient_weights(positives, weight.data(), largest.data(), loss.data(), false, true, weights.data(),
                                 nullptr);
  if (error == nullptr) error = cuda::gradient_panel_from_library(whole, Type::float64, side, side, nullptr);
  for (int64_t i = 0; i < kPadded; ++i) {
    for (int64_t d = 0; d < kDim; ++d) {
      for (int64_t j = 0; j < kPadded; ++j) accumulated[i * kDim + d] += panel[i * kPadded + j] * u[j * kDim + d];
    }
  }
  const cuda::Gradient of{Side::views, weights.data(), kPadded,        nullptr, nullptr, nullptr, accumulated.data(),
                          1,           kDim,           largest.data(), true};
  if (error == nullptr) {
    error = cuda::finish_gradient(rows, rows, Type::float64, true, table.data(), kPadded, of, kTemperature,
                                  gradient.data(), gradient.data() + kViews * kColumns, Type::float64, nullptr);
  }
  for (const int64_t at : {int64_t{0}, 4 * kColumns + 7, 11 * kColumns + 32}) {
    double difference = 0;
    for (const double step : {1e-5, -1e-5}) {
      Numbers moved = x;
      moved[at] += step;
      for (int64_t i = 0; i < kRows; ++i) difference += loss_of(moved, i) / (2 * step);
    }
    check("finish_gradient", error, gradient[at], difference, 1e-6);
  }

  // What was kept: 2^15 P of one tile, of which only the part below the diagonal is read.
  std::vector<float16> kept(kPadded * kPadded), weighed(kPadded * kPadded);
  std::vector<float> shares(3 * kPadded, 1);
  for (int64_t i = 0; i < kPadded; ++i) {
    for (int64_t j = 0; j < kPadded; ++j) cuda::narrow(kept[i * kPadded + j], j < i ? 64.f * i + j : NAN);
  }
  for (int64_t i = 0; i < kPadded; ++i) cuda::narrow(kept[i * kPadded + i], 0);
  const cuda::PanelOperand alike{table.data(), shares.data(), kPadded};
  error = cuda::gradient_panel_from_kept({weighed.data(), 0, 0, kPadded, kPadded}, kept.data(), alike, alike, nullptr);
  check("gradient_panel_from_kept", error, cuda::widen(weighed[2 * kPadded + 1]), 129 * 0x1p-14, 1e-3);
  check("gradient_panel_from_kept, mirrored", error, cuda::widen(weighed[1 * kPadded + 2]), 129 * 0x1p-14, 1e-3);

  // Detached keys: the second view.
  std::vector<bfloat16> half(kRows * kColumns);
  Numbers rounded(half.size());
  for (size_t i = 0; i < half.size(); ++i) {
    cuda::narrow(half[i], static_cast<float>(x[i]));
    rounded[i] = cuda::widen(half[i]);
  }
  const std::vector<int64_t> own{0, 1, 2, 3, 4, 5};
  std::vector<float> sums(2 * kPadded), mean(kPadded * kDim), losses(kViews), gradients(kViews * kColumns);
  for (int64_t i = 0; i < kViews; ++i) {
    for (int64_t j = kViews; j < kRows; ++j) {
      if (negative(i, j)) sums[kPadded + i] += static_cast<float>(std::exp(similarity(rounded, i, j)));
    }
  }
  const cuda::RowSet queries{half.data(), half.data(), kViews, kViews, kColumns};
  const cuda::RowSet keys{half.data() + kViews * kColumns, half.data(), kViews, kViews, kColumns};
  for (int64_t r = 0; r < kPadded; ++r) table[kPadded + r] = r < kViews && valid[r];
  const cuda::Positives detached{queries,    keys,         Type::bfloat16, true,        false,
                                 own.data(), table.data(), kPadded,        kTemperature};
  error = cuda::finish_detached(detached, sums.data(), mean.data(), 1, kDim, losses.data(), gradients.data(), nullptr);
  const double s = similarity(rounded, 2, 2 + kViews), expected = std::log1p(sums[kPadded + 2] / std::exp(s));
  check("finish_detached", error, losses[2], expected, 1e-5);
  // The mean of the negatives is 0 here: the gradient is that of the positive alone.
  const double *q = &rounded[2 * kColumns], *k = &rounded[(2 + kViews) * kColumns], length = std::sqrt(dot(q, q));
  const double positive_gradient = std::expm1(-expected) / kTemperature / length;
  check("finish_detached, gradient", error, gradients[2 * kColumns],
        positive_gradient * (k[0] / std::sqrt(dot(k, k)) - q[0] / length * s * kTemperature), 1e-4);
  return failures != 0;
}
