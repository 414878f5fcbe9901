// Steps of nt_xent and info_nce that take products of rows in tiles of 128 x 128 (ser_fast/ops has the mathematics).
//
// Pointers of the current device. All return what went wrong, or null; none waits for the device.
#pragma once

#include <cstdint>

namespace ser_fast::cuda {

// The rows of one side of the similarity matrix.
struct Operand {
  const int64_t* table;  // images and valid bits, and of each 32 rows their range and whether all are valid
  const float* weights;  // (3, padded), as `gradient_weights` writes them; null where a is 0
  const void* u;         // (padded, columns) float16, of unit length; columns is a multiple of 64
  int64_t padded;        // a multiple of 128
};

// sums (4, padded): the negatives of each row among all rows, from the pairs i > j alone, in integers. kept: 2^15 P by
// tiles of 128 x 128, on and below the diagonal; or null.
const char* symmetric_sums(const void* u, const int64_t* table, int64_t count, int64_t padded, int64_t columns,
                           int64_t* sums, void* kept, float scale, void* stream);

// Its blocks, and the tile that a block sums; where i lies beyond the rows or j > i it has none.
int64_t pair_blocks(int64_t padded);
void pair_of_block(int64_t block, int64_t& tile_i, int64_t& tile_j);

// state (2, splits, q_padded): a running maximum of the base-2 similarities, and the sum of 2^(s - maximum).
const char* row_sums(const void* q, const int64_t* q_table, int64_t q_padded, const void* k, const int64_t* k_table,
                     int64_t k_padded, int64_t columns, int64_t keys, float* state, int64_t splits, float scale,
                     void* stream);

// panel (rows, width) float16 = G from the corner (first_row, first_key); all four are multiples of 128.
const char* gradient_panel(const Operand& q, const Operand& k, int64_t columns, void* panel, int64_t first_row,
                           int64_t first_key, int64_t rows, int64_t width, float scale, bool bounded, void* stream);

}  // namespace ser_fast::cuda
