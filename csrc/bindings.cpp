// The extension ser_fast._C: torch tensors in, pointers to the kernels. The kernels include no torch header.
//
// Everything is validated in Python (ser_fast/ops); outputs are allocated there and written here.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <type_traits>
#include <vector>

#include "cpu/group_action.h"
#include "cpu/nt_xent.h"

// libtorch's own BLAS (MKL or OpenBLAS), column-major.
extern "C" {
void sgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb, const float* beta,
            float* c, const int* ldc);
void dgemm_(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
            const double* alpha, const double* a, const int* lda, const double* b, const int* ldb, const double* beta,
            double* c, const int* ldc);
int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));  // only where MKL is that BLAS
}

namespace {

using torch::stable::Tensor;

// Products stay on the thread that asks for them, also where a single part leaves the others idle: how MKL would split
// one must not show in the bits.
void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    body(begin, end);
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  });
}

template <typename Real>
void gemm(bool transpose_a, bool transpose_b, int64_t rows, int64_t columns, int64_t depth, Real alpha, const Real* a,
          int64_t lda, const Real* b, int64_t ldb, Real beta, Real* c, int64_t ldc) {
  // Row-major C = A B is column-major C' = B' A'.
  const char *first = transpose_b ? "T" : "N", *second = transpose_a ? "T" : "N";
  const int m = columns, n = rows, k = depth, ld_a = lda, ld_b = ldb, ld_c = ldc;
  if constexpr (std::is_same_v<Real, float>) {
    sgemm_(first, second, &m, &n, &k, &alpha, b, &ld_b, a, &ld_a, &beta, c, &ld_c);
  } else {
    dgemm_(first, second, &m, &n, &k, &alpha, b, &ld_b, a, &ld_a, &beta, c, &ld_c);
  }
}

ser_fast::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return ser_fast::Type::float32;
    case torch::headeronly::ScalarType::Double: return ser_fast::Type::float64;
    case torch::headeronly::ScalarType::BFloat16: return ser_fast::Type::bfloat16;
    case torch::headeronly::ScalarType::Half: return ser_fast::Type::float16;
    default: STD_TORCH_CHECK(false, "ser_fast: a dtype that Python did not check");
  }
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* output(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// sizes: height_in, width_in, height_out, width_out.
void group_action(Tensor x, Tensor linear, Tensor offset, Tensor out, std::vector<int64_t> sizes, int64_t interpolation,
                  int64_t padding, bool antialias, bool transpose) {
  const ser_fast::Resampling how{static_cast<ser_fast::Interpolation>(interpolation),
                                 static_cast<ser_fast::Padding>(padding), antialias};
  ser_fast::group_action(x.const_data_ptr(), data<double>(linear), data<double>(offset), out.mutable_data_ptr(), type_of(x),
                         x.size(0), x.size(2), {sizes[0], sizes[1], sizes[2], sizes[3]}, how, transpose, parallel);
}

template <typename Real>
ser_fast::Rows<Real> rows_of(const Tensor& u, const Tensor& image) {
  return {data<Real>(u), data<int64_t>(image), u.size(0)};
}

template <typename Real>
void log_negatives_of(const Tensor& query, const Tensor& image, const Tensor& key, const Tensor& key_image,
                      const Tensor& out, double temperature, bool bounded) {
  ser_fast::log_negatives<Real>(rows_of<Real>(query, image), rows_of<Real>(key, key_image), query.size(1),
                                static_cast<Real>(temperature), bounded, output<double>(out), gemm<Real>, parallel);
}

template <typename Real>
void negatives_gradient_of(const Tensor& query, const Tensor& image, const Tensor& key, const Tensor& key_image,
                           const Tensor& weight, const Tensor& lse, const Tensor& d_query, const Tensor& d_key,
                           double temperature, bool bounded) {
  ser_fast::negatives_gradient<Real>(rows_of<Real>(query, image), rows_of<Real>(key, key_image), query.size(1),
                                     static_cast<Real>(temperature), bounded, data<Real>(weight), data<double>(lse),
                                     output<Real>(d_query), output<Real>(d_key), gemm<Real>, parallel);
}

void log_negatives(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor out, double temperature, bool bounded) {
  const auto run = type_of(query) == ser_fast::Type::float64 ? log_negatives_of<double> : log_negatives_of<float>;
  run(query, image, key, key_image, out, temperature, bounded);
}

// d_query and d_key are added to; an empty one is not needed.
void negatives_gradient(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor weight, Tensor lse,
                        Tensor d_query, Tensor d_key, double temperature, bool bounded) {
  const auto run = type_of(query) == ser_fast::Type::float64 ? negatives_gradient_of<double> : negatives_gradient_of<float>;
  run(query, image, key, key_image, weight, lse, d_query, d_key, temperature, bounded);
}

}  // namespace

STABLE_TORCH_LIBRARY(ser_fast_native, m) {
  m.def(
      "group_action(Tensor x, Tensor linear, Tensor offset, Tensor(a!) out, int[] sizes, int interpolation, "
      "int padding, bool antialias, bool transpose) -> ()");
  m.def(
      "log_negatives(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor(a!) out, float temperature, "
      "bool bounded) -> ()");
  m.def(
      "negatives_gradient(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor weight, Tensor lse, "
      "Tensor(a!) d_query, Tensor(b!) d_key, float temperature, bool bounded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ser_fast_native, CPU, m) {
  m.impl("group_action", TORCH_BOX(&group_action));
  m.impl("log_negatives", TORCH_BOX(&log_negatives));
  m.impl("negatives_gradient", TORCH_BOX(&negatives_gradient));
}

// `import ser_fast._C` loads the library; there is nothing else in the module.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
