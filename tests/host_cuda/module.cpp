// The kernels of csrc/cuda, executed on the host, for tests in Python. Those of nt_xent are operators of torch besides
// (csrc/bindings_cuda.cpp).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "common/tiles.h"
#include "cuda/group_action.h"
#include "cuda/nt_xent_tiles.h"
#include "host_cuda.h"

namespace py = pybind11;
using namespace ser_fast;

namespace {

using Sizes = std::array<int64_t, 4>;  // height_in, width_in, height_out, width_out

Lattices lattices(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2], sizes[3]}; }

Resampling make_resampling(int interpolation, int padding, bool antialias) {
  return {Interpolation(interpolation), Padding(padding), antialias};
}

// What the device is said to be from now on.
void set_device(int multiprocessors, int shared_limit) {
  host_cuda::multiprocessors = multiprocessors;
  host_cuda::shared_limit = shared_limit;
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void group_action(uintptr_t x, uintptr_t linear, uintptr_t offset, uintptr_t out, int type, int64_t batch,
                  int64_t channels, const Sizes& sizes, int interpolation, int padding, bool antialias,
                  bool transpose) {
  const char* error = cuda::group_action(pointer(x), pointer<const double>(linear), pointer<const double>(offset),
                                         pointer(out), Type(type), batch, channels, lattices(sizes),
                                         make_resampling(interpolation, padding, antialias), transpose, nullptr);
  if (error != nullptr) throw std::runtime_error(error);
}

py::dict geometry(int type, int64_t batch, int64_t channels, const Sizes& sizes, int interpolation, int padding,
                  bool antialias, bool transpose, bool aligned) {
  const cuda::Geometry n =
      cuda::geometry(Type(type), batch, channels, lattices(sizes), make_resampling(interpolation, padding, antialias),
                     transpose, aligned, host_cuda::multiprocessors, host_cuda::shared_limit);
  using namespace py::literals;
  return py::dict("wide"_a = n.wide, "vector"_a = n.vector, "slab"_a = n.slab, "slabs"_a = n.slabs, "group"_a = n.group,
                  "buffers"_a = n.buffers, "tile"_a = n.tile, "tiles"_a = n.tiles, "pool"_a = n.pool,
                  "shared"_a = n.shared, "blocks"_a = n.blocks);
}

// How many pairs i >= j of tiles the blocks of symmetric_sums have, each counted once; -1 if one has two blocks.
int64_t pairs_that_have_a_block(int64_t padded) {
  const int64_t tiles = padded / kTile, blocks = cuda::pair_blocks(padded);
  std::vector<bool> seen(tiles * tiles);
  int64_t pairs = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t i, j;
    cuda::pair_of_block(block, i, j);
    if (i >= tiles || j > i) continue;
    if (seen[i * tiles + j]) return -1;
    seen[i * tiles + j] = true;
    ++pairs;
  }
  return pairs;
}

}  // namespace

PYBIND11_MODULE(host_kernels, module) {
  module.def("set_device", &set_device, py::arg("multiprocessors"), py::arg("shared_limit"));
  module.def("group_action", &group_action);
  module.def("geometry", &geometry);
  module.def("pairs_that_have_a_block", &pairs_that_have_a_block, py::arg("padded"));
}
