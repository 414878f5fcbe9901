// Runs the kernels without torch, on four threads, against loops over the formulas: what the sanitizers watch.
// Exits with 1, and says where, if a value is wrong.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/group_action.h"
#include "cpu/normalize_rows.h"
#include "cpu/nt_xent.h"
#include "cpu/taps.h"

namespace {

using namespace ser_fast;
using Values = std::vector<double>;

int failures = 0;
std::mt19937 generator(0);

Values normal(int64_t count) {
  std::normal_distribution<double> distribution;
  Values values(count);
  for (double& value : values) value = distribution(generator);
  return values;
}

// The largest error is at most `budget` times the largest expected value; infinities are the same ones.
void compare(const std::string& what, const Values& actual, const Values& expected, double budget) {
  double scale = 0;
  for (double e : expected) scale = std::isfinite(e) ? std::max(scale, std::abs(e)) : scale;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (actual[i] == expected[i] || std::abs(actual[i] - expected[i]) <= budget * scale) continue;
    std::printf("%s: got %g at %zu, expected %g (largest %g)\n", what.c_str(), actual[i], i, expected[i], scale);
    ++failures;
    return;
  }
}

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t parts = 4;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < parts; ++t) {
    const int64_t begin = count * t / parts, end = count * (t + 1) / parts;
    if (begin < end) threads.emplace_back(body, begin, end);
  }
  for (std::thread& thread : threads) thread.join();
}

// ------------------------------------------------------------------------------------------------ group_action

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(double value) {
    const float single = static_cast<float>(value);
    uint32_t wide;
    std::memcpy(&wide, &single, 4);
    bits = static_cast<uint16_t>(wide >> 16);
  }
  explicit operator double() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float single;
    std::memcpy(&single, &wide, 4);
    return single;
  }
};

constexpr double kMaps[][6] = {
    // linear by rows, offset
    {1, 0, 0, 1, 0, 0},               // copy
    {0, -1, 1, 0, 0, 0},              // copy, turned
    {1, 0, 0, 1, 2, -1},              // copy, a whole shift
    {0.7, 0, 0, 1.6, 0.3, -0.2},      // separable
    {0, 1.3, -0.6, 0, -1.1, 0.4},     // separable, turned
    {0.8, -0.5, 0.5, 0.8, 0.1, 0.7},  // general
    {1, 0, 0, 1, 40, 40},             // far outside
    {0.8, -0.5, 0.5, 0.8, 0.1, 0.7},  // a map that came before
};
constexpr int64_t kBatch = std::size(kMaps);

// W (output tokens, input tokens) of one map.
Values matrix(const double* map, const Lattices& n, const Resampling& resampling) {
  const double size_in[2] = {double(n.height_in), double(n.width_in)};
  const bool exact = std::all_of(map, map + 4, [](double a) { return a == 0 || std::abs(a) == 1; });
  Values w;
  for (int64_t i = 0; i < n.height_out; ++i) {
    for (int64_t j = 0; j < n.width_out; ++j) {
      const double v[2] = {i + 0.5 - n.height_out / 2.0, j + 0.5 - n.width_out / 2.0};
      Values axes[2] = {Values(n.height_in), Values(n.width_in)};
      for (int axis = 0; axis < 2; ++axis) {
        const double *linear = map + 2 * axis, step = std::hypot(linear[0], linear[1]);
        const double position = linear[0] * v[0] + linear[1] * v[1] + map[4 + axis] + size_in[axis] / 2;
        Axis along(resampling, step, exact, static_cast<int64_t>(axes[axis].size()));
        const Axis::Taps taps = along.at(position);
        for (int64_t t = 0; t < taps.count; ++t) axes[axis][taps.index[t]] = taps.weight[t];
      }
      for (double y : axes[0]) {
        for (double x : axes[1]) w.push_back(y * x);
      }
    }
  }
  return w;
}

template <typename T>
void check_group_action(Type type, double budget, const Lattices& n, int64_t channels, const Resampling& resampling,
                        bool transpose) {
  int64_t tokens_in = n.height_in * n.width_in, tokens_out = n.height_out * n.width_out;
  const int64_t stride = tokens_in;
  if (transpose) std::swap(tokens_in, tokens_out);
  Values linear, offset, expected(kBatch * tokens_out * channels);
  std::vector<T> x, out(expected.size());
  for (double value : normal(kBatch * tokens_in * channels)) x.push_back(static_cast<T>(value));
  for (int64_t b = 0; b < kBatch; ++b) {
    linear.insert(linear.end(), kMaps[b], kMaps[b] + 4);
    offset.insert(offset.end(), kMaps[b] + 4, kMaps[b] + 6);
    const Values w = matrix(kMaps[b], n, resampling);
    for (int64_t o = 0; o < tokens_out; ++o) {
      for (int64_t i = 0; i < tokens_in; ++i) {
        const double weight = transpose ? w[i * stride + o] : w[o * stride + i];
        if (weight == 0) continue;
        for (int64_t c = 0; c < channels; ++c) {
          expected[(b * tokens_out + o) * channels + c] +=
              weight * static_cast<double>(x[(b * tokens_in + i) * channels + c]);
        }
      }
    }
  }
  group_action(x.data(), linear.data(), offset.data(), out.data(), type, kBatch, channels, n, resampling, transpose,
               parallel);
  Values actual;
  for (T value : out) actual.push_back(static_cast<double>(value));
  compare("group_action, type " + std::to_string(int(type)) + ", interpolation " +
              std::to_string(int(resampling.interpolation)) + ", padding " + std::to_string(int(resampling.padding)) +
              ", antialias " + std::to_string(resampling.antialias) + ", transpose " + std::to_string(transpose) +
              ", " + std::to_string(channels) + " channels",
          actual, expected, budget);
}

void check_group_actions() {
  const Lattices lattices[] = {{5, 7, 6, 4}, {1, 3, 2, 1}, {4, 4, 4, 4}};
  const int64_t channels[] = {1, 17, 64, 257, 300};
  int64_t turn = 0;
  for (int interpolation = 0; interpolation <= int(Interpolation::area); ++interpolation) {
    for (int padding = 0; padding <= int(Padding::reflection); ++padding) {
      for (bool antialias : {false, true}) {
        const Resampling resampling{Interpolation(interpolation), Padding(padding), antialias};
        for (const Lattices& n : lattices) {
          for (bool transpose : {false, true}) {
            const int64_t count = channels[turn++ % std::size(channels)];
            check_group_action<float>(Type::float32, 1e-5, n, count, resampling, transpose);
            check_group_action<double>(Type::float64, 1e-12, n, count, resampling, transpose);
            check_group_action<bfloat16>(Type::bfloat16, 1.0 / 256, n, count, resampling, transpose);
            check_group_action<_Float16>(Type::float16, 1.0 / 2048, n, count, resampling, transpose);
          }
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ nt_xent

template <typename Real>
void gemm(bool transpose_a, bool transpose_b, int64_t rows, int64_t columns, int64_t depth, Real alpha, const Real* a,
          int64_t lda, const Real* b, int64_t ldb, Real beta, Real* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      Real sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += (transpose_a ? a[k * lda + i] : a[i * lda + k]) * (transpose_b ? b[j * ldb + k] : b[k * ldb + j]);
      }
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);  // c may be uninitialized
    }
  }
}

template <typename Real>
struct Set {
  std::vector<Real> u;
  std::vector<int64_t> image;
  int64_t dim;

  // `run` rows of each image, the ids `gap` apart; `large` rows of the first image.
  Set(int64_t count, int64_t dim, int64_t run, int64_t gap, int64_t large, bool unit) : dim(dim) {
    for (int64_t t = 0; t < count; ++t) {
      image.push_back(t < large ? -5 : (t - large) / run * gap);
      const Values row = normal(dim);
      double square = 0;
      for (double value : row) square += value * value;
      for (double value : row) u.push_back(static_cast<Real>(unit ? value / std::sqrt(square) : value));
    }
  }
  Embeddings<Real> rows() const { return {u.data(), image.data(), static_cast<int64_t>(image.size())}; }
};

template <typename Real>
double dot(const Embeddings<Real>& q, int64_t t, const Embeddings<Real>& k, int64_t b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += double(q.u[t * dim + d]) * k.u[b * dim + d];
  return sum;
}

template <typename Real>
Values widened(const std::vector<Real>& values) {
  return Values(values.begin(), values.end());
}

template <typename Real>
void check_pair(const std::string& what, const Set<Real>& query, const Set<Real>& key, bool bounded) {
  const bool same = &query == &key;
  const int64_t dim = query.dim;
  const Embeddings<Real> q = query.rows(), k = key.rows();
  const Real temperature = bounded ? Real(0.3) : Real(0.1);
  const double budget = std::is_same_v<Real, float> ? 1e-5 : 1e-12;

  Values negatives(q.count), expected(q.count), lse(q.count), mean(q.count * dim);
  const double lowest = -std::numeric_limits<double>::infinity();
  for (int64_t t = 0; t < q.count; ++t) {
    double row_max = lowest, sum = 0;
    Values s;
    for (int64_t b = 0; b < k.count; ++b) {
      if (q.image[t] != k.image[b]) s.push_back(dot(q, t, k, b, dim) / temperature);
    }
    for (double value : s) row_max = std::max(row_max, value);
    for (double value : s) sum += std::exp(value - row_max);
    expected[t] = s.empty() ? lowest : row_max + std::log(sum);
    const double positive = 0.9 / temperature, most = std::max(expected[t], positive);
    lse[t] = most + std::log(std::exp(expected[t] - most) + std::exp(positive - most));
    for (int64_t b = 0; b < k.count; ++b) {
      if (q.image[t] == k.image[b]) continue;
      const double share = std::exp(dot(q, t, k, b, dim) / temperature - expected[t]);
      for (int64_t d = 0; d < dim; ++d) mean[t * dim + d] += share * k.u[b * dim + d];
    }
  }
  std::vector<Real> kept(same && bounded ? kept_similarities(q.count) : 0);
  log_negatives<Real>(q, k, dim, temperature, bounded, negatives.data(), kept.empty() ? nullptr : kept.data(),
                      gemm<Real>, parallel);
  compare(what + ", log_negatives", negatives, expected, budget);
  std::fill(negatives.begin(), negatives.end(), 0.0);
  std::vector<Real> got_mean(mean.size(), Real(1));
  log_and_mean_negatives<Real>(q, k, dim, temperature, bounded, negatives.data(), got_mean.data(), gemm<Real>,
                               parallel);
  compare(what + ", log_and_mean_negatives", negatives, expected, budget);
  compare(what + ", mean", widened(got_mean), mean, budget);

  std::vector<Real> weight;
  for (double value : normal(q.count)) weight.push_back(static_cast<Real>(value));
  Values d_q(q.count * dim), d_k(k.count * dim);
  for (int64_t t = 0; t < q.count; ++t) {
    for (int64_t b = 0; b < k.count; ++b) {
      if (q.image[t] == k.image[b]) continue;
      const double g = weight[t] * std::exp(dot(q, t, k, b, dim) / temperature - lse[t]) / temperature;
      for (int64_t d = 0; d < dim; ++d) {
        d_q[t * dim + d] += g * k.u[b * dim + d];
        (same ? d_q : d_k)[b * dim + d] += g * q.u[t * dim + d];
      }
    }
  }
  const auto check_gradients = [&](bool need_query, bool need_key, const Real* kept) {
    // "Adds": the outputs hold something already.
    std::vector<Real> got_q(d_q.size(), Real(1)), got_k(d_k.size(), Real(1));
    negatives_gradient<Real>(q, k, dim, temperature, bounded, weight.data(), lse.data(), kept,
                             need_query ? got_q.data() : nullptr, need_key ? got_k.data() : nullptr, gemm<Real>,
                             parallel);
    for (Real& value : got_q) value -= 1;
    for (Real& value : got_k) value -= 1;
    compare(what + ", d_query", widened(got_q), need_query ? d_q : Values(d_q.size()), 10 * budget);
    if (!same) compare(what + ", d_key", widened(got_k), need_key ? d_k : Values(d_k.size()), 10 * budget);
  };
  if (same) {
    check_gradients(true, false, nullptr);
    if (bounded && q.count) check_gradients(true, false, kept.data());
    return;
  }
  for (bool need_query : {true, false}) {
    for (bool need_key : {true, false}) check_gradients(need_query, need_key, nullptr);
  }
}

// Embeddings of very different sizes, one of 0 and one that holds an Inf, from two tensors, some of them left out.
template <typename T, typename Real>
void check_rows(const std::string& what, Type type, bool normalize, int64_t dim, double budget) {
  const int64_t counts[] = {7, 5};
  std::vector<int64_t> index, positive;
  for (int64_t i = 11; i >= 0; --i) {
    if (i != 4) index.push_back(i);
  }
  const int64_t count = static_cast<int64_t>(index.size());
  for (int64_t i = 0; i < count; ++i) positive.push_back((3 * i + 1) % count);
  std::vector<std::vector<T>> x(2), d_x(2);
  for (int part = 0; part < 2; ++part) {
    int64_t row = 0;
    for (double value : normal(counts[part] * dim)) {
      const double scale = part == 1 && row / dim == 2 ? 0 : normalize ? std::pow(10, row / dim - 3) : 1;
      x[part].push_back(static_cast<T>(value * scale));
      ++row;
    }
    d_x[part].assign(x[part].size(), static_cast<T>(2.0));
  }
  x[0][6 * dim + dim / 2] = static_cast<T>(std::numeric_limits<double>::infinity());

  std::vector<Real> u(count * dim), scales(2 * count), coefficient, d_u;
  for (double value : normal(count * dim)) d_u.push_back(static_cast<Real>(value));
  for (double value : normal(count)) coefficient.push_back(static_cast<Real>(value));
  normalize_rows<Real>({x[0].data(), x[1].data(), counts[0], type, index.data(), count, dim}, normalize, u.data(),
                       scales.data(), parallel);
  Values dots(count);
  dot_rows(u.data(), u.data(), positive.data(), count, dim, dots.data(), parallel);
  normalize_rows_backward<Real>({d_x[0].data(), d_x[1].data(), counts[0], type, index.data(), count, dim}, d_u.data(),
                                u.data(), scales.data(), coefficient.data(), u.data(), positive.data(), parallel);

  const auto at = [&](auto& parts, int64_t row) { return parts[row >= counts[0]].data() + row % counts[0] * dim; };
  for (int64_t i = 0; i < count; ++i) {
    const std::string row = what + ", row " + std::to_string(index[i]);
    Values in(at(x, index[i]), at(x, index[i]) + dim), out(at(d_x, index[i]), at(d_x, index[i]) + dim), v(dim), dv(dim);
    double length = 0, radial = 0, dot = 0;
    for (double value : in) length += value * value;
    length = normalize ? std::max(std::sqrt(length), 1e-12) : 1;
    if (!std::isfinite(length) || index[i] == 6) {
      if (u[i * dim] == u[i * dim] || out[0] == out[0]) std::printf("%s: no NaN\n", row.c_str()), ++failures;
      continue;
    }
    for (int64_t d = 0; d < dim; ++d) v[d] = in[d] / length;
    compare(row + ", u", Values(u.begin() + i * dim, u.begin() + (i + 1) * dim), v, budget);
    for (int64_t d = 0; d < dim; ++d) {
      dot += double(u[i * dim + d]) * u[positive[i] * dim + d];
      dv[d] = d_u[i * dim + d] + double(coefficient[i]) * u[positive[i] * dim + d];
      radial += v[d] * dv[d];
    }
    if (std::isfinite(dot)) compare(row + ", dot", {dots[i]}, {dot}, 1e-12);
    if (!std::isfinite(dv[0])) continue;
    const bool flat = normalize && length <= 1e-12;  // no direction, and no gradient
    for (int64_t d = 0; d < dim; ++d) dv[d] = flat ? 0 : (dv[d] - (normalize ? radial * v[d] : 0)) / length;
    compare(row + ", dx", out, dv, std::max(budget, sizeof(T) == 2 ? 1.0 / 128 : 0));
  }
  for (int64_t d = 0; d < dim; ++d) {
    if (static_cast<double>(d_x[0][4 * dim + d]) != 2) std::printf("%s: wrote row 4\n", what.c_str()), ++failures;
  }
}

void check_all_rows() {
  for (bool normalize : {true, false}) {
    for (int64_t dim : {1, 17, 64}) {
      const std::string what = "rows of " + std::to_string(dim) + (normalize ? ", normalized" : "");
      check_rows<float, float>(what + ", float32", Type::float32, normalize, dim, 1e-6);
      check_rows<double, double>(what + ", float64", Type::float64, normalize, dim, 1e-14);
      check_rows<bfloat16, float>(what + ", bfloat16", Type::bfloat16, normalize, dim, 1e-6);
    }
  }
}

template <typename Real>
void check_losses(const std::string& type) {
  // Rows, rows of an image, rows of the first image: a ragged tail, blocks of one image, one image, one row,
  // none.
  const int64_t sets[][3] = {{1100, 7, 0}, {700, 3, 530}, {300, 1, 0}, {256, 300, 0}, {1, 1, 0}, {0, 1, 0}};
  for (bool bounded : {true, false}) {
    for (const auto& [count, run, large] : sets) {
      const std::string what = type + (bounded ? ", bounded, " : ", unbounded, ") + std::to_string(count) + " rows";
      const Set<Real> query(count, 3, run, 1, large, bounded);
      check_pair(what, query, query, bounded);
      for (int64_t keys : {0, 1, 600}) {
        check_pair(what + ", " + std::to_string(keys) + " keys", query, Set<Real>(keys, 3, 5, 2, large, bounded),
                   bounded);
      }
    }
  }
}

}  // namespace

int main() {
  check_group_actions();
  check_all_rows();
  check_losses<float>("float");
  check_losses<double>("double");
  return failures != 0;
}
