// Logsumexp of the negatives of every row and every column from one matmul.
//
// A tile leaves log2 of each row's and each column's sum of exponentials in it; another kernel merges these partials in
// a fixed order, so that the result is the same in every run. Rows go in waves, which bounds the partials' memory.

#include <cuda_fp16.h>

#include <algorithm>

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
    int first_row, first_column;
    const std::int32_t* ids;
    const float* scale;
    float* row_partial;  // [tiles of columns, rows], log2 of sums
    float* col_partial;  // [rows / 64 rounded up, paired]
    int paired;          // columns with a softmax of their own
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
    float* out = params.col_partial + std::int64_t{warp_row / kGroupRows} * params.paired + tile_column;
    for (int column = thread % 128; column < kColumns; column += 128) {
      if (tile_column + column >= params.paired) break;
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
      if (place.masked) place.exclude(dots, first, logit.k);
      float sum[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = 4 * (first + i / 2) + i % 2;
        const float upper = exp2_approx(fmaf(dots(at), logit.k, -logit.shift));
        const float lower = exp2_approx(fmaf(dots(at + 2), logit.k, -logit.shift));
        row_sum[0] += upper;
        row_sum[1] += lower;
        sum[i] = upper + lower;
      }
      scatter_combine(sum, lane, Sum());
      const int kept = kept_value(lane);
      columns[8 * (first + kept / 2) + 2 * (lane % 4) + kept % 2] = sum[0];
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
      float largest[8], sum[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = 4 * (first + i / 2) + i % 2;
        largest[i] = fmaxf(dots(at), dots(at + 2));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
        largest[i] = fmaxf(largest[i] * logit.k, -1e30f);
        const float upper = exp2_approx(fmaf(dots(at), logit.k, -largest[i]));
        sum[i] = upper + exp2_approx(fmaf(dots(at + 2), logit.k, -largest[i]));
      }
      scatter_combine(sum, lane, Sum());
      scatter_combine(largest, lane, Larger());
      const int kept = kept_value(lane);
      columns[8 * (first + kept / 2) + 2 * (lane % 4) + kept % 2] = log2f(sum[0]) + largest[0];
      __syncwarp();  // keeps the compiler from working on all columns at once, for which there are no registers
    }
  }
};

constexpr int kMergeThreads = 32, kMergeSlices = 8;

// Merges partial sums into lse, in the order of the tiles. A slice of the block takes every eighth tile.
__global__ void __launch_bounds__(kMergeThreads* kMergeSlices)
    merge_kernel(const float* __restrict__ partial, float* __restrict__ lse, int tiles, int length) {
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
  const float before = lse[place] * kLog2e;
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

// The positives' logits in float32, a warp for each; and nothing merged yet into the logsumexps.
__global__ void positive_kernel(const uint4* __restrict__ x_hat, const uint4* __restrict__ y_hat,
                                const float* __restrict__ scale, float* __restrict__ positive,
                                float* __restrict__ row_lse, float* __restrict__ col_lse, int rows, int width) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const int vectors = width / 8;
  float dot = 0.0f;
  for (int v = lane; v < vectors; v += 32) {
    const uint4 x = x_hat[std::int64_t{row} * vectors + v], y = y_hat[std::int64_t{row} * vectors + v];
    const __half2* x_half = reinterpret_cast<const __half2*>(&x);
    const __half2* y_half = reinterpret_cast<const __half2*>(&y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = __half22float2(x_half[i]), b = __half22float2(y_half[i]);
      dot = fmaf(a.x, b.x, fmaf(a.y, b.y, dot));
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) dot += shuffle_xor(dot, mask);
  if (lane == 0) {
    positive[row] = dot * *scale;
    row_lse[row] = col_lse[row] = -INFINITY;
  }
}

// Bytes of the partials of a wave of `rows` rows.
std::int64_t partial_bytes(std::int64_t rows, std::int64_t columns, std::int64_t paired, int tile) {
  return 4 * (ceil_div(columns, tile) * rows + ceil_div(rows, kGroupRows) * paired);
}

// Rows of all waves but the last, the same for all up to whole tiles, so that their partials fit the workspace.
int wave_rows(std::int64_t rows, std::int64_t columns, std::int64_t paired, std::int64_t workspace_bytes) {
  constexpr std::int64_t kMultiple = 2 * kTileRows;
  const std::int64_t bytes = partial_bytes(kMultiple, columns, paired, tile_columns(rows, columns));
  const std::int64_t largest = std::max<std::int64_t>(workspace_bytes / bytes, 1) * kMultiple;
  const std::int64_t waves = ceil_div(rows, largest);
  return static_cast<int>(std::min(rows, ceil_div(ceil_div(rows, waves), kMultiple) * kMultiple));
}

cudaError_t merge(const float* partial, float* lse, std::int64_t tiles, std::int64_t length, cudaStream_t stream) {
  const dim3 block(kMergeThreads, kMergeSlices);
  return launch(merge_kernel, ceil_div(length, kMergeThreads), block, stream, partial, lse, static_cast<int>(tiles),
                static_cast<int>(length));
}

}  // namespace

std::int64_t contrastive_stats_workspace(std::int64_t rows, std::int64_t columns, bool symmetric,
                                         std::int64_t workspace_bytes) {
  const std::int64_t paired = symmetric ? rows : 0;
  return partial_bytes(wave_rows(rows, columns, paired, workspace_bytes), columns, paired, tile_columns(rows, columns));
}

int contrastive_stats(const void* x_hat, const void* y_hat, const float* scale, const std::int32_t* ids, bool symmetric,
                      float* positive, float* row_lse, float* col_lse, std::int64_t rows, std::int64_t columns,
                      std::int64_t width, void* workspace, std::int64_t workspace_bytes, int device,
                      void* cuda_stream) {
  const CurrentDevice current(device);
  if (current.status() != cudaSuccess) return current.status();
  if (!is_aligned(x_hat) || !is_aligned(y_hat)) return cudaErrorMisalignedAddress;
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const int paired = symmetric ? static_cast<int>(rows) : 0, tile = tile_columns(rows, columns);
  const int wave = wave_rows(rows, columns, paired, workspace_bytes);

  cudaError_t status =
      launch(positive_kernel, ceil_div(rows, 8), 256, stream, static_cast<const uint4*>(x_hat),
             static_cast<const uint4*>(y_hat), scale, positive, row_lse, col_lse, static_cast<int>(rows),
             static_cast<int>(width));
  for (std::int64_t first = 0; first < rows && status == cudaSuccess; first += wave) {
    const int here = static_cast<int>(std::min<std::int64_t>(wave, rows - first));
    float* row_partial = static_cast<float*>(workspace);
    float* col_partial = row_partial + ceil_div(columns, tile) * here;
    const void* x_wave = static_cast<const __half*>(x_hat) + first * width;
    const auto run = [&](auto stats_tile) {
      using Tile = decltype(stats_tile);
      const typename Tile::Params params{static_cast<int>(first), 0, ids, scale, row_partial, col_partial, paired};
      return launch_matmul<Tile>(x_wave, y_hat, here, static_cast<int>(columns), static_cast<int>(width), params,
                                 stream);
    };
    status = tile == 256 ? run(StatsTile<256>()) : run(StatsTile<128>());
    if (status == cudaSuccess) status = merge(row_partial, row_lse + first, ceil_div(columns, tile), here, stream);
    if (status == cudaSuccess && symmetric) {
      status = merge(col_partial, col_lse, ceil_div(here, kGroupRows), rows, stream);
    }
  }
  return status;
}

}  // namespace modest_align::cuda
