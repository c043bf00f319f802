// Tiles of dot products on the tensor cores of sm_90a, each handed to an epilogue of ours in registers.
//
// CUTLASS moves the operands (TMA, multicast in a cluster of two) and multiplies them (WGMMA, two consumer warp groups
// on one tile). What a `Tile` is: kColumns, Params with `pairs`, Shared, and
//
//     static void run(params, shared, place, dots, thread)
//
// for 256 threads, whose warp groups of 128 come one by one, and not at all where they have no rows.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <cstdint>

#include "cuda/experiment.cuh"
#include "cuda/launch.h"
#include "cuda/logits.cuh"

namespace modest_align::cuda {

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The meeting of one warp group.
__device__ inline void meet(int group) {
  asm volatile("barrier.cta.sync %0, 128;\n"
               :
               : "r"(group + static_cast<int>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier))
               : "memory");
}

// The same; true for all if `value` is for any.
__device__ inline bool meet_any(int group, bool value) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred in, out;\n"
      "setp.ne.s32 in, %1, 0;\n"
      "barrier.cta.red.or.pred out, %2, 128, in;\n"
      "selp.s32 %0, 1, 0, out;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<int>(value)),
        "r"(group + static_cast<int>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier))
      : "memory");
  return any != 0;
}

// What CUTLASS asks of an epilogue, around a Tile.
template <class Tile>
struct Epilogue {
  static constexpr int kColumns = Tile::kColumns;
  using EpilogueSchedule = cutlass::epilogue::NoSmemWarpSpecialized;
  using DispatchPolicy = EpilogueSchedule;
  using ElementC = void;
  using ElementD = cutlass::half_t;
  using StrideC = cute::Stride<std::int64_t, cute::_1, std::int64_t>;
  using StrideD = StrideC;
  using Params = typename Tile::Params;
  using Arguments = Params;
  using SharedStorage = typename Tile::Shared;

  Params params;

  CUTLASS_HOST_DEVICE explicit Epilogue(const Params& params) : params(params) {}

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static std::size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  template <class Shape, class TileShape, class Coord, class Dots, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Shape& shape, TileShape, const Coord& coord, Dots& dots, Mma, Residue,
                                 int thread, char* shared) {
    using cute::get;
    static_assert(cute::is_same_v<typename Mma::AtomLayoutC_TV, cute::SM90::GMMA::CLayout_64xN<kColumns>>);
    static_assert(cute::size(Mma{}) == 256 && decltype(cute::size(dots))::value == kColumns / 2);
    run(shape, get<0>(coord) * kTileRows + thread / 128 * kGroupRows, get<1>(coord) * kColumns, dots, thread, shared);
  }

  template <class Shape, class Dots>
  CUTLASS_DEVICE void run(const Shape& shape, int group_row, int tile_column, Dots& dots, int thread, char* shared) {
    using cute::get;
    const int lane = thread % 32, warp = thread / 32 % 4;
    // A whole warp group leaves or stays, for it meets at barriers.
    if (group_row >= get<0>(shape) || tile_column >= get<1>(shape)) return;
    const Place place(group_row + 16 * warp, tile_column, kColumns, lane, get<0>(shape), get<1>(shape), params.pairs);
    Tile::run(params, *reinterpret_cast<SharedStorage*>(shared), place, dots, thread);
  }
};

template <class Tile>
struct MatmulOf {
  using TileShape = cute::Shape<cute::Int<kTileRows>, cute::Int<Tile::kColumns>, cute::_64>;
  using ClusterShape = cute::Shape<cute::Int<kClusterRows>, cute::Int<kClusterColumns>, cute::_1>;
  using CollectiveEpilogue =
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Experiment<Epilogue<Tile>>>;
  using Carveout = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Tile::Shared))>;
  using Mainloop =
      typename cutlass::gemm::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
                                                            cutlass::half_t, cutlass::layout::RowMajor, 8,
                                                            cutlass::half_t, cutlass::layout::ColumnMajor, 8, float,
                                                            TileShape, ClusterShape, Carveout, Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, Mainloop, CollectiveEpilogue,
                                                      cutlass::gemm::PersistentScheduler>;
};

template <class Tile>
__global__ void __launch_bounds__(MatmulOf<Tile>::Kernel::MaxThreadsPerBlock, 1)
    matmul_kernel(const __grid_constant__ typename MatmulOf<Tile>::Kernel::Params params) {
  extern __shared__ __align__(kSharedAlignment) char shared[];
  typename MatmulOf<Tile>::Kernel()(params, shared);
}

// Eight, four or two clusters of rows sweep the columns together, so that L2 serves both operands; the largest that
// makes few tiles of nothing, for the scheduler rounds up to it.
inline int swizzle(std::int64_t tiles_of_rows, std::int64_t tiles_of_columns) {
  for (int size : {8, 4, 2}) {
    const std::int64_t rounded_rows = round_up(tiles_of_rows, kClusterRows * size);
    const std::int64_t rounded_columns = round_up(tiles_of_columns, kClusterColumns * size);
    if (rounded_rows * rounded_columns * 16 <= tiles_of_rows * tiles_of_columns * 17) return size;
  }
  return 1;
}

// x_hat [rows, width] times y_hat [columns, width] transposed, a tile at a time to the epilogue.
template <class Tile>
cudaError_t launch_matmul(const void* x_hat, const void* y_hat, int rows, int columns, int width,
                          const typename Tile::Params& epilogue, cudaStream_t stream) {
  using Kernel = typename MatmulOf<Tile>::Kernel;
  static_assert(Kernel::SharedStorageSize <= 227 * 1024 && MatmulOf<Tile>::Mainloop::DispatchPolicy::Stages >= 3);
  if (!is_aligned(x_hat) || !is_aligned(y_hat)) return cudaErrorMisalignedAddress;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;

  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {rows, columns, width};
  arguments.mainloop.ptr_A = static_cast<const cutlass::half_t*>(x_hat);
  arguments.mainloop.dA = {std::int64_t{width}, cute::_1{}, std::int64_t{0}};
  arguments.mainloop.ptr_B = static_cast<const cutlass::half_t*>(y_hat);
  arguments.mainloop.dB = {std::int64_t{width}, cute::_1{}, std::int64_t{0}};
  arguments.epilogue = epilogue;
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = processors;
  arguments.scheduler.max_swizzle_size = swizzle(ceil_div(rows, kTileRows), ceil_div(columns, Tile::kColumns));
  if (!Kernel::can_implement(arguments)) return cudaErrorInvalidValue;

  status =
      cudaFuncSetAttribute(matmul_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterRows, kClusterColumns, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  if (kClusterRows * kClusterColumns > 2) {
    // CUTLASS would leave processors idle: of the units of 18 that it assumes, a cluster of two alone uses all.
    config.gridDim = dim3(kClusterRows, kClusterColumns);
    status = cudaOccupancyMaxActiveClusters(&arguments.hw_info.max_active_clusters, matmul_kernel<Tile>, &config);
    if (status != cudaSuccess) return status;
  }
  const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  config.gridDim = Kernel::get_grid_shape(params);
  return cudaLaunchKernelEx(&config, matmul_kernel<Tile>, params);
}

}  // namespace modest_align::cuda
