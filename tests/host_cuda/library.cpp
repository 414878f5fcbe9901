// The kernels of csrc/cuda, executed on the host, for ctypes.

#include "cuda/group_action.h"
#include "host_cuda.h"

using namespace ser_fast;

extern "C" {

// What the device is said to be from now on.
void set_device(int multiprocessors, int shared_limit) {
  host_cuda::multiprocessors = multiprocessors;
  host_cuda::shared_limit = shared_limit;
}

// sizes: height_in, width_in, height_out, width_out. Returns what went wrong, or null.
const char* group_action(const void* x, const double* linear, const double* offset, void* out, int type, int64_t batch,
                         int64_t channels, const int64_t* sizes, int interpolation, int padding, bool antialias,
                         bool transpose) {
  const Resampling resampling{Interpolation(interpolation), Padding(padding), antialias};
  return cuda::group_action(x, linear, offset, out, Type(type), batch, channels,
                            {sizes[0], sizes[1], sizes[2], sizes[3]}, resampling, transpose, nullptr);
}

// geometry: wide, vector, slab, slabs, group, buffers, tile, tiles, pool, shared, blocks.
void group_action_geometry(int type, int64_t batch, int64_t channels, const int64_t* sizes, int interpolation,
                           int padding, bool antialias, bool transpose, bool aligned, int64_t* geometry) {
  const Resampling resampling{Interpolation(interpolation), Padding(padding), antialias};
  const cuda::Geometry n =
      cuda::geometry(Type(type), batch, channels, {sizes[0], sizes[1], sizes[2], sizes[3]}, resampling, transpose,
                     aligned, host_cuda::multiprocessors, host_cuda::shared_limit);
  const int64_t values[] = {n.wide, n.vector, n.slab, n.slabs,  n.group, n.buffers,
                            n.tile, n.tiles,  n.pool, n.shared, n.blocks};
  std::copy_n(values, std::size(values), geometry);
}
}
