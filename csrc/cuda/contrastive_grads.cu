// Blocks of G, from which two dense matmuls make the gradients.
//
//     G_ij = row_weight_i exp(S_ij - row_lse_i) + col_weight_j exp(S_ij - col_lse_j), times 2^10 so that float16 keeps
//     it normal

#include <cuda_fp16.h>

#include "cuda/matmul.cuh"
#include "kernels.h"

namespace modest_align::cuda {
namespace {

constexpr float kLog2Gain = 10.0f;
// Of a softmax whose logsumexp is more binades than this below the shift, exponentials may have vanished.
constexpr float kLowestBinade = 80.0f;

// weight 2^(shift + 10 - lse log2 e): with it one exponential under the shift serves a row's and a column's softmax. 0
// where the softmax is of nothing, infinite where the exponentials have to be taken with care.
__device__ float softmax_factor(float lse, float weight, float shift) {
  if (lse == -INFINITY) return 0.0f;
  const float past = fmaf(-kLog2e, lse, shift);
  return past > kLowestBinade ? INFINITY : weight * exp2f(past + kLog2Gain);
}

__global__ void factors_kernel(const float* __restrict__ scale, const float* __restrict__ row_lse,
                               const float* __restrict__ col_lse, const float* __restrict__ row_weight,
                               const float* __restrict__ col_weight, float* __restrict__ row_factor,
                               float* __restrict__ col_factor, int rows, int columns, int col_count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const LogitScale logit(scale);
  if (i < rows) row_factor[i] = softmax_factor(row_lse[i], row_weight[i], logit.shift);
  if (i < columns) col_factor[i] = i < col_count ? softmax_factor(col_lse[i], col_weight[i], logit.shift) : 0.0f;
}

template <int kColumns_>
struct GradsTile {
  static constexpr int kColumns = kColumns_;

  struct Params {
    Pairs pairs;
    const float* scale;
    const float* row_lse;
    const float* col_lse;
    const float* row_weight;
    const float* col_weight;
    const float* row_factor;
    const float* col_factor;
    __half* g;            // whole tiles, so that no store needs a mask
    std::int64_t stride;  // from row to row, a multiple of 8
  };

  // The factors of the tile's columns, for each warp group: from memory once a tile, not once a chunk of it.
  struct alignas(kSharedAlignment) Shared {
    float col_factor[2][kColumns];
  };

  template <class Dots>
  __device__ static void run(const Params& params, Shared& shared, const Place& place, Dots& dots, int thread) {
    const int lane = thread % 32, quarter = lane % 4, group = thread / 128;
    const LogitScale logit(params.scale);
    meet(group);  // the last tile's factors have been read
    for (int column = thread % 128; column < kColumns; column += 128) {
      const int j = place.column - 2 * quarter + column;
      shared.col_factor[group][column] = j < place.columns ? params.col_factor[params.pairs.first_column + j] : 0.0f;
    }
    meet(group);
    float row_factor[2];
    bool careful_rows = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = place.row + 8 * h;
      row_factor[h] = i < place.rows ? params.row_factor[params.pairs.first_row + i] : 0.0f;
      careful_rows = careful_rows || row_factor[h] == INFINITY;
    }
    __half* out = params.g + place.row * params.stride + (place.column - 2 * quarter) + 8 * quarter;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4) {  // 32 columns, eight of them this thread's
      if (place.some_excluded) place.exclude(dots, first, logit.k);
      float col_factor[8];
      bool careful = careful_rows;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        col_factor[i] = shared.col_factor[group][2 * quarter + column_at(first, i)];
        careful = careful || col_factor[i] == INFINITY;
      }
      // The whole warp takes one way: the exchange below needs all its lanes.
      std::uint32_t couples[2][4];
      const auto fill = [&](auto value) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
#pragma unroll
          for (int h = 0; h < 2; ++h) couples[h][i / 2] = pack(value(i, h), value(i + 1, h));
        }
      };
      if (__any_sync(0xffffffffu, careful)) {
        fill([&](int i, int h) {
          const int row = params.pairs.first_row + place.row + 8 * h;
          const int col = params.pairs.first_column + place.column + column_at(first, i);
          const float logit_log2 = dots(dot_at(first, i, h)) * logit.k;
          return term(logit_log2, row_factor[h], params.row_lse, params.row_weight, row) +
                 term(logit_log2, col_factor[i], params.col_lse, params.col_weight, col);
        });
      } else {
        fill([&](int i, int h) {
          const float exponential = exp2_approx(fmaf(dots(dot_at(first, i, h)), logit.k, -logit.shift));
          return exponential * (row_factor[h] + col_factor[i]);
        });
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint4*>(out + 8 * h * params.stride + 8 * first) = transpose(couples[h], quarter);
      }
    }
  }

  // weight exp(S - lse) 2^10. A factor of 0 stands for no such softmax, of which there is nothing to load.
  __device__ static float term(float logit_log2, float factor, const float* lse, const float* weight, int i) {
    if (factor == 0.0f) return 0.0f;
    return weight[i] * exp2_approx(logit_log2 + fmaf(-kLog2e, lse[i], kLog2Gain));
  }

  __device__ static std::uint32_t pack(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  }

  // Four lanes have two columns of each of four groups of eight; afterwards lane q has all of group q, 16 bytes.
  __device__ static uint4 transpose(const std::uint32_t (&couples)[4], int quarter) {
    const bool odd = quarter & 1, high = quarter & 2;
    std::uint32_t kept[2][2];  // [group q mod 2, or that + 2][lane pair's first, second]
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const std::uint32_t own = odd ? couples[2 * g + 1] : couples[2 * g];
      const std::uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? couples[2 * g] : couples[2 * g + 1], 1);
      kept[g][0] = odd ? got : own;
      kept[g][1] = odd ? own : got;
    }
    std::uint32_t own[2], got[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[i] = high ? kept[1][i] : kept[0][i];
      got[i] = __shfl_xor_sync(0xffffffffu, high ? kept[0][i] : kept[1][i], 2);
    }
    return high ? make_uint4(got[0], got[1], own[0], own[1]) : make_uint4(own[0], own[1], got[0], got[1]);
  }
};

}  // namespace

int softmax_factors(const ContrastiveG& a) {
  const CurrentDevice current(a.device);
  if (current.status() != cudaSuccess) return current.status();
  return launch(factors_kernel, ceil_div(larger(a.rows, a.columns), 256), 256, static_cast<cudaStream_t>(a.cuda_stream),
                a.scale, a.row_lse, a.col_lse, a.row_weight, a.col_weight, a.row_factor, a.col_factor,
                static_cast<int>(a.rows), static_cast<int>(a.columns), static_cast<int>(a.col_count));
}

int contrastive_g(const ContrastiveG& a) {
  const CurrentDevice current(a.device);
  if (current.status() != cudaSuccess) return current.status();
  const void* x_block = static_cast<const __half*>(a.x_hat) + a.first_row * a.width;
  const void* y_block = static_cast<const __half*>(a.y_hat) + a.first_column * a.width;
  const Pairs pairs{static_cast<int>(a.first_row), static_cast<int>(a.first_column), a.row_ids, a.col_ids,
                    a.exclude_diagonal};
  const auto run = [&](auto grads_tile) {
    using Tile = decltype(grads_tile);
    const typename Tile::Params params{pairs,        a.scale,      a.row_lse,
                                       a.col_lse,    a.row_weight, a.col_weight,
                                       a.row_factor, a.col_factor, static_cast<__half*>(a.g),
                                       a.g_stride};
    return launch_matmul<Tile>(x_block, y_block, static_cast<int>(a.block_rows), static_cast<int>(a.block_columns),
                               static_cast<int>(a.width), params, static_cast<cudaStream_t>(a.cuda_stream));
  };
  return tile_columns(a.block_rows, a.block_columns) == kTileColumns ? run(GradsTile<kTileColumns>())
                                                                     : run(GradsTile<kTileColumns / 2>());
}

}  // namespace modest_align::cuda
