// What the GPU losses and their kernels (csrc/cuda) must agree on; ser_fast._C exports it under the names of the
// comments, so that Python has no copies of its own.
#pragma once

#include <cstdint>

namespace ser_fast {

constexpr int kSpan = 32;          // SPAN: rows that share a range of images
constexpr int kKeptExponent = 15;  // KEPT_EXPONENT: kept similarities are 2^15 P
constexpr int kTile = 128;         // TILE: the side of a tile of the similarity matrix
constexpr int kLargestWeightLog2 = 14;
// LARGEST_WEIGHT: the largest gradient weight, as float16 sees it in G, and about the largest term of a mean.
constexpr double kLargestWeight = 1 << kLargestWeightLog2;

// The table that `prepare` writes has, of each row, its image and whether it is valid, and of each span the lowest
// image, the highest, and whether all rows are valid.
constexpr int64_t table_size(int64_t rows) { return 2 * rows + 3 * (rows / kSpan); }
// The rows that a table of `size` numbers is of.
constexpr int64_t table_rows(int64_t size) { return size / (2 * kSpan + 3) * kSpan; }
static_assert(table_rows(table_size(5 * kTile)) == 5 * kTile);

// The rows that a block of the output-stationary kernels owns, and the keys of one step, by the columns of a row:
// STATIONARY_BLOCKS. Bytes of shared memory that a block must be able to have for it.
struct StationaryBlock {
  int columns, rows, keys, shared_memory;
};
constexpr StationaryBlock kStationaryBlocks[] = {
    {64, 128, 64, 99 << 10},  {128, 128, 64, 99 << 10}, {256, 128, 64, 150 << 10},
    {512, 64, 64, 204 << 10}, {512, 64, 32, 150 << 10},
};

// What `gradient_panel` takes the similarities from: SOURCES.
enum class Source { product, library, kept, kept_diagonal };
constexpr const char* kSourceNames[] = {"product", "library", "kept", "kept_diagonal"};

// Whose gradient `finish_gradient` writes: SIDES.
enum class Side { views, query, key };
constexpr const char* kSideNames[] = {"views", "query", "key"};

}  // namespace ser_fast
