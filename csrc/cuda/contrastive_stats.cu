// Logsumexp of every row and of the first columns from one matmul.
//
// A tile leaves log2 of each row's and each column's sum of exponentials in it; another kernel merges these partials in
// a fixed order, so that the result is the same in every run. Rows go in waves, which bounds the partials' memory.

#include <cuda_fp16.h>

#include "cuda/matmul.cuh"
#include "kernels.h"

namespace modest_align::cuda {
namespace {

__device__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Eight values a lane, to be combined over the eight lanes of equal lane mod 4: each of those keeps one, number
// `kept_value(lane)`, in values[0].
template <class Combine>
__device__ void scatter_combine(float (&values)[8], int lane, Combine combine) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half];
      values[i] = combine(upper ? values[i + half] : values[i], shuffle_xor(sent, 4 * half));
    }
  }
}

__device__ int kept_value(int lane) { return (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4; }

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int kColumns_>
struct StatsTile {
  static constexpr int kColumns = kColumns_;

  struct Params {
    Pairs pairs;
    const float* scale;
    float* row_partial;  // [tiles of columns, rows], log2 of sums
    float* col_partial;  // [rows / 64 rounded up, col_count]
    int col_count;
  };

  // One value for each warp and column.
  struct alignas(kSharedAlignment) Shared {
    float columns[2][4][kColumns];
  };

  template <class Dots>
  __device__ static void run(const Params& params, Shared& shared, const Place& place, Dots& dots, int thread) {
    const int lane = thread % 32, warp = thread / 32 % 4, group = thread / 128;
    const LogitScale logit(params.scale);

    float row_log2[2];
    meet(group);  // the last tile's columns have been read
    const bool careful = plain_sums(shared.columns[group][warp], logit, place, dots, lane, group, row_log2);
    if (careful) {
      careful_sums(shared.columns[group][warp], logit, dots, lane, row_log2);
      meet(group);
    }

    const int tile_column = place.column - 2 * (lane % 4), warp_row = place.row - lane / 4;
    if (lane % 4 == 0) {
      float* out = params.row_partial + std::int64_t{tile_column / kColumns} * place.rows + place.row;
      if (place.row < place.rows) out[0] = row_log2[0];
      if (place.row + 8 < place.rows) out[8] = row_log2[1];
    }
    float* out = params.col_partial + std::int64_t{warp_row / kGroupRows} * params.col_count + tile_column;
    for (int column = thread % 128; column < kColumns; column += 128) {
      if (tile_column + column >= params.col_count) break;
      float part[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) part[w] = shared.columns[group][w][column];
      if (careful) {
        const float largest = fmaxf(fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3])), -1e30f);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += exp2_approx(part[w] - largest);
        out[column] = log2f(sum) + largest;
      } else {
        out[column] = log2f(((part[0] + part[1]) + part[2]) + part[3]) + logit.shift;
      }
    }
  }

  // Sums with one shift for all. True for the whole warp group if some are too small to trust.
  template <class Dots>
  __device__ static bool plain_sums(float* columns, const LogitScale& logit, const Place& place, Dots& dots, int lane,
                                    int group, float (&row_log2)[2]) {
    float row_sum[2] = {0.0f, 0.0f};
    bool small = false;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4) {  // 32 columns, eight of them this thread's
      if (place.some_excluded) place.exclude(dots, first, logit.k);
      float sum[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float upper = exp2_approx(fmaf(dots(dot_at(first, i, 0)), logit.k, -logit.shift));
        const float lower = exp2_approx(fmaf(dots(dot_at(first, i, 1)), logit.k, -logit.shift));
        row_sum[0] += upper;
        row_sum[1] += lower;
        sum[i] = upper + lower;
      }
      scatter_combine(sum, lane, Sum());
      const int kept = kept_value(lane);
      columns[2 * (lane % 4) + column_at(first, kept)] = sum[0];
      small = small || sum[0] < kSmallestSum;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sum[h] += shuffle_xor(row_sum[h], 1);
      row_sum[h] += shuffle_xor(row_sum[h], 2);
      small = small || row_sum[h] < kSmallestSum;
      row_log2[h] = log2f(row_sum[h]) + logit.shift;
    }
    // Below scale 78 an exponential is at least 2^-126.
    return meet_any(group, small && logit.shift > 13.0f);
  }

  // log2 of sums whose own maxima are subtracted. The scale is positive here, and large.
  template <class Dots>
  __device__ static void careful_sums(float* columns, const LogitScale& logit, const Dots& dots, int lane,
                                      float (&row_log2)[2]) {
    // Lanes exchange the columns' maxima through shared memory, before the rows' take registers: few are left.
    float* const own = columns + 2 * (lane % 4);
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4) {
      float largest[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) largest[i] = fmaxf(dots(dot_at(first, i, 0)), dots(dot_at(first, i, 1)));
      scatter_combine(largest, lane, Larger());
      own[column_at(first, kept_value(lane))] = fmaxf(largest[0] * logit.k, -1e30f);
    }
    __syncwarp();
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) row_max[i / 2 % 2] = fmaxf(row_max[i / 2 % 2], dots(i));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_max[h] = fmaxf(row_max[h], shuffle_xor(row_max[h], 1));
      row_max[h] = fmaxf(fmaxf(row_max[h], shuffle_xor(row_max[h], 2)) * logit.k, -1e30f);
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      row_sum[i / 2 % 2] += exp2_approx(fmaf(dots(i), logit.k, -row_max[i / 2 % 2]));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sum[h] += shuffle_xor(row_sum[h], 1);
      row_sum[h] += shuffle_xor(row_sum[h], 2);
      row_log2[h] = log2f(row_sum[h]) + row_max[h];
    }
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4) {
      float sum[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float largest = own[column_at(first, i)];
        sum[i] = exp2_approx(fmaf(dots(dot_at(first, i, 0)), logit.k, -largest)) +
                 exp2_approx(fmaf(dots(dot_at(first, i, 1)), logit.k, -largest));
      }
      __syncwarp();  // all have read what is overwritten here
      scatter_combine(sum, lane, Sum());
      own[column_at(first, kept_value(lane))] += log2f(sum[0]);
    }
  }
};

constexpr int kMergeThreads = 32, kMergeSlices = 8;

// Merges partial sums into lse, which holds nothing yet if it is `fresh`, in the order of the tiles. A slice of the
// block takes every eighth tile.
__global__ void __launch_bounds__(kMergeThreads* kMergeSlices)
    merge_kernel(const float* __restrict__ partial, float* __restrict__ lse, bool fresh, int tiles, int length) {
  __shared__ float maxima[kMergeSlices][kMergeThreads], totals[kMergeSlices][kMergeThreads];
  const int place = blockIdx.x * kMergeThreads + threadIdx.x;
  float largest = -1e30f, total = 0.0f;
  if (place < length) {
#pragma unroll 4
    for (int t = threadIdx.y; t < tiles; t += kMergeSlices) {
      const float log2 = partial[std::int64_t{t} * length + place];
      const float larger = fmaxf(largest, log2);
      total = total * exp2_approx(largest - larger) + exp2_approx(log2 - larger);
      largest = larger;
    }
  }
  maxima[threadIdx.y][threadIdx.x] = largest;
  totals[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || place >= length) return;
  const float before = fresh ? -INFINITY : lse[place] * kLog2e;
  largest = fmaxf(before, -1e30f);
  total = exp2_approx(before - largest);
  for (int slice = 0; slice < kMergeSlices; ++slice) {
    const float maximum = maxima[slice][threadIdx.x];
    const float larger = fmaxf(largest, maximum);
    total = total * exp2_approx(largest - larger) + totals[slice][threadIdx.x] * exp2_approx(maximum - larger);
    largest = larger;
  }
  lse[place] = (largest + log2f(total)) * 0.6931471805599453f;
}

// Bytes of the partials of a wave of `rows` rows.
std::int64_t partial_bytes(std::int64_t rows, std::int64_t columns, std::int64_t col_count, int tile) {
  return 4 * (ceil_div(columns, tile) * rows + ceil_div(rows, kGroupRows) * col_count);
}

// Rows of all waves but the last, the same for all up to whole tiles, so that their partials fit the workspace.
std::int64_t wave_rows(const ContrastiveStats& a) {
  constexpr std::int64_t kMultiple = kClusterRows * kTileRows;
  const std::int64_t bytes = partial_bytes(kMultiple, a.columns, a.col_count, tile_columns(a.rows, a.columns));
  return smaller(a.rows, even_part(a.rows, a.workspace_bytes / bytes * kMultiple, kMultiple));
}

cudaError_t merge(const float* partial, float* lse, bool fresh, std::int64_t tiles, std::int64_t length,
                  cudaStream_t stream) {
  const dim3 block(kMergeThreads, kMergeSlices);
  return launch(merge_kernel, ceil_div(length, kMergeThreads), block, stream, partial, lse, fresh,
                static_cast<int>(tiles), static_cast<int>(length));
}

}  // namespace

std::int64_t contrastive_stats_workspace(const ContrastiveStats& a) {
  return partial_bytes(wave_rows(a), a.columns, a.col_count, tile_columns(a.rows, a.columns));
}

int contrastive_stats(const ContrastiveStats& a) {
  const CurrentDevice current(a.device);
  if (current.status() != cudaSuccess) return current.status();
  if (!is_aligned(a.x_hat) || !is_aligned(a.y_hat)) return cudaErrorMisalignedAddress;
  const auto stream = static_cast<cudaStream_t>(a.cuda_stream);
  const int columns = static_cast<int>(a.columns), width = static_cast<int>(a.width);
  const int tile = tile_columns(a.rows, a.columns);
  const std::int64_t wave = wave_rows(a);
  cudaError_t status = cudaSuccess;
  for (std::int64_t first = 0; first < a.rows && status == cudaSuccess; first += wave) {
    const int here = static_cast<int>(smaller(wave, a.rows - first));
    float* row_partial = static_cast<float*>(a.workspace);
    float* col_partial = row_partial + ceil_div(columns, tile) * here;
    const void* x_wave = static_cast<const __half*>(a.x_hat) + first * a.width;
    const Pairs pairs{static_cast<int>(first), 0, a.row_ids, a.col_ids, a.exclude_diagonal};
    const auto run = [&](auto stats_tile) {
      using Tile = decltype(stats_tile);
      const typename Tile::Params params{pairs, a.scale, row_partial, col_partial, static_cast<int>(a.col_count)};
      return launch_matmul<Tile>(x_wave, a.y_hat, here, columns, width, params, stream);
    };
    status = tile == kTileColumns ? run(StatsTile<kTileColumns>()) : run(StatsTile<kTileColumns / 2>());
    if (status == cudaSuccess) {
      status = merge(row_partial, a.row_lse + first, true, ceil_div(columns, tile), here, stream);
    }
    if (status == cudaSuccess && a.col_count > 0) {
      status = merge(col_partial, a.col_lse, first == 0, ceil_div(here, kGroupRows), a.col_count, stream);
    }
  }
  return status;
}

}  // namespace modest_align::cuda
