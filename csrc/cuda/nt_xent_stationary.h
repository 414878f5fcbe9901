// The output-stationary steps of nt_xent and info_nce: a block owns some rows and walks over the keys (ser_fast/ops has
// the mathematics).
//
// Pointers of the current device. All return what went wrong, or null; none waits for the device.
#pragma once

#include <cstdint>

#include "cuda/nt_xent_tiles.h"

namespace ser_fast::cuda {

// out (splits, q.padded, columns) = G k, over parts of the keys. columns: 64, 128 or 256.
const char* stationary_gradient(const Operand& q, const Operand& k, int64_t columns, int64_t keys, float* out,
                                int64_t splits, float scale, bool bounded, void* stream);

// out (splits, q.padded, columns) = sum_j 2^(s_ij - max_i) k_j, and state (2, splits, q.padded): the row maxima, and
// the sums. columns: 64, 128, 256 or 512.
const char* detached_sums(const Operand& q, const Operand& k, int64_t columns, int64_t keys, float* state, float* out,
                          int64_t splits, float scale, bool bounded, void* stream);

}  // namespace ser_fast::cuda
