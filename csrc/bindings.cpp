// The extension ser_fast._C: the schemas of all operators, the CPU kernels, and the constants that Python shares with
// C++.
//
// Torch tensors come in, pointers go to the kernels, which include no torch header. The kernels for GPUs are an
// extension of their own (bindings_cuda.cpp), so that this one loads with a torch that has no CUDA, or another one.
// The public functions in Python (ser_fast/ops) validate what users give, in their words; what would reach foreign
// memory is refused here, too, for whoever calls an operator by its name. Outputs are allocated in Python.

#include <Python.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <new>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "common/tiles.h"
#include "cpu/group_action.h"
#include "cpu/normalize_rows.h"
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

using ser_fast::accumulator_of, ser_fast::Arguments, ser_fast::data, ser_fast::kAny, ser_fast::make_resampling;
using ser_fast::output, ser_fast::ScalarType, ser_fast::Tensor, ser_fast::Type, ser_fast::type_of;

// Products stay on the thread that asks for them, also where a single part leaves the others idle: how MKL would split
// one must not show in the bits.
void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::atomic<bool> enough_memory = true;  // an exception that leaves a thread's part would lose its words
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    try {
      body(begin, end);
    } catch (const std::bad_alloc&) {
      enough_memory = false;
    }
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  });
  if (!enough_memory) throw std::runtime_error("ser_fast: there is not enough memory for this call");
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

void group_action(Tensor x, Tensor linear, Tensor offset, Tensor out, std::vector<int64_t> sizes, int64_t interpolation,
                  int64_t padding, bool antialias, bool transpose) {
  const ser_fast::Lattices lattices =
      ser_fast::check_group_action(x, linear, offset, out, sizes, interpolation, padding, transpose);
  ser_fast::group_action(x.const_data_ptr(), data<double>(linear), data<double>(offset), out.mutable_data_ptr(),
                         type_of(x), x.size(0), x.size(2), lattices, make_resampling(interpolation, padding, antialias),
                         transpose, parallel);
}

// first, second: (N, dim); second is empty for one set of rows. index: (n,).
ser_fast::IndexedRows indexed_rows(const Tensor& first, const Tensor& second, const Tensor& index) {
  return {first.const_data_ptr(), second.const_data_ptr(), first.size(0), type_of(first),
          data<int64_t>(index),   index.size(0),           first.size(1)};
}

void normalize_rows(Tensor first, Tensor second, Tensor index, bool normalize, Tensor u, Tensor scales) {
  const Arguments check("normalize_rows", first);
  const Type type = check.floats("first", first, {kAny, kAny});
  check.tensor("second", second, first.scalar_type(), {kAny, first.size(1)});
  check.indices("index", index, kAny, first.size(0) + second.size(0));
  check.tensor("u", u, accumulator_of(type), {index.size(0), first.size(1)});
  check.tensor("scales", scales, accumulator_of(type), {index.size(0), 2});
  const ser_fast::IndexedRows x = indexed_rows(first, second, index);
  if (type_of(u) == ser_fast::Type::float64) {
    ser_fast::normalize_rows(x, normalize, output<double>(u), output<double>(scales), parallel);
  } else {
    ser_fast::normalize_rows(x, normalize, output<float>(u), output<float>(scales), parallel);
  }
}

template <typename Real>
void normalize_rows_backward_of(const ser_fast::IndexedRows& d_x, const Tensor& d_u, const Tensor& u,
                                const Tensor& scales, const Tensor& coefficient, const Tensor& other,
                                const Tensor& positive) {
  ser_fast::normalize_rows_backward(d_x, data<Real>(d_u), data<Real>(u), data<Real>(scales),
                                    coefficient.numel() ? data<Real>(coefficient) : nullptr, data<Real>(other),
                                    data<int64_t>(positive), parallel);
}

// Writes the rows of d_first and d_second that the index names. coefficient: (n,), or empty.
void normalize_rows_backward(Tensor d_first, Tensor d_second, Tensor index, Tensor d_u, Tensor u, Tensor scales,
                             Tensor coefficient, Tensor other, Tensor positive) {
  const Arguments check("normalize_rows_backward", d_first);
  const Type type = check.floats("d_first", d_first, {kAny, kAny});
  const ScalarType real = accumulator_of(type);
  check.tensor("d_second", d_second, d_first.scalar_type(), {kAny, d_first.size(1)});
  check.indices("index", index, kAny, d_first.size(0) + d_second.size(0));
  check.tensor("d_u", d_u, real, {index.size(0), d_first.size(1)});
  check.tensor("u", u, real, {index.size(0), d_first.size(1)});
  check.tensor("scales", scales, real, {index.size(0), 2});
  if (coefficient.numel() > 0) {
    check.tensor("coefficient", coefficient, real, {index.size(0)});
    check.tensor("other", other, real, {kAny, d_first.size(1)});
    check.indices("positive", positive, index.size(0), other.size(0));
  }
  const auto run =
      type_of(u) == ser_fast::Type::float64 ? normalize_rows_backward_of<double> : normalize_rows_backward_of<float>;
  run(indexed_rows(d_first, d_second, index), d_u, u, scales, coefficient, other, positive);
}

// Rows of float32 or float64, which the kernels compute in.
ScalarType check_real(const Arguments& check, const char* name, const Tensor& x) {
  const Type type = check.floats(name, x, {kAny, kAny});
  check.that(type == Type::float32 || type == Type::float64, name, "16 bits", "float32 or float64");
  return x.scalar_type();
}

void dot_rows(Tensor u, Tensor other, Tensor positive, Tensor out) {
  const Arguments check("dot_rows", u);
  check.tensor("other", other, check_real(check, "u", u), {kAny, u.size(1)});
  check.indices("positive", positive, u.size(0), other.size(0));
  check.tensor("out", out, ScalarType::Double, {u.size(0)});
  const int64_t* rows = data<int64_t>(positive);
  if (type_of(u) == ser_fast::Type::float64) {
    ser_fast::dot_rows(data<double>(u), data<double>(other), rows, u.size(0), u.size(1), output<double>(out), parallel);
  } else {
    ser_fast::dot_rows(data<float>(u), data<float>(other), rows, u.size(0), u.size(1), output<double>(out), parallel);
  }
}

template <typename Real>
ser_fast::Embeddings<Real> embeddings(const Tensor& u, const Tensor& image) {
  return {data<Real>(u), data<int64_t>(image), u.size(0)};
}

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

int64_t kept_similarities(int64_t count) {
  if (count < 0 || count > kMostRows) throw std::runtime_error("kept_similarities: count: takes 0 to 2^31 - 1");
  return ser_fast::kept_similarities(count);
}

// Queries and keys: rows of float32 or float64, sorted by image. Returns that dtype.
ScalarType check_embeddings(const Arguments& check, const Tensor& query, const Tensor& image, const Tensor& key,
                            const Tensor& key_image, double temperature) {
  const ScalarType real = check_real(check, "query", query);
  check.number("query (columns)", query.size(1), 1, kMostRows);  // the library multiplies by ints
  check.tensor("key", key, real, {kAny, query.size(1)});
  const bool same = query.numel() > 0 && query.const_data_ptr() == key.const_data_ptr();
  check.that(!same || query.size(0) == key.size(0), "key", "a part of query", "query itself, or other memory");
  const auto sorted = [&](const char* name, const Tensor& x, int64_t n) {
    check.tensor(name, x, ScalarType::Long, {n});
    const int64_t* at = data<int64_t>(x);
    check.that(std::is_sorted(at, at + n), name, "numbers in any order", "them ascending");
  };
  sorted("image", image, query.size(0));
  sorted("key_image", key_image, key.size(0));
  check.temperature(temperature);
  return real;
}

// kept: bytes of the similarities of query with itself, or none.
void check_kept(const Arguments& check, const Tensor& kept, const Tensor& query, const Tensor& key, bool bounded) {
  check.tensor("kept", kept, ScalarType::Byte, {kAny});
  if (kept.numel() == 0) return;
  check.that(query.const_data_ptr() == key.const_data_ptr() && bounded, "kept", "bytes",
             "none but for one set of rows");
  const int64_t size = static_cast<int64_t>(query.element_size());
  check.number("kept (bytes)", kept.numel(), size * ser_fast::kept_similarities(query.size(0)), INT64_MAX);
  check.that(reinterpret_cast<uintptr_t>(kept.const_data_ptr()) % size == 0, "kept", "bytes between two numbers",
             "an address that a number can have");
}

template <typename Real>
void log_negatives_of(const Tensor& query, const Tensor& image, const Tensor& key, const Tensor& key_image,
                      const Tensor& out, const Tensor& kept, double temperature, bool bounded) {
  ser_fast::log_negatives<Real>(embeddings<Real>(query, image), embeddings<Real>(key, key_image), query.size(1),
                                static_cast<Real>(temperature), bounded, output<double>(out), output<Real>(kept),
                                gemm<Real>, parallel);
}

// kept: bytes, or empty.
void log_negatives(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor out, Tensor kept,
                   double temperature, bool bounded) {
  const Arguments check("log_negatives", query);
  check_embeddings(check, query, image, key, key_image, temperature);
  check.tensor("out", out, ScalarType::Double, {query.size(0)});
  check_kept(check, kept, query, key, bounded);
  const auto run = type_of(query) == ser_fast::Type::float64 ? log_negatives_of<double> : log_negatives_of<float>;
  run(query, image, key, key_image, out, kept, temperature, bounded);
}

template <typename Real>
void log_and_mean_negatives_of(const Tensor& query, const Tensor& image, const Tensor& key, const Tensor& key_image,
                               const Tensor& out, const Tensor& mean, double temperature, bool bounded) {
  ser_fast::log_and_mean_negatives<Real>(embeddings<Real>(query, image), embeddings<Real>(key, key_image),
                                         query.size(1), static_cast<Real>(temperature), bounded, output<double>(out),
                                         output<Real>(mean), gemm<Real>, parallel);
}

void log_and_mean_negatives(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor out, Tensor mean,
                            double temperature, bool bounded) {
  const Arguments check("log_and_mean_negatives", query);
  const ScalarType real = check_embeddings(check, query, image, key, key_image, temperature);
  check.tensor("out", out, ScalarType::Double, {query.size(0)});
  check.tensor("mean", mean, real, {query.size(0), query.size(1)});
  const auto run =
      type_of(query) == ser_fast::Type::float64 ? log_and_mean_negatives_of<double> : log_and_mean_negatives_of<float>;
  run(query, image, key, key_image, out, mean, temperature, bounded);
}

template <typename Real>
void negatives_gradient_of(const Tensor& query, const Tensor& image, const Tensor& key, const Tensor& key_image,
                           const Tensor& weight, const Tensor& lse, const Tensor& kept, const Tensor& d_query,
                           const Tensor& d_key, double temperature, bool bounded) {
  ser_fast::negatives_gradient<Real>(embeddings<Real>(query, image), embeddings<Real>(key, key_image), query.size(1),
                                     static_cast<Real>(temperature), bounded, data<Real>(weight), data<double>(lse),
                                     kept.numel() ? data<Real>(kept) : nullptr, output<Real>(d_query),
                                     output<Real>(d_key), gemm<Real>, parallel);
}

// d_query and d_key are added to; an empty one is not needed.
void negatives_gradient(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor weight, Tensor lse,
                        Tensor kept, Tensor d_query, Tensor d_key, double temperature, bool bounded) {
  const Arguments check("negatives_gradient", query);
  const ScalarType real = check_embeddings(check, query, image, key, key_image, temperature);
  check.tensor("weight", weight, real, {query.size(0)});
  check.tensor("lse", lse, ScalarType::Double, {query.size(0)});
  check_kept(check, kept, query, key, bounded);
  if (d_query.numel() > 0) check.tensor("d_query", d_query, real, {query.size(0), query.size(1)});
  if (d_key.numel() > 0) check.tensor("d_key", d_key, real, {key.size(0), key.size(1)});
  const auto run =
      type_of(query) == ser_fast::Type::float64 ? negatives_gradient_of<double> : negatives_gradient_of<float>;
  run(query, image, key, key_image, weight, lse, kept, d_query, d_key, temperature, bounded);
}

}  // namespace

STABLE_TORCH_LIBRARY(ser_fast_native, m) {
  m.def(
      "group_action(Tensor x, Tensor linear, Tensor offset, Tensor(a!) out, int[] sizes, int interpolation, "
      "int padding, bool antialias, bool transpose) -> ()");
  m.def(
      "normalize_rows(Tensor first, Tensor second, Tensor index, bool normalize, Tensor(a!) u, Tensor(b!) scales) -> "
      "()");
  m.def(
      "normalize_rows_backward(Tensor(a!) d_first, Tensor(b!) d_second, Tensor index, Tensor d_u, Tensor u, Tensor "
      "scales, "
      "Tensor coefficient, Tensor other, Tensor positive) -> ()");
  m.def("dot_rows(Tensor u, Tensor other, Tensor positive, Tensor(a!) out) -> ()");
  m.def("kept_similarities(int count) -> int");
  m.def(
      "log_negatives(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor(a!) out, Tensor(b!) kept, "
      "float temperature, bool bounded) -> ()");
  m.def(
      "log_and_mean_negatives(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor(a!) out, "
      "Tensor(b!) mean, float temperature, bool bounded) -> ()");
  m.def(
      "negatives_gradient(Tensor query, Tensor image, Tensor key, Tensor key_image, Tensor weight, Tensor lse, "
      "Tensor kept, Tensor(a!) d_query, Tensor(b!) d_key, float temperature, bool bounded) -> ()");
  // On GPUs only: the steps of the losses (csrc/cuda).
  m.def(
      "nt_xent_prepare(Tensor x0, Tensor x1, Tensor image, Tensor valid, Tensor(a!) u, Tensor(b!) table, "
      "bool normalize) -> ()");
  m.def(
      "nt_xent_symmetric_sums(Tensor u, Tensor table, Tensor(a!) sums, Tensor(b!) kept, float scale, int count) -> ()");
  m.def(
      "nt_xent_row_sums(Tensor q, Tensor q_table, Tensor k, Tensor k_table, Tensor(a!) state, float scale, int keys) "
      "-> ()");
  m.def(
      "nt_xent_panel_row_sums(Tensor panel, Tensor q_table, Tensor k_table, Tensor(a!) state, int first_row, "
      "int first_key) -> ()");
  m.def(
      "nt_xent_losses(Tensor q0, Tensor q1, Tensor k0, Tensor k1, Tensor positive, Tensor table, Tensor state, "
      "Tensor(a!) loss, float temperature, bool views, bool summed, bool normalize) -> ()");
  m.def(
      "nt_xent_gradient_weights(Tensor q0, Tensor q1, Tensor k0, Tensor k1, Tensor positive, Tensor table, Tensor "
      "weight, "
      "Tensor largest, Tensor loss, Tensor(a!) out, float temperature, bool views, bool bounded, bool library, "
      "bool normalize) -> ()");
  m.def(
      "nt_xent_stationary_gradient(Tensor q, Tensor q_table, Tensor q_weights, Tensor k, Tensor k_table, "
      "Tensor k_weights, Tensor(a!) out, float scale, int keys, bool bounded, bool by_row, bool by_key) -> ()");
  m.def(
      "nt_xent_gradient_panel(Tensor q, Tensor q_table, Tensor q_weights, Tensor k, Tensor k_table, "
      "Tensor k_weights, Tensor kept, Tensor(a!) panel, float scale, int first_row, int first_key, int source, "
      "bool bounded, bool by_row, bool by_key) -> ()");
  m.def(
      "nt_xent_finish_gradient(Tensor x0, Tensor x1, Tensor y0, Tensor y1, Tensor table, Tensor gradient_weights, "
      "Tensor positive, "
      "Tensor order, Tensor first, Tensor accumulated, Tensor largest, Tensor(a!) d_x0, Tensor(b!) d_x1, "
      "float temperature, int side, bool library, bool normalize) -> ()");
  m.def(
      "nt_xent_detached_sums(Tensor q, Tensor q_table, Tensor k, Tensor k_table, Tensor(a!) state, Tensor(b!) out, "
      "float scale, int keys, bool bounded) -> ()");
  m.def(
      "nt_xent_finish_detached(Tensor query, Tensor key, Tensor positive, Tensor table, Tensor state, "
      "Tensor accumulated, Tensor(a!) loss, Tensor(b!) gradient, float temperature, bool normalize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ser_fast_native, CPU, m) {
  m.impl("group_action", TORCH_BOX(&group_action));
  m.impl("normalize_rows", TORCH_BOX(&normalize_rows));
  m.impl("normalize_rows_backward", TORCH_BOX(&normalize_rows_backward));
  m.impl("dot_rows", TORCH_BOX(&dot_rows));
  m.impl("log_negatives", TORCH_BOX(&log_negatives));
  m.impl("log_and_mean_negatives", TORCH_BOX(&log_and_mean_negatives));
  m.impl("negatives_gradient", TORCH_BOX(&negatives_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(ser_fast_native, CompositeExplicitAutograd, m) {
  m.impl("kept_similarities", TORCH_BOX(&kept_similarities));
}

namespace {

// Takes the reference `value`; null, as a constructor leaves it with an error set, is passed on.
bool add(PyObject* module, const char* name, PyObject* value) {
  if (value == nullptr) return false;
  const bool added = PyModule_AddObjectRef(module, name, value) == 0;
  Py_DECREF(value);
  return added;
}

// The names of an enumeration, in the order of its numbers.
template <size_t count>
bool add(PyObject* module, const char* name, const char* const (&names)[count]) {
  PyObject* tuple = PyTuple_New(count);
  for (size_t i = 0; tuple != nullptr && i < count; ++i) PyTuple_SetItem(tuple, i, PyUnicode_FromString(names[i]));
  return add(module, name, tuple);
}

// ((columns, rows, keys, shared memory), ...)
bool add_stationary_blocks(PyObject* module) {
  constexpr Py_ssize_t count = std::size(ser_fast::kStationaryBlocks);
  PyObject* blocks = PyTuple_New(count);
  for (Py_ssize_t i = 0; blocks != nullptr && i < count; ++i) {
    const ser_fast::StationaryBlock& block = ser_fast::kStationaryBlocks[i];
    PyTuple_SetItem(blocks, i, Py_BuildValue("iiii", block.columns, block.rows, block.keys, block.shared_memory));
  }
  return add(module, "STATIONARY_BLOCKS", blocks);
}

bool add_constants(PyObject* module) {
  return PyModule_AddIntConstant(module, "SPAN", ser_fast::kSpan) == 0 &&
         PyModule_AddIntConstant(module, "KEPT_EXPONENT", ser_fast::kKeptExponent) == 0 &&
         PyModule_AddIntConstant(module, "TILE", ser_fast::kTile) == 0 &&
         add(module, "LARGEST_WEIGHT", PyFloat_FromDouble(ser_fast::kLargestWeight)) && add_stationary_blocks(module) &&
         add(module, "DTYPES", ser_fast::kTypeNames) && add(module, "INTERPOLATIONS", ser_fast::kInterpolationNames) &&
         add(module, "PADDINGS", ser_fast::kPaddingNames) && add(module, "SOURCES", ser_fast::kSourceNames) &&
         add(module, "SIDES", ser_fast::kSideNames);
}

}  // namespace

// `import ser_fast._C` registers the operators; the module itself holds the constants.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && !add_constants(module)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
