#pragma once

#include <cstdint>

namespace ser_fast {

enum class Type { float32, float64, bfloat16, float16 };

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

}  // namespace ser_fast
