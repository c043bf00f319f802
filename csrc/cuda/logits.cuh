// What the epilogues of both matmuls share. An epilogue gets a tile's dot products in registers as WGMMA leaves them:
// in a warp group's 64 rows a thread has the rows r and r + 8 of its warp's 16, r = lane / 4, and of every 8 columns
// the two that start at 2 (lane mod 4):
//
//     dots(4 g + 2 h + c)  is row  16 warp + lane / 4 + 8 h,  column  8 g + 2 (lane mod 4) + c
//
// dot_at and column_at are this arithmetic.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>

#include "cuda/launch.h"
#include "experiment.h"

namespace modest_align::cuda {

constexpr int kTileRows = kExperiment == "pingpong64" ? 64 : 128;
constexpr int kTileColumns = kExperiment == "pingpong128" ? 128 : 256;               // or half as many
constexpr int kGroupRows = 64;                                                       // of one warp group's WGMMA
constexpr int kClusterRows = 256 / kTileRows, kClusterColumns = 256 / kTileColumns;  // tiles that share operands
// What follows the epilogue's shared memory are operands whose swizzle repeats every 1,024 bytes.
constexpr int kSharedAlignment = 1024;
constexpr float kLog2e = 1.4426950408889634f;

// exp2 arguments stay within [-126, 100]: headroom for the sums above, no subnormal numbers below.
constexpr float kHeadroom = 100.0f;
// A sum below 2^-80 may have lost terms to underflow that mattered.
constexpr float kSmallestSum = 8.271806125530277e-25f;

// Columns of a tile by shape: the widest reads the fewest bytes, but must come often enough to fill the chip.
inline int tile_columns(std::int64_t rows, std::int64_t columns) {
  constexpr int kAtATime = 132 * (kPingpong ? 2 : 1);  // on an H100 or H200
  const bool few = ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns) < kAtATime;
  return few ? kTileColumns / 2 : kTileColumns;
}

// Logits in units of log2 are k * dot, and those minus `shift` do not overflow exp2.
struct LogitScale {
  float k, shift;

  __device__ explicit LogitScale(const float* scale) {
    k = *scale * kLog2e;
    shift = fmaxf(k - kHeadroom, 0.0f);
    // So that -inf times it is -inf, for excluded pairs.
    if (k == 0.0f) k = 1e-37f;
  }
};

// Of the 32 columns from 8 * group on a thread has eight: the i-th of them in its rows r + 8 h is this one of its dots,
__host__ __device__ constexpr int dot_at(int group, int i, int h) { return 4 * (group + i / 2) + 2 * h + i % 2; }
// and this column, counted from the thread's first.
__host__ __device__ constexpr int column_at(int group, int i) { return 8 * (group + i / 2) + i % 2; }

// Which of all pairs the matmul is about: a block of them, and what is excluded.
struct Pairs {
  int first_row, first_column;
  const std::int32_t* row_ids;  // of all rows; null: no pair is excluded by its ids
  const std::int32_t* col_ids;
  bool exclude_diagonal;
};

// Where this thread's elements are, and which of their pairs are excluded.
struct Place {
  int row, column;  // of the first element, in the block
  int rows, columns;
  const Pairs& pairs;
  int row_id[2];
  int to_diagonal;     // columns from the first to its row's partner; out of reach if that is not excluded
  bool some_excluded;  // the warp has such pairs, or some that do not exist

  __device__ Place(int warp_row, int tile_column, int tile_columns, int lane, int rows, int columns, const Pairs& pairs)
      : row(warp_row + lane / 4), column(tile_column + 2 * (lane % 4)), rows(rows), columns(columns), pairs(pairs) {
    const int past_diagonal = pairs.first_row + warp_row - (pairs.first_column + tile_column);
    const bool diagonal = pairs.exclude_diagonal && past_diagonal > -16 && past_diagonal < tile_columns;
    some_excluded = pairs.row_ids || diagonal || warp_row + 16 > rows || tile_column + tile_columns > columns;
    for (int h = 0; h < 2; ++h) {
      const int i = row + 8 * h;
      row_id[h] = pairs.row_ids && i < rows ? pairs.row_ids[pairs.first_row + i] : 1;
    }
    to_diagonal = pairs.exclude_diagonal ? pairs.first_row + row - (pairs.first_column + column) : INT_MIN / 2;
  }

  // Overwrites the dots of pairs that are excluded, or do not exist, in the 32 columns from 8 * `group` on, by an
  // infinity whose exponential is 0.
  template <class Dots>
  __device__ void exclude(Dots& dots, int group, float k) const {
    const float fill = k > 0.0f ? -INFINITY : INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int j = column + column_at(group, i);
      const bool exists = j < columns;
      const int col_id = pairs.col_ids && exists ? pairs.col_ids[pairs.first_column + j] : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool excluded = row_id[h] == col_id || column_at(group, i) == to_diagonal + 8 * h;
        if (!exists || row + 8 * h >= rows || excluded) dots(dot_at(group, i, h)) = fill;
      }
    }
  }
};

}  // namespace modest_align::cuda
