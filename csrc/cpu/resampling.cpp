#include "resampling.h"

#include <algorithm>
#include <cmath>

namespace ser_fast {
namespace {

constexpr double kTolerance = 1e-4;  // LatticeMap's: this close to a border between two tokens is on it
constexpr double kPi = 3.14159265358979323846;

// The (B, C) family of Mitchell and Netravali; (0, -a) is Keys' kernel with parameter a.
double cubic(double t, double b, double c) {
  t = std::abs(t);
  if (t < 1) return (((12 - 9 * b - 6 * c) * t + (-18 + 12 * b + 6 * c)) * t * t + 6 - 2 * b) / 6;
  if (t < 2) return (((-b - 6 * c) * t + (6 * b + 30 * c)) * t * t + (-12 * b - 48 * c) * t + 8 * b + 24 * c) / 6;
  return 0;
}

double sinc(double t) { return t == 0 ? 1 : std::sin(kPi * t) / (kPi * t); }

double kernel(Interpolation interpolation, double t) {
  switch (interpolation) {
    case Interpolation::nearest: return t > -0.5 + kTolerance && t <= 0.5 + kTolerance;
    case Interpolation::bilinear: return std::max(0.0, 1 - std::abs(t));
    case Interpolation::bicubic: return cubic(t, 0, 0.75);
    case Interpolation::catmull_rom: return cubic(t, 0, 0.5);
    case Interpolation::mitchell: return cubic(t, 1.0 / 3, 1.0 / 3);
    case Interpolation::lanczos3: return std::abs(t) < 3 ? sinc(t) * sinc(t / 3) : 0;
    case Interpolation::area: break;
  }
  return 0;
}

double radius(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::nearest: return 0.5;
    case Interpolation::bilinear: return 1;
    case Interpolation::lanczos3: return 3;
    default: return 2;
  }
}

}  // namespace

void append_row(Sparse& matrix, double position, double step, bool exact, int64_t size, const Resampling& how) {
  if (size == 0) {
    matrix.start.push_back(matrix.start.back());
    return;
  }
  const bool area = how.interpolation == Interpolation::area;
  const Interpolation interpolation = how.antialias && how.interpolation == Interpolation::bicubic
                                          ? Interpolation::catmull_rom
                                          : how.interpolation;
  const double stretch = how.antialias ? std::max(1.0, step) : 1.0;
  const double reach = area ? (step + 1) / 2 - kTolerance : radius(interpolation) * stretch;
  const bool cut = how.padding == Padding::border && (area || how.antialias);
  if (cut) {
    const double end = interpolation == Interpolation::nearest ? size - 2 * kTolerance : size;
    position = std::min(std::max(position, 0.0), end);
  }
  const int64_t first = static_cast<int64_t>(std::floor(position - reach));
  const int64_t count = static_cast<int64_t>(2 * reach) + 2;

  const double own = std::floor(position);
  const bool on_centre = exact && position - own == 0.5;
  std::vector<double> row(size, 0.0);
  std::vector<char> used(size, 0);
  double sum = 0;
  std::vector<double> k(count);
  for (int64_t t = 0; t < count; ++t) {
    const double distance = first + t + 0.5 - position;
    k[t] = on_centre ? distance == 0 : area ? std::abs(distance) < reach : kernel(interpolation, distance / stretch);
    const bool inside = first + t >= 0 && first + t < size;
    if (cut && !inside) k[t] = 0;
    sum += k[t];
  }
  for (int64_t t = 0; t < count; ++t) {
    int64_t tap = first + t;
    if (how.padding == Padding::zeros && (tap < 0 || tap >= size)) continue;
    if (how.padding == Padding::reflection) {
      tap = ((tap % (2 * size)) + 2 * size) % (2 * size);
      tap = std::min(tap, 2 * size - 1 - tap);
    }
    tap = std::min(std::max<int64_t>(tap, 0), size - 1);
    row[tap] += k[t] / sum;
    used[tap] = 1;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (used[i] && row[i] != 0) {
      matrix.index.push_back(static_cast<int32_t>(i));
      matrix.weight.push_back(row[i]);
    }
  }
  matrix.start.push_back(static_cast<int64_t>(matrix.index.size()));
}

Sparse Sparse::transposed() const {
  Sparse result;
  result.columns = rows();
  result.start.assign(columns + 1, 0);
  for (int32_t i : index) ++result.start[i + 1];
  for (int64_t i = 0; i < columns; ++i) result.start[i + 1] += result.start[i];
  result.index.resize(index.size());
  result.weight.resize(weight.size());
  std::vector<int64_t> next(result.start.begin(), result.start.end() - 1);
  for (int64_t r = 0; r < rows(); ++r) {
    for (int64_t t = start[r]; t < start[r + 1]; ++t) {
      const int64_t slot = next[index[t]]++;
      result.index[slot] = static_cast<int32_t>(r);
      result.weight[slot] = weight[t];
    }
  }
  return result;
}

bool Sparse::copies() const {
  for (int64_t r = 0; r < rows(); ++r) {
    if (start[r] != start[r + 1] && source(r) < 0) return false;
  }
  return true;
}

}  // namespace ser_fast
