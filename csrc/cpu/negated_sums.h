// What the smoothing needs of all rows of a side: sums over groups of rows, less the sum of all.
#pragma once

#include "matmul.h"
#include "parallel.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

// Tables [numbers, width] of a side; one row, of no group, where there are no ids.
struct NegatedSums {
  int64_t numbers, width;
  float* plain;     // number g: sum of the rows with ids g - sum of all rows
  float* weighted;  // the same of weight * row; null: not wanted

  MODEST_ALIGN_INLINE NegatedSums take(Arena& arena, const int32_t* ids, int64_t pairs, int64_t width, bool weighted) {
    NegatedSums sums{ids ? pairs + 1 : 1, width, nullptr, nullptr};
    sums.plain = arena.take<float>(sums.numbers * width);
    if (weighted) sums.weighted = arena.take<float>(sums.numbers * width);
    return sums;
  }

  const float* of(const float* table, const int32_t* ids, int64_t row) const {
    return table + (ids ? ids[row] : 0) * width;
  }
};

// Features that one task sums.
constexpr int64_t kSlice = 64;
constexpr int kSliceVectors = kSlice / kLanes;

// The features [d, d + kSlice) of one table.
template <class Element>
void sum_slice(float* table, const NegatedSums& sums, const Element* hat, int64_t rows, const int32_t* ids,
               const float* weight, int64_t d) {
  for (int64_t g = 0; g < sums.numbers; ++g) std::memset(table + g * sums.width + d, 0, sizeof(float) * kSlice);
  Vec total[kSliceVectors] = {};
  // Two levels: a million rows one after the other would lose the last digits of their sum.
  constexpr int64_t kBlock = 256;
  for (int64_t first = 0; first < rows; first += kBlock) {
    Vec block[kSliceVectors] = {};
    for (int64_t row = first; row < smaller(rows, first + kBlock); ++row) {
      float* own = table + (ids ? ids[row] : 0) * sums.width + d;
      for (int v = 0; v < kSliceVectors; ++v) {
        Vec values = load_vector(hat + row * sums.width + d + v * kLanes);
        if (weight) values *= weight[row];
        block[v] += values;
        if (ids) store(own + v * kLanes, load<Vec>(own + v * kLanes) + values);
      }
    }
    for (int v = 0; v < kSliceVectors; ++v) total[v] += block[v];
  }
  for (int64_t g = 0; g < sums.numbers; ++g) {
    float* row = table + g * sums.width + d;
    for (int v = 0; v < kSliceVectors; ++v) store(row + v * kLanes, load<Vec>(row + v * kLanes) - total[v]);
  }
}

// Fills the tables from [rows, width]; the weights are of the first `weighted_rows`, and those of the others are 0.
template <class Element>
void fill(const NegatedSums& sums, Team& team, const Element* hat, int64_t rows, const int32_t* ids,
          const float* weight = nullptr, int64_t weighted_rows = 0) {
  const int64_t slices = sums.width / kSlice;
  parallel(team, sums.weighted ? 2 * slices : slices, [&](int64_t task, int) {
    if (task < slices) return sum_slice<Element>(sums.plain, sums, hat, rows, ids, nullptr, task * kSlice);
    sum_slice(sums.weighted, sums, hat, weighted_rows, ids, weight, (task - slices) * kSlice);
  });
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
