// Runs the CUDA kernels on threads of the system, against the CPU kernels: what the sanitizers watch.
// Exits with 1, and says where, if a value is wrong.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/group_action.h"
#include "cuda/group_action.h"
#include "host_cuda.h"

using namespace ser_fast;

namespace {

constexpr double kMaps[][6] = {
    // linear by rows, offset
    {0, -1, 1, 0, 0, 0},             // copy, turned
    {0.7, 0, 0, 1.6, 0.3, -0.2},     // separable
    {1, 0, 0, 0.5, 0.5, -0.25},      // separable, every second token a copy
    {0.8, -0.5, 0.5, 0.8, 0.1, 0.7}  // general
};
constexpr int64_t kBatch = std::size(kMaps);

int failures = 0;

void in_order(int64_t count, const std::function<void(int64_t, int64_t)>& body) { body(0, count); }

void check(const char* what, int64_t channels, const Lattices& n, const Resampling& resampling, bool transpose) {
  std::vector<double> linear, offset;
  for (const auto& map : kMaps) {
    linear.insert(linear.end(), map, map + 4);
    offset.insert(offset.end(), map + 4, map + 6);
  }
  int64_t read = n.height_in * n.width_in, written = n.height_out * n.width_out;
  if (transpose) std::swap(read, written);
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kBatch * read * channels), expected(kBatch * written * channels), out(expected.size());
  for (float& value : x) value = normal(generator);
  group_action(x.data(), linear.data(), offset.data(), expected.data(), Type::float32, kBatch, channels, n, resampling,
               transpose, in_order);
  const char* error = cuda::group_action(x.data(), linear.data(), offset.data(), out.data(), Type::float32, kBatch,
                                         channels, n, resampling, transpose, nullptr);
  for (size_t i = 0; error == nullptr && i < out.size(); ++i) {
    if (!(std::abs(out[i] - expected[i]) <= 1e-5f)) error = "a wrong value";
  }
  if (error == nullptr) return;
  std::printf("%s, %ld channels, transpose %d: %s\n", what, static_cast<long>(channels), transpose, error);
  ++failures;
}

}  // namespace

int main() {
  for (const bool transpose : {false, true}) {
    host_cuda::shared_limit = 163 << 10;
    check("slab by slab", 168, {5, 7, 6, 4}, {Interpolation::bicubic, Padding::border, false}, transpose);
    check("one by one", 5, {4, 5, 3, 6}, {Interpolation::lanczos3, Padding::reflection, true}, transpose);
    host_cuda::shared_limit = 2 << 10;
    check("in chunks", 3, {5, 7, 6, 4}, {Interpolation::bicubic, Padding::zeros, false}, transpose);
  }
  return failures != 0;
}
