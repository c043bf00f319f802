// The probabilities of a block of negatives, from which two dense matmuls make the gradients.
//
//     G_ij = exp(S_ij - row_lse_i) + exp(S_ij - col_lse_j), times 2^10 so that float16 keeps it normal

#include <cuda_fp16.h>

#include "cuda/matmul.cuh"
#include "kernels.h"

namespace modest_align::cuda {
namespace {

constexpr float kLog2Gain = 10.0f;
// A weight above this belongs to a logsumexp so low that exponentials under the common shift may have vanished.
constexpr float kLargestWeight = 1.2379400392853803e27f;  // 2^(80 + 10)

// weight = 2^(shift + 10 - lse log2 e): with it one exponential under the shift serves a row's and a column's softmax.
__global__ void weights_kernel(const float* __restrict__ scale, const float* __restrict__ row_lse,
                               const float* __restrict__ col_lse, float* __restrict__ row_weight,
                               float* __restrict__ col_weight, int rows, int columns) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const LogitScale logit(scale);
  const float top = logit.shift + kLog2Gain;
  if (i < rows) row_weight[i] = exp2f(fmaf(-kLog2e, row_lse[i], top));
  if (i < columns) col_weight[i] = i < rows ? exp2f(fmaf(-kLog2e, col_lse[i], top)) : 0.0f;
}

template <int kColumns_>
struct GradsTile {
  static constexpr int kColumns = kColumns_;

  struct Params {
    int first_row, first_column;
    const std::int32_t* ids;
    const float* scale;
    const float* row_lse;
    const float* col_lse;
    const float* row_weight;
    const float* col_weight;
    int paired;               // columns with a softmax of their own
    __half* probabilities;    // whole tiles, so that no store needs a mask
    std::int64_t stride;      // from row to row, a multiple of 8
  };

  struct alignas(kSharedAlignment) Shared {};

  template <class Dots>
  __device__ static void run(const Params& params, Shared&, const Place& place, Dots& dots, int thread) {
    const int lane = thread % 32, quarter = lane % 4;
    const LogitScale logit(params.scale);
    float row_weight[2];
    bool careful_rows = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = place.row + 8 * h;
      row_weight[h] = i < place.rows ? params.row_weight[place.first_row + i] : 0.0f;
      careful_rows = careful_rows || row_weight[h] > kLargestWeight;
    }
    __half* out = params.probabilities + place.row * params.stride + (place.column - 2 * quarter) + 8 * quarter;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4) {  // 32 columns, eight of them this thread's
      if (place.masked) place.exclude(dots, first, logit.k);
      float col_weight[8];
      bool careful = careful_rows;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = place.column + 8 * (first + i / 2) + i % 2;
        col_weight[i] = j < place.columns ? params.col_weight[place.first_column + j] : 0.0f;
        careful = careful || col_weight[i] > kLargestWeight;
      }
      // The whole warp takes one way: the exchange below needs all its lanes.
      std::uint32_t pairs[2][4];
      if (__any_sync(0xffffffffu, careful)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float value[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int at = 4 * (first + i % 4) + 2 * (i / 4) + c;
            value[c] = two_exponentials(params, place, logit, dots(at), i / 4, 8 * (first + i % 4) + c);
          }
          pairs[i / 4][i % 4] = pack(value[0], value[1]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float value[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float dot = dots(4 * (first + i % 4) + 2 * (i / 4) + c);
            const float exponential = exp2_approx(fmaf(dot, logit.k, -logit.shift));
            value[c] = exponential * (row_weight[i / 4] + col_weight[2 * (i % 4) + c]);
          }
          pairs[i / 4][i % 4] = pack(value[0], value[1]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<uint4*>(out + 8 * h * params.stride + 8 * first) = transpose(pairs[h], quarter);
      }
    }
  }

  __device__ static float two_exponentials(const Params& params, const Place& place, const LogitScale& logit, float dot,
                                           int h, int column) {
    const auto probability = [&](float lse) {
      return exp2_approx(fmaf(dot, logit.k, fmaf(-kLog2e, lse, kLog2Gain)));
    };
    const int i = place.row + 8 * h, j = place.first_column + place.column + column;
    float sum = i < place.rows ? probability(params.row_lse[place.first_row + i]) : 0.0f;
    if (j < params.paired) sum += probability(params.col_lse[j]);
    return sum;
  }

  __device__ static std::uint32_t pack(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&both);
  }

  // Four lanes have two columns of each of four groups of eight; afterwards lane q has all of group q, 16 bytes.
  __device__ static uint4 transpose(const std::uint32_t (&pairs)[4], int quarter) {
    const bool odd = quarter & 1, high = quarter & 2;
    std::uint32_t kept[2][2];  // [group q mod 2, or that + 2][lane pair's first, second]
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const std::uint32_t own = odd ? pairs[2 * g + 1] : pairs[2 * g];
      const std::uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? pairs[2 * g] : pairs[2 * g + 1], 1);
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

int contrastive_weights(const float* scale, const float* row_lse, const float* col_lse, float* row_weight,
                        float* col_weight, std::int64_t rows, std::int64_t columns, int device, void* cuda_stream) {
  const CurrentDevice current(device);
  if (current.status() != cudaSuccess) return current.status();
  return launch(weights_kernel, ceil_div(columns, 256), 256, static_cast<cudaStream_t>(cuda_stream), scale, row_lse,
                col_lse, row_weight, col_weight, static_cast<int>(rows), static_cast<int>(columns));
}

int contrastive_probabilities(const void* x_hat, const void* y_hat, const float* scale, const float* row_lse,
                              const float* col_lse, const float* row_weight, const float* col_weight,
                              const std::int32_t* ids, void* probabilities, std::int64_t stride, std::int64_t first_row,
                              std::int64_t rows, std::int64_t first_column, std::int64_t columns, std::int64_t paired,
                              std::int64_t width, int device, void* cuda_stream) {
  const CurrentDevice current(device);
  if (current.status() != cudaSuccess) return current.status();
  const void* x_block = static_cast<const __half*>(x_hat) + first_row * width;
  const void* y_block = static_cast<const __half*>(y_hat) + first_column * width;
  const auto run = [&](auto grads_tile) {
    using Tile = decltype(grads_tile);
    const typename Tile::Params params{static_cast<int>(first_row),
                                       static_cast<int>(first_column),
                                       ids,
                                       scale,
                                       row_lse,
                                       col_lse,
                                       row_weight,
                                       col_weight,
                                       static_cast<int>(paired),
                                       static_cast<__half*>(probabilities),
                                       stride};
    return launch_matmul<Tile>(x_block, y_block, static_cast<int>(rows), static_cast<int>(columns),
                               static_cast<int>(width), params, static_cast<cudaStream_t>(cuda_stream));
  };
  return tile_columns(rows, columns) == 256 ? run(GradsTile<256>()) : run(GradsTile<128>());
}

}  // namespace modest_align::cuda
