// In place of csrc/cuda/matmul.cuh: the tiles' dot products by plain loops, in WGMMA's layout, to the same epilogues.
#pragma once

#include <array>
#include <cfloat>
#include <vector>

#include "cuda/logits.cuh"
#include "cuda_fp16.h"

namespace modest_align::cuda {

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline void meet(int group) { emulator::wait(emulator::barriers[group], 128); }

inline bool meet_any(int group, bool value) {
  static bool votes[2][256];
  static int rounds[256];
  const int thread = emulator::current->number;
  bool* round = votes[rounds[thread]++ % 2];
  round[thread] = value;
  meet(group);
  return std::any_of(round + 128 * group, round + 128 * (group + 1), [](bool vote) { return vote; });
}

template <int kColumns>
struct Accumulators {
  std::array<float, kColumns / 2> values;
  float& operator()(int i) { return values[i]; }
  float operator()(int i) const { return values[i]; }
};

template <class Tile>
cudaError_t launch_matmul(const void* x_hat, const void* y_hat, int rows, int columns, int width,
                          const typename Tile::Params& params, cudaStream_t) {
  constexpr int kColumns = Tile::kColumns;
  const auto* x_half = static_cast<const __half*>(x_hat);
  const auto* y_half = static_cast<const __half*>(y_hat);
  const std::vector<float> x(x_half, x_half + std::int64_t{rows} * width);
  const std::vector<float> y(y_half, y_half + std::int64_t{columns} * width);
  // One block has all tiles, as a persistent one has several: nothing but the epilogue's barriers is between two.
  std::vector<std::array<int, 2>> places;
  std::vector<std::vector<float>> products;
  for (int row0 = 0; row0 < rows; row0 += kTileRows) {
    for (int column0 = 0; column0 < columns; column0 += kColumns) {
      places.push_back({row0, column0});
      // Past the ends the bulk copies write zeros.
      std::vector<float>& tile = products.emplace_back(kTileRows * kColumns, 0.0f);
      for (int i = 0; i < std::min(kTileRows, rows - row0); ++i) {
        for (int j = 0; j < std::min(kColumns, columns - column0); ++j) {
          const float* a = x.data() + std::int64_t{row0 + i} * width;
          const float* b = y.data() + std::int64_t{column0 + j} * width;
          for (int d = 0; d < width; ++d) tile[i * kColumns + j] += a[d] * b[d];
        }
      }
    }
  }
  typename Tile::Shared shared;
  blockDim = dim3(256);
  emulator::run_block(256, [&] {
    const int thread = emulator::current->number, lane = thread % 32, warp = thread / 32 % 4, group = thread / 128;
    for (std::size_t t = 0; t < places.size(); ++t) {
      const auto [row0, column0] = places[t];
      const int group_row = row0 + group * kGroupRows;
      if (group_row >= rows) continue;
      Accumulators<kColumns> dots;
      for (int i = 0; i < kColumns / 2; ++i) {
        const int row = group * kGroupRows + 16 * warp + lane / 4 + 8 * (i / 2 % 2);
        dots(i) = products[t][row * kColumns + 8 * (i / 4) + 2 * (lane % 4) + i % 2];
      }
      const Place place(group_row + 16 * warp, column0, kColumns, lane, rows, columns, params.pairs);
      Tile::run(params, shared, place, dots, thread);
    }
  });
  return cudaSuccess;
}

}  // namespace modest_align::cuda
