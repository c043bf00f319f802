// Sums of a side's rows, of all and by group, in an order that is the same in every run: what the smoothing needs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/vector.cuh"

namespace modest_align::cuda {

struct Side {
  const __half* hat;          // [rows, width]
  const std::int32_t* ids;    // [rows]; null: there are no groups
  const std::int64_t* order;  // [rows], which row has which place in the order of the ids
  std::int64_t rows;
};

// Of one side or of two, in one kind or in two: the rows as they are, and weighted.
struct GroupSums {
  Side first, second;  // the second has no rows where there is one side
  int sides, kinds;
  const float* weight;  // [weighted_rows], 0 for the rows after these
  std::int64_t weighted_rows, numbers;
  int width;
  // The results.
  float* total;          // [sides, kinds, width], of all rows
  float* table;          // [sides, kinds, numbers, width], of an id's rows, where it has any
  std::int32_t* bounds;  // [sides, 2, numbers]: where an id's run, its rows in their order, begins and ends, or 0 and 0
  // What chunks of that order leave of runs that are not theirs from end to end.
  float* partial;  // [chunks, kinds, 3, width]: of all its rows, of a run from before it, of a run that it opens
  std::int32_t* open_ids;  // [chunks]: the id of the run that begins in it and goes on, or -1

  // Finds a place in a workspace for the five above; returns how many bytes it has.
  std::int64_t place(void* workspace);

  // How many rows of a side have an id.
  __device__ int count(int side, int id) const {
    if (first.ids == nullptr) return 0;
    const std::int32_t* begins = bounds + 2 * side * numbers;
    return begins[numbers + id] - begins[id];
  }

  // Eight features of the sum of an id's rows, if it has any, less the sum of all.
  __device__ void load_own(int side, int kind, int id, bool has_rows, int feature, float (&own)[kVector]) const {
    const std::int64_t which = side * kinds + kind;
    float all[kVector];
    load_vector(total + which * width + feature, all);
#pragma unroll
    for (int i = 0; i < kVector; ++i) own[i] = 0.0f;
    if (has_rows) load_vector(table + (which * numbers + id) * width + feature, own);
#pragma unroll
    for (int i = 0; i < kVector; ++i) own[i] -= all[i];
  }
};

// Fills the places.
cudaError_t sum_groups(const GroupSums& sums, cudaStream_t stream);

}  // namespace modest_align::cuda
