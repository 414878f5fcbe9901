#pragma once

#include <cstdint>

namespace ser_fast {

// The sizes of the lattices that a map takes tokens from and moves them to.
struct Lattices {
  int64_t height_in, width_in, height_out, width_out;
};

}  // namespace ser_fast
