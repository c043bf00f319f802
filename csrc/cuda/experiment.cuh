// Ways to run one warp group's epilogue under the other's matmul, around the Epilogue of matmul.cuh.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/dispatch_policy.hpp>

#include <type_traits>

#include "cuda/logits.cuh"
#include "experiment.h"

namespace modest_align::cuda {

// In ping-pong a warp group has a tile of its own, and CUTLASS counts its threads from 0. The epilogue gets them
// counted as in a cooperative tile, for its barriers and shared memory are by warp group, and one m64 of the tile after
// another.
template <class Epilogue>
struct PingpongEpilogue : Epilogue {
  using Epilogue::Epilogue;

  template <class Shape, class TileShape, class Coord, class Dots, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Shape& shape, TileShape, const Coord& coord, Dots& dots, Mma, Residue, int,
                                 char* shared) {
    constexpr int kColumns = Epilogue::kColumns;
    static_assert(cute::is_same_v<typename Mma::AtomLayoutC_TV, cute::SM90::GMMA::CLayout_64xN<kColumns>>);
    static_assert(cute::size(Mma{}) == 128 && cute::tile_size<0>(Mma{}) == kGroupRows);
    static_assert(decltype(cute::size<1>(dots))::value == kTileRows / kGroupRows);
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < kTileRows / kGroupRows; ++m) {
      auto atom = dots(cute::_, m, cute::_);
      using Registers = decltype(cute::coalesce(atom.layout()));
      static_assert(cute::is_same_v<Registers, cute::Layout<cute::Int<kColumns / 2>, cute::_1>>);
      this->run(shape, cute::get<0>(coord) * kTileRows + m * kGroupRows, cute::get<1>(coord) * kColumns, atom,
                static_cast<int>(threadIdx.x) - 128, shared);
    }
  }
};

template <class Epilogue>
struct StaggeredEpilogue : Epilogue {
  using Epilogue::Epilogue;
  bool first = true;

  template <class Shape, class TileShape, class Coord, class Dots, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Shape& shape, TileShape tile, const Coord& coord, Dots& dots, Mma mma,
                                 Residue residue, int thread, char* shared) {
    constexpr int kHalfEpilogue = 6 * Epilogue::kColumns;  // cycles, predicted: benchmarks/NOTES.md
    // Once, for nothing but the operands' stages makes the warp groups wait for each other afterwards.
    if (first && thread >= 128)
      for (const long long start = clock64(); clock64() - start < kHalfEpilogue;) continue;
    first = false;
    Epilogue::operator()(shape, tile, coord, dots, mma, residue, thread, shared);
  }
};

template <class Epilogue>
using Experiment = std::conditional_t<kPingpong, PingpongEpilogue<Epilogue>,
                                      std::conditional_t<kStagger, StaggeredEpilogue<Epilogue>, Epilogue>>;

using Schedule = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                    cutlass::gemm::KernelTmaWarpSpecializedCooperative>;

}  // namespace modest_align::cuda
