// What the tests ask of nt_xent's CUDA kernels besides the operators, for ctypes.

#include <vector>

#include "cuda/nt_xent_tiles.h"
#include "host_cuda.h"

extern "C" {

void set_shared_limit(int bytes) { host_cuda::shared_limit = bytes; }

// How many pairs i >= j of tiles the blocks of symmetric_sums have, each counted once; -1 if one has two blocks.
int64_t pairs_that_have_a_block(int64_t padded) {
  const int64_t tiles = padded / 128, blocks = ser_fast::cuda::pair_blocks(padded);
  std::vector<bool> seen(tiles * tiles);
  int64_t pairs = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t i, j;
    ser_fast::cuda::pair_of_block(block, i, j);
    if (i >= tiles || j > i) continue;
    if (seen[i * tiles + j]) return -1;
    seen[i * tiles + j] = true;
    ++pairs;
  }
  return pairs;
}
}
