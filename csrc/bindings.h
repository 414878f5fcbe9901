// What the bindings of all devices need: torch tensors as pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/resampling.h"
#include "common/types.h"

namespace ser_fast {

using torch::stable::Tensor;

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Type::float32;
    case torch::headeronly::ScalarType::Double: return Type::float64;
    case torch::headeronly::ScalarType::BFloat16: return Type::bfloat16;
    case torch::headeronly::ScalarType::Half: return Type::float16;
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

inline Resampling make_resampling(int64_t interpolation, int64_t padding, bool antialias) {
  return {static_cast<Interpolation>(interpolation), static_cast<Padding>(padding), antialias};
}

}  // namespace ser_fast
