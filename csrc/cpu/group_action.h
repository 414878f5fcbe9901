// The group action on a lattice of tokens: out = W_g x, or W_g^T x, a sparse row operator for each sample.
#pragma once

#include <cstdint>

#include "common/lattices.h"
#include "common/resampling.h"
#include "common/types.h"
#include "cpu/parallel.h"

namespace ser_fast {

// x, out: (batch, tokens, channels), contiguous. linear: (batch, 2, 2), offset: (batch, 2), float64, as in LatticeMap.
// transpose: x lives on the output lattice and out on the input lattice.
void group_action(const void* x, const double* linear, const double* offset, void* out, Type type, int64_t batch,
                  int64_t channels, const Lattices& lattices, const Resampling& resampling, bool transpose,
                  const ParallelFor& parallel);

}  // namespace ser_fast
