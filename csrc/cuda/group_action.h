// The group action on the GPU: out = W_g x, or W_g^T x, as in cpu/group_action.h.
#pragma once

#include "common/lattices.h"
#include "common/resampling.h"
#include "common/types.h"

namespace ser_fast::cuda {

// What a launch does to a lattice, and what it takes. A block owns some slabs of channels of one sample, one after
// another, and of these a tile of the tokens it writes.
struct Geometry {
  bool wide;    // 16 bytes at a time and slabs staged in shared memory, or else one channel at a time from global
  int vector;   // channels of an access
  int slab;     // accesses of a slab
  int slabs;    // of all channels
  int group;    // slabs of a block
  int buffers;  // slabs that are staged at a time
  int tile;     // tokens
  int tiles;
  int64_t pool;    // bytes of shared memory for taps and sums
  int64_t shared;  // bytes of shared memory in all
  int64_t blocks;
};

// shared_limit: bytes of shared memory that a block may ask for. aligned: x and out start at multiples of 16.
Geometry geometry(Type type, int64_t batch, int64_t channels, const Lattices& lattices, const Resampling& resampling,
                  bool transpose, bool aligned, int64_t multiprocessors, int64_t shared_limit);

// Pointers of the current device. Returns what went wrong, or null; it does not wait for the device.
const char* group_action(const void* x, const double* linear, const double* offset, void* out, Type type, int64_t batch,
                         int64_t channels, const Lattices& lattices, const Resampling& resampling, bool transpose,
                         void* stream);

}  // namespace ser_fast::cuda
