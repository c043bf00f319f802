// What both passes over the logits share: their scaling, and which pairs of a tile are no negatives.
#pragma once

#include "matmul.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

constexpr float kLog2E = 1.44269504088896341f;
// As in eager.py: 100 binades of headroom above the shift; below 2^-80 a sum may have lost terms that matter.
constexpr float kHeadroom = 100.0f;
constexpr float kSmallestLog2Sum = -80.0f;

MODEST_ALIGN_INLINE int64_t padded(int64_t columns) { return round_up(columns, kTileColumns); }

// The pairs of a tile's columns that are negatives of a row: they exist, and have another id.
struct Negatives {
  IntVec ids[kTileVectors], exists[kTileVectors];

  MODEST_ALIGN_INLINE Negatives of(const int32_t* ids, int64_t col0, int64_t columns) {
    int32_t id[kTileColumns], in[kTileColumns];
    for (int j = 0; j < kTileColumns; ++j) {
      in[j] = col0 + j < columns ? -1 : 0;
      id[j] = in[j] ? ids[col0 + j] : 0;
    }
    Negatives found;
    for (int v = 0; v < kTileVectors; ++v) {
      found.ids[v] = load<IntVec>(id + v * kLanes);
      found.exists[v] = load<IntVec>(in + v * kLanes);
    }
    return found;
  }

  // All bits set where vector v's pairs with a row of this id are negatives.
  IntVec mask(int v, int32_t row_id) const { return (ids[v] != row_id) & exists[v]; }
};

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
