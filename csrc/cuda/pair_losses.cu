// Each pair's loss and the weights of its gradient: a thread for a pair, or with smoothing a warp.

#include "cuda/group_sums.cuh"
#include "cuda/launch.h"
#include "kernels.h"

namespace modest_align::cuda {
namespace {

// log(1 + e^x) and 1 / (1 + e^-x), of which neither loses what is small beside 1; a NaN stays one.
struct Margin {
  float loss, weight;

  __device__ explicit Margin(float x) {
    const float e = exp2f(-fabsf(x) * 1.4426950408889634f);
    // log(1 + e) = 2 atanh(q): e is at most 1, and so q at most 1/3.
    const float q = e / (2.0f + e), square = q * q;
    float series = 1.0f / 13.0f;
#pragma unroll
    for (int k = 11; k > 0; k -= 2) series = fmaf(series, square, 1.0f / static_cast<float>(k));
    loss = (x > 0.0f ? x : 0.0f) + 2.0f * q * series;
    weight = (x > 0.0f ? 1.0f : e) / (1.0f + e);
  }
};

// The product of a row with the sum of the other side's rows of its id less that of all, in each lane of a warp.
__device__ float own_product(const GroupSums& sums, int side, const __half* hat, int id, bool has_rows) {
  float dot = 0.0f;
  for (int feature = kVector * (threadIdx.x % 32); feature < sums.width; feature += 32 * kVector) {
    float unit[kVector], own[kVector];
    load_vector(hat + feature, unit);
    sums.load_own(side, 0, id, has_rows, feature, own);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dot = fmaf(unit[i], own[i], dot);
  }
  return row_sum<32>(dot);
}

template <bool kSmoothed>
__global__ void __launch_bounds__(256)
    pair_losses_kernel(const __grid_constant__ PairLosses a, const __grid_constant__ GroupSums sums) {
  const std::int64_t thread = std::int64_t{blockIdx.x} * 256 + threadIdx.x, pair = kSmoothed ? thread / 32 : thread;
  if (pair >= a.rows) return;  // with smoothing a whole warp
  const bool columns = a.col_count != 0, writes = !kSmoothed || threadIdx.x % 32 == 0;
  const float scale = *a.scale, dot = a.pair_dot[pair], share = columns ? 0.5f : 1.0f;
  const Margin row(a.row_lse[pair] - scale * dot);
  float loss = row.loss, pair_weight = -row.weight;
  if (columns) {
    const Margin col(a.col_lse[pair] - scale * dot);
    loss = share * (loss + col.loss);
    pair_weight -= col.weight;
    if (writes) a.col_weight[pair] = col.weight;
  }
  if constexpr (kSmoothed) {
    const int row_id = a.row_ids ? a.row_ids[pair] : -1, col_id = a.row_ids ? a.col_ids[pair] : -1;
    // Whether the pair itself is none of the rows with its id.
    const int apart = a.row_ids == nullptr || row_id != col_id;
    const int of_row = sums.count(0, row_id);
    const std::int64_t row_negatives = a.columns - of_row - apart;
    const float row_weight = row_negatives > 0 ? 1.0f / static_cast<float>(row_negatives) : 0.0f;
    const auto* x_hat = static_cast<const __half*>(a.x_hat) + pair * a.width;
    float col_weight = 0.0f, products = row_weight * own_product(sums, 0, x_hat, row_id, of_row > 0);
    if (columns) {
      const int of_col = sums.count(1, col_id);
      const std::int64_t col_negatives = a.rows - of_col - apart;
      if (col_negatives > 0) col_weight = 1.0f / static_cast<float>(col_negatives);
      const auto* y_hat = static_cast<const __half*>(a.y_hat) + pair * a.width;
      products = fmaf(col_weight, own_product(sums, 1, y_hat, col_id, of_col > 0), products);
    }
    const float negatives = static_cast<float>((row_weight > 0.0f) + (col_weight > 0.0f));
    const float on_pair = negatives + static_cast<float>(apart) * (row_weight + col_weight);
    const float slope = share * scale * fmaf(dot, on_pair, products);
    loss = fmaf(*a.smoothing, slope, loss);
    pair_weight = fmaf(*a.smoothing, on_pair, pair_weight);
    if (writes) {
      a.slope[pair] = slope;
      a.row_negative_weight[pair] = row_weight;
      a.col_negative_weight[pair] = col_weight;
    }
  }
  if (!writes) return;
  a.losses[pair] = loss;
  a.row_weight[pair] = row.weight;
  a.pair_weight[pair] = pair_weight;
}

// The columns' sums, and where columns have losses the rows'.
GroupSums sums_of(const PairLosses& a) {
  GroupSums sums{};
  sums.first = {static_cast<const __half*>(a.y_hat), a.col_ids, a.col_order, a.columns};
  if (a.col_count != 0) sums.second = {static_cast<const __half*>(a.x_hat), a.row_ids, a.row_order, a.rows};
  sums.sides = a.col_count != 0 ? 2 : 1;
  sums.kinds = 1;
  sums.numbers = a.rows + 1;
  sums.width = static_cast<int>(a.width);
  return sums;
}

}  // namespace

std::int64_t pair_losses_workspace(const PairLosses& a) { return !a.smoothing ? 0 : sums_of(a).place(nullptr); }

int pair_losses(const PairLosses& a) {
  const CurrentDevice current(a.device);
  if (current.status() != cudaSuccess) return current.status();
  const auto stream = static_cast<cudaStream_t>(a.cuda_stream);
  if (a.smoothing == nullptr) {
    return launch(pair_losses_kernel<false>, ceil_div(a.rows, 256), 256, stream, a, GroupSums{});
  }
  if (a.operand_dtype != Dtype::float16 || a.width % kVector != 0) return cudaErrorInvalidValue;
  if (!is_aligned(a.x_hat) || !is_aligned(a.y_hat) || !is_aligned(a.workspace)) return cudaErrorMisalignedAddress;
  GroupSums sums = sums_of(a);
  sums.place(a.workspace);
  const cudaError_t status = sum_groups(sums, stream);
  if (status != cudaSuccess) return status;
  return launch(pair_losses_kernel<true>, ceil_div(a.rows, 8), 256, stream, a, sums);
}

}  // namespace modest_align::cuda
