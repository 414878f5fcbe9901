// What the bindings of all devices need: torch tensors as pointers, and the checks of the operator that all have.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <iterator>
#include <vector>

#include "arguments.h"
#include "common/lattices.h"
#include "common/resampling.h"
#include "common/types.h"

namespace ser_fast {

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

// sizes: height_in, width_in, height_out, width_out.
inline Lattices check_group_action(const Tensor& x, const Tensor& linear, const Tensor& offset, const Tensor& out,
                                   const std::vector<int64_t>& sizes, int64_t interpolation, int64_t padding,
                                   bool transpose) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const Arguments check("group_action", x);
  check.that(sizes.size() == 4, "sizes", "another count", "height_in, width_in, height_out, width_out");
  for (int64_t size : sizes) check.number("sizes", size, 0, most);
  const int64_t inputs = sizes[0] * sizes[1], outputs = sizes[2] * sizes[3];
  check.number("sizes (tokens)", std::max(inputs, outputs), 0, most);
  check.number("interpolation", interpolation, 0, std::size(kInterpolationNames) - 1);
  check.number("padding", padding, 0, std::size(kPaddingNames) - 1);
  const Type type = check.floats("x", x, {kAny, transpose ? outputs : inputs, kAny});
  check.tensor("out", out, dtype_of(type), {x.size(0), transpose ? inputs : outputs, x.size(2)});
  check.tensor("linear", linear, ScalarType::Double, {x.size(0), 2, 2});
  check.tensor("offset", offset, ScalarType::Double, {x.size(0), 2});
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

}  // namespace ser_fast
