#include "cpu/taps.h"

#include <algorithm>
#include <cmath>

namespace ser_fast {
namespace {

constexpr double kPi = 3.14159265358979323846;

double value(const double* c, double t) { return c[0] + t * (c[1] + t * (c[2] + t * c[3])); }

double sinc(double t) { return t == 0 ? 1 : std::sin(kPi * t) / (kPi * t); }

double kernel(Interpolation interpolation, const Cubics& of, double t) {
  if (interpolation == Interpolation::nearest) return t > -0.5 + kTolerance && t <= 0.5 + kTolerance;
  t = std::abs(t);
  if (interpolation == Interpolation::lanczos3) return t < 3 ? sinc(t) * sinc(t / 3) : 0;
  return t < 1 ? value(of.inner, t) : t < 2 ? value(of.outer, t) : 0;
}

}  // namespace

Axis::Axis(const Resampling& resampling, double step, bool exact, int64_t size)
    : resampling_(resampling),
      interpolation_(resampling.antialias && resampling.interpolation == Interpolation::bicubic
                         ? Interpolation::catmull_rom
                         : resampling.interpolation),
      exact_(exact),
      size_(size),
      cubics_(cubics(interpolation_)) {
  const bool area = interpolation_ == Interpolation::area;
  const double longest = static_cast<double>(kMostStretch) * static_cast<double>(size);
  if (!(step < longest)) step = longest;
  const double stretch = resampling.antialias ? std::max(1.0, step) : 1.0;
  squeeze_ = 1 / stretch;
  reach_ = area ? (step + 1) / 2 - kTolerance : radius(interpolation_) * stretch;
  cut_ = resampling.padding == Padding::border && (area || resampling.antialias);
  const size_t most = static_cast<size_t>(2 * reach_) + 1;  // centres within the reach, on either side
  // Without a stretch or a cut every position has the same four taps (bilinear: two of them 0), which sum up to 1.
  plain_ = stretch == 1 && !cut_ && !area && interpolation_ != Interpolation::nearest &&
           interpolation_ != Interpolation::lanczos3;
  kernel_.resize(std::max<size_t>(most, 4));
  index_.resize(std::min<size_t>(most, size));
  weight_.resize(index_.size());
}

Axis::Taps Axis::at(double position) {
  if (size_ == 0) return {0, nullptr, nullptr};
  position = std::min(std::max(position, -kFarthest), kFarthest);
  if (cut_) {
    const double end = interpolation_ == Interpolation::nearest ? size_ - 2 * kTolerance : size_;
    position = std::min(std::max(position, 0.0), end);
  }
  int64_t first = static_cast<int64_t>(std::floor(position)), taps = 1;
  kernel_[0] = 1;
  if (exact_ && position - first == 0.5) {
    // one tap
  } else if (plain_) {
    first = static_cast<int64_t>(std::floor(position - 0.5)) - 1;
    const double t = position - 1.5 - first;  // in [0, 1), past the centre of the second tap
    taps = 4;
    kernel_[0] = value(cubics_.outer, 1 + t);
    kernel_[1] = value(cubics_.inner, t);
    kernel_[2] = t > 0 ? value(cubics_.inner, 1 - t) : value(cubics_.outer, 1);
    kernel_[3] = 2 - t < 2 ? value(cubics_.outer, 2 - t) : 0;
  } else {
    const bool area = interpolation_ == Interpolation::area;
    first = static_cast<int64_t>(std::floor(position - reach_ + 0.5));
    taps = static_cast<int64_t>(2 * reach_) + 1;
    double sum = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const double distance = first + t + 0.5 - position;
      kernel_[t] = area ? std::abs(distance) < reach_ : kernel(interpolation_, cubics_, distance * squeeze_);
      if (cut_ && (first + t < 0 || first + t >= size_)) kernel_[t] = 0;
      sum += kernel_[t];
    }
    const double unit = 1 / sum;
    for (int64_t t = 0; t < taps; ++t) kernel_[t] *= unit;
  }

  int64_t count = 0;
  if (resampling_.padding == Padding::reflection) {
    row_.assign(size_, 0.0);
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t tap = ((first + t) % (2 * size_) + 2 * size_) % (2 * size_);
      row_[std::min(tap, 2 * size_ - 1 - tap)] += kernel_[t];
    }
    for (int64_t i = 0; i < size_; ++i) {
      if (row_[i] == 0) continue;
      index_[count] = static_cast<int32_t>(i);
      weight_[count] = row_[i];
      ++count;
    }
    return {count, index_.data(), weight_.data()};
  }
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t tap = first + t;
    if (kernel_[t] == 0 || (resampling_.padding == Padding::zeros && (tap < 0 || tap >= size_))) continue;
    const int32_t i = static_cast<int32_t>(std::min(std::max<int64_t>(tap, 0), size_ - 1));
    if (count && index_[count - 1] == i) {  // past the border: onto the edge
      weight_[count - 1] += kernel_[t];
    } else {
      index_[count] = i;
      weight_[count] = kernel_[t];
      ++count;
    }
  }
  return {count, index_.data(), weight_.data()};
}

template <typename Real>
void Sparse<Real>::transpose() {
  Sparse result;
  result.columns = rows();
  result.start.assign(columns + 1, 0);
  for (int32_t i : index) ++result.start[i + 1];
  for (int64_t i = 0; i < columns; ++i) result.start[i + 1] += result.start[i];
  result.index.resize(index.size());
  result.weight.resize(weight.size());
  Buffer<int64_t> next(result.start);
  for (int64_t r = 0; r < rows(); ++r) {
    for (int64_t t = start[r]; t < start[r + 1]; ++t) {
      const int64_t slot = next[index[t]]++;
      result.index[slot] = static_cast<int32_t>(r);
      result.weight[slot] = weight[t];
    }
  }
  std::swap(*this, result);
}

template <typename Real>
bool Sparse<Real>::copies() const {
  for (int64_t r = 0; r < rows(); ++r) {
    if (start[r] != start[r + 1] && source(r) < 0) return false;
  }
  return true;
}

template struct Sparse<float>;
template struct Sparse<double>;

}  // namespace ser_fast
