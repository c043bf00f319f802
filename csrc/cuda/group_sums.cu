// A warp walks a chunk of rows in the order of their ids, so that a group is a run of neighbours. Runs that lie in the
// chunk go to the table, and of one that lies in several chunks each leaves a piece. A second kernel adds up the
// pieces, and the chunks' totals.

#include "cuda/group_sums.cuh"
#include "cuda/launch.h"

namespace modest_align::cuda {
namespace {

constexpr int kChunk = 64;
constexpr int kAhead = 4;  // rows that are loaded at a time
constexpr int kSlice = 32 * kVector, kFoldSlice = 32 * 4;
constexpr unsigned kAll = 0xffffffffu;

__host__ __device__ std::int64_t chunks_of(const Side& side) { return ceil_div(side.rows, kChunk); }
__host__ __device__ std::int64_t chunks_of(const GroupSums& a) { return chunks_of(a.first) + chunks_of(a.second); }

__global__ void __launch_bounds__(256) group_sums_kernel(const __grid_constant__ GroupSums a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = blockIdx.y;
  // Both kinds of a chunk side by side: one reads from the cache what the other has read.
  const int kind = a.kinds == 2 ? warp % 2 : 0, chunk_of_block = a.kinds == 2 ? warp / 2 : warp;
  const std::int64_t chunk = std::int64_t{blockIdx.x} * (a.kinds == 2 ? 4 : 8) + chunk_of_block;
  if (chunk >= chunks_of(a)) return;  // a whole warp
  const bool is_second = chunk >= chunks_of(a.first);
  const Side side = is_second ? a.second : a.first;
  const std::int64_t first = (chunk - (is_second ? chunks_of(a.first) : 0)) * kChunk;
  const std::int64_t past = smaller(first + kChunk, side.rows);
  float* partial = a.partial + (chunk * a.kinds + kind) * 3 * a.width;
  float* table = a.table + (is_second * a.kinds + kind) * a.numbers * a.width;
  std::int32_t* begins = a.bounds + 2 * is_second * a.numbers;
  const int feature = kSlice * slice + kVector * lane;
  const bool grouped = side.ids != nullptr, has_feature = feature < a.width, once = slice == 0 && kind == 0;
  // The id at a place of the order, -1 before and past it.
  const auto id_at = [&](std::int64_t place) {
    return grouped && place >= 0 && place < side.rows ? side.ids[side.order[place]] : -1;
  };

  const int earlier_id = id_at(first - 1);
  float total[kVector] = {}, run[kVector] = {};
  for (std::int64_t base = first; base < past; base += 32) {
    // A lane knows one of 32 rows.
    const std::int64_t place = base + lane;
    int row = 0, id = -1, next_id = -1;
    float weight = 1.0f;
    if (place < past) {
      row = static_cast<int>(grouped ? side.order[place] : place);
      if (kind == 1) weight = row < a.weighted_rows ? a.weight[row] : 0.0f;
      if (grouped) {
        id = side.ids[row];
        next_id = id_at(place + 1);
        if (once && id_at(place - 1) != id) begins[id] = static_cast<std::int32_t>(place);
        if (once && next_id != id) begins[a.numbers + id] = static_cast<std::int32_t>(place + 1);
      }
    }
    const int count = static_cast<int>(smaller(past - base, 32));
    for (int q = 0; q < count; q += kAhead) {
      float values[kAhead][kVector];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const std::int64_t its_row = __shfl_sync(kAll, row, q + k);
        if (has_feature) load_vector(side.hat + its_row * a.width + feature, values[k]);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (q + k >= count) break;
        const float its_weight = __shfl_sync(kAll, weight, q + k);
        const int its_id = __shfl_sync(kAll, id, q + k);
        const bool ends = __shfl_sync(kAll, next_id, q + k) != its_id;
        if (!has_feature) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          total[i] = fmaf(its_weight, values[k][i], total[i]);
          run[i] = fmaf(its_weight, values[k][i], run[i]);
        }
        if (!ends) continue;
        store_vector((its_id == earlier_id ? partial + a.width : table + its_id * std::int64_t{a.width}) + feature,
                     run);
#pragma unroll
        for (int i = 0; i < kVector; ++i) run[i] = 0.0f;
      }
    }
  }
  const int last_id = id_at(past - 1);
  const bool goes_on = grouped && id_at(past) == last_id, opens = goes_on && last_id != earlier_id;
  if (grouped && once && lane == 0) a.open_ids[chunk] = opens ? last_id : -1;
  if (!has_feature) return;
  store_vector(partial + feature, total);
  if (goes_on) store_vector(partial + (opens ? 2 : 1) * a.width + feature, run);
}

// A block adds up one total, or the pieces of the run that a chunk opens.
__global__ void __launch_bounds__(256) fold_sums_kernel(const __grid_constant__ GroupSums a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = blockIdx.y, kind = blockIdx.z;
  const std::int64_t unit = blockIdx.x, of_first = chunks_of(a.first);
  const std::int64_t stride = std::int64_t{a.kinds} * 3 * a.width;
  const float* pieces = a.partial + std::int64_t{kind} * 3 * a.width;
  const float* opening = nullptr;
  std::int64_t count;
  float* to;
  if (unit < a.sides) {
    count = unit == 0 ? of_first : chunks_of(a.second);
    pieces += unit == 0 ? 0 : of_first * stride;
    to = a.total + (unit * a.kinds + kind) * a.width;
  } else {
    const std::int64_t chunk = unit - a.sides;
    const int open_id = a.open_ids[chunk];
    if (open_id < 0) return;
    const int side = chunk >= of_first;
    const std::int64_t next = chunk - side * of_first + 1;
    count = ceil_div(a.bounds[(2 * side + 1) * a.numbers + open_id], kChunk) - next;
    opening = pieces + chunk * stride + 2 * a.width;
    pieces += (chunk + 1) * stride + a.width;
    to = a.table + ((side * a.kinds + kind) * a.numbers + open_id) * a.width;
  }
  const int feature = kFoldSlice * slice + 4 * lane;
  const bool has_feature = feature < a.width;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const auto add = [&](const float4& more) { sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w; };
#pragma unroll 4
  for (std::int64_t piece = warp; piece < count; piece += 8) {
    if (has_feature) add(__ldg(reinterpret_cast<const float4*>(pieces + piece * stride + feature)));
  }
  __shared__ float4 sums[8][32];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !has_feature) return;
#pragma unroll
  for (int w = 1; w < 8; ++w) add(sums[w][lane]);
  if (opening != nullptr) add(*reinterpret_cast<const float4*>(opening + feature));
  *reinterpret_cast<float4*>(to + feature) = sum;
}

}  // namespace

std::int64_t GroupSums::place(void* workspace) {
  std::int64_t bytes = 0;
  const auto take = [&](auto*& field, std::int64_t elements) {
    field = reinterpret_cast<std::decay_t<decltype(field)>>(static_cast<char*>(workspace) + bytes);
    bytes += round_up(elements * std::int64_t{sizeof(*field)}, 64);
  };
  const std::int64_t chunks = chunks_of(*this), of_groups = first.ids == nullptr ? 0 : 1;
  take(total, std::int64_t{sides} * kinds * width);
  take(table, of_groups * sides * kinds * numbers * width);
  take(bounds, of_groups * sides * 2 * numbers);
  take(partial, chunks * kinds * 3 * width);
  take(open_ids, of_groups * chunks);
  return bytes;
}

cudaError_t sum_groups(const GroupSums& sums, cudaStream_t stream) {
  const bool grouped = sums.first.ids != nullptr;
  if (grouped) {
    const std::size_t bytes = sizeof(std::int32_t) * sums.sides * 2 * sums.numbers;
    const cudaError_t status = cudaMemsetAsync(sums.bounds, 0, bytes, stream);
    if (status != cudaSuccess) return status;
  }
  const std::int64_t chunks = chunks_of(sums), units = sums.sides + (grouped ? chunks : 0);
  const auto grid = [](std::int64_t x, std::int64_t y, int z) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), z);
  };
  const cudaError_t status = launch(
      group_sums_kernel, grid(ceil_div(chunks * sums.kinds, 8), ceil_div(sums.width, kSlice), 1), 256, stream, sums);
  if (status != cudaSuccess) return status;
  return launch(fold_sums_kernel, grid(units, ceil_div(sums.width, kFoldSlice), sums.kinds), 256, stream, sums);
}

}  // namespace modest_align::cuda
