// How the operators check what they are given, whoever calls them: the kernels trust shapes, dtypes and places.
//
// Numbers that are indices are looked at here on the CPU alone; on a GPU that would wait for the device, and the
// kernels keep them within bounds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "common/types.h"

namespace ser_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // a size that is not checked

inline ScalarType dtype_of(Type type) {
  switch (type) {
    case Type::float64: return ScalarType::Double;
    case Type::bfloat16: return ScalarType::BFloat16;
    case Type::float16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

// What sums of a type are taken in.
inline ScalarType accumulator_of(Type type) { return type == Type::float64 ? ScalarType::Double : ScalarType::Float; }

// The checks of one call: errors are one line, "OPERATOR: ARGUMENT: got ..., takes ...".
class Arguments {
 public:
  // All tensors have the device of `first`.
  Arguments(const char* op, const Tensor& first) : op_(op), device_(device(first)) {}

  // x is contiguous, is all there, and has this dtype and shape.
  void tensor(const char* name, const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> shape) const {
    if (x.scalar_type() != dtype) fail(name, toString(x.scalar_type()), toString(dtype));
    const auto sizes = x.sizes();
    bool fits = sizes.size() == shape.size();
    for (size_t i = 0; fits && i < sizes.size(); ++i) {
      const int64_t size = shape.begin()[i];
      fits = size == kAny || size == sizes[i];
    }
    if (!fits) fail(name, text(sizes.begin(), sizes.end()), text(shape.begin(), shape.end()));
    if (!x.is_contiguous()) fail(name, "a tensor with gaps", "a contiguous one");
    if (device(x) != device_) fail(name, "another device", "that of the other tensors");
    int64_t bytes, offset;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(x.get(), &offset));
    if ((offset + x.numel()) * static_cast<int64_t>(x.element_size()) > bytes)
      fail(name, "too little memory", "its own");
  }

  // The same for a tensor of any of the dtypes that rows and tokens have.
  Type floats(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) const {
    switch (x.scalar_type()) {
      case ScalarType::Float:
      case ScalarType::Double:
      case ScalarType::BFloat16:
      case ScalarType::Half: break;
      default: fail(name, toString(x.scalar_type()), "float32, float64, bfloat16 or float16");
    }
    tensor(name, x, x.scalar_type(), shape);
    switch (x.scalar_type()) {
      case ScalarType::Double: return Type::float64;
      case ScalarType::BFloat16: return Type::bfloat16;
      case ScalarType::Half: return Type::float16;
      default: return Type::float32;
    }
  }

  // (n,) int64 on the CPU, each in [0, count).
  void indices(const char* name, const Tensor& x, int64_t n, int64_t count) const {
    tensor(name, x, ScalarType::Long, {n});
    const int64_t* at = static_cast<const int64_t*>(x.const_data_ptr());
    int64_t least = 0, most = 0;
    for (int64_t i = 0; i < x.numel(); ++i) {
      least = std::min(least, at[i]);
      most = std::max(most, at[i]);
    }
    if (x.numel() > 0 && (least < 0 || most >= count)) {
      std::ostringstream got, takes;
      got << "rows " << least << " to " << most;
      takes << "0 to " << count - 1;
      fail(name, got.str(), takes.str());
    }
  }

  void number(const char* name, int64_t value, int64_t least, int64_t most) const {
    if (value >= least && value <= most) return;
    std::ostringstream got, takes;
    got << value;
    takes << least << " to " << most;
    fail(name, got.str(), takes.str());
  }

  void that(bool holds, const char* name, const char* got, const char* takes) const {
    if (!holds) fail(name, got, takes);
  }

  void temperature(double value) const {
    if (value > 0 && value <= std::numeric_limits<double>::max()) return;
    std::ostringstream got;
    got << value;
    fail("temperature", got.str(), "a finite positive number");
  }

 private:
  struct Place {
    int32_t type, index;
    bool operator==(const Place&) const = default;
  };

  static Place device(const Tensor& x) {
    Place place;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &place.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &place.index));
    return place;
  }

  static std::string text(const int64_t* begin, const int64_t* end) {
    std::ostringstream out;
    out << "shape (";
    for (const int64_t* at = begin; at != end; ++at) {
      out << (at == begin ? "" : ", ");
      if (*at == kAny) {
        out << "any";
      } else {
        out << *at;
      }
    }
    out << ")";
    return out.str();
  }

  [[noreturn, gnu::noinline]] void fail(const char* name, const std::string& got, const std::string& takes) const {
    throw std::runtime_error(std::string(op_) + ": " + name + ": got " + got + ", takes " + takes);
  }

  const char* op_;
  Place device_;
};

}  // namespace ser_fast
