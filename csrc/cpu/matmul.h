// A matmul of packed operands: the tile of products that stays in registers, and the packing.
//
// Both operands are packed in 32-bit words, a word for one step of the sum (one float32 or two bfloat16): rows of
// kTileRows words for the left one, of kTileColumns words for the right one, step after step.
#pragma once

#include "vector.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

// acc[m][v] += sum over the steps of left[m] * right[v]
template <class Operand>
MODEST_ALIGN_INLINE void multiply_tile(const uint32_t* left, const uint32_t* right, int64_t steps,
                                       Vec (&acc)[kTileRows][kTileVectors]) {
  for (int64_t k = 0; k < steps; ++k) {
    WordVec b[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) b[v] = load<WordVec>(right + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = Operand::multiply_add(acc[m][v], left[m], b[v]);
    }
    left += kTileRows;
    right += kTileColumns;
  }
}

// Rows of the left operand that are packed together: about a megabyte, for the second cache.
MODEST_ALIGN_INLINE int64_t panel_rows(int64_t steps) {
  return larger(8, (int64_t{1} << 18) / (steps * kTileRows)) * kTileRows;
}

constexpr int64_t kLine = 64;  // bytes of a cache line

// Pieces of a workspace, each aligned for a vector.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
};

// A worker's share of a workspace, so long that the next one starts half a page and a line further on: where all
// streams of two workers are at the same place of their pages they slow each other down, by a quarter in
// contrastive_grads.
MODEST_ALIGN_INLINE int64_t staggered(int64_t bytes) { return round_up(bytes, 4096) + 2048 + 64; }

// What is packed next: [rows, lines] cache lines, some of which are fetched with each tile, so that the matmul hides
// it.
struct Ahead {
  const char* from;
  int64_t stride;  // bytes from row to row
  int64_t rows, lines, shares;

  MODEST_ALIGN_METHOD void fetch(int64_t share) const {
    const int64_t all = rows * lines;
    for (int64_t i = all * share / shares; i < all * (share + 1) / shares; ++i) {
      __builtin_prefetch(from + i % rows * stride + i / rows * kLine);
    }
  }
};

typedef uint32_t Quad __attribute__((vector_size(16)));

MODEST_ALIGN_INLINE Quad interleave_low(Quad a, Quad b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
MODEST_ALIGN_INLINE Quad interleave_high(Quad a, Quad b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

// packed[k * kWidth + m] = word k of row m, zero for rows past `count`: the steps run along the rows.
template <int kWidth>
static void pack_along_rows(uint32_t* packed, const uint32_t* source, int64_t row_words, int64_t count, int64_t steps) {
  // A cache line of every row at a time, so that what is written is still near when the next rows come to it.
  for (int64_t k0 = 0; k0 < steps; k0 += kLine / 4) {
    const int64_t k1 = smaller(steps, k0 + kLine / 4);
    int m = 0;
    for (; m + 4 <= kWidth && m + 4 <= count; m += 4) {
      const uint32_t* row = source + m * row_words;
      int64_t k = k0;
      for (; k + 4 <= k1; k += 4) {
        const Quad a = load<Quad>(row + k), b = load<Quad>(row + row_words + k);
        const Quad c = load<Quad>(row + 2 * row_words + k), d = load<Quad>(row + 3 * row_words + k);
        const Quad ac0 = interleave_low(a, c), ac1 = interleave_high(a, c);
        const Quad bd0 = interleave_low(b, d), bd1 = interleave_high(b, d);
        uint32_t* to = packed + k * kWidth + m;
        store(to, interleave_low(ac0, bd0));
        store(to + kWidth, interleave_high(ac0, bd0));
        store(to + 2 * kWidth, interleave_low(ac1, bd1));
        store(to + 3 * kWidth, interleave_high(ac1, bd1));
      }
      for (; k < k1; ++k) {
        for (int i = 0; i < 4; ++i) packed[k * kWidth + m + i] = row[i * row_words + k];
      }
    }
    for (; m < kWidth; ++m) {
      for (int64_t k = k0; k < k1; ++k) packed[k * kWidth + m] = m < count ? source[m * row_words + k] : 0;
    }
  }
}

// packed[k * kWidth + m] = element m of row k, of rows 2k and 2k + 1 for pairs: the steps run across the rows.
// Zero for elements past `count` and for rows past `rows`.
template <class Operand, int kWidth>
static void pack_across_rows(uint32_t* packed, const typename Operand::Element* source, int64_t stride, int64_t count,
                             int64_t rows) {
  using Element = typename Operand::Element;
  const int64_t steps = ceil_div(rows, Operand::kPerWord);
  for (int64_t k = 0; k < steps; ++k) {
    const Element* row = source + k * Operand::kPerWord * stride;
    uint32_t* to = packed + k * kWidth;
    if constexpr (Operand::kPerWord == 1) {
      if (count >= kWidth) {
        std::memcpy(to, row, 4 * kWidth);
      } else {
        std::memset(to, 0, 4 * kWidth);
        std::memcpy(to, row, 4 * count);
      }
    } else {
      const bool last = 2 * k + 1 == rows;
      const int64_t width = smaller(count, kWidth);
      for (int64_t m = 0; m < width; ++m) to[m] = row[m] | (last ? 0u : static_cast<uint32_t>(row[stride + m]) << 16);
      for (int64_t m = width; m < kWidth; ++m) to[m] = 0;
    }
  }
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
