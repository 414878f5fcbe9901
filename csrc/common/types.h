// The dtypes that the kernels take.
#pragma once

#include <cstdint>

namespace ser_fast {

enum class Type { float32, float64, bfloat16, float16 };
constexpr const char* kTypeNames[] = {"float32", "float64", "bfloat16", "float16"};  // torch's

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

constexpr int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

}  // namespace ser_fast
