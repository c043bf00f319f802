// What both passes over the logits share: which pairs of a tile are excluded, and the loop that packs the operands and
// hands each tile of dot products, in registers, to an epilogue.
#pragma once

#include "matmul.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

constexpr float kLog2E = 1.44269504088896341f;
// As in backends/__init__.py: 100 binades of headroom above the shift; below 2^-80 a sum may have lost terms.
constexpr float kHeadroom = 100.0f;
constexpr float kSmallestLog2Sum = -80.0f;

MODEST_ALIGN_INLINE int64_t padded(int64_t columns) { return round_up(columns, kTileColumns); }

// Logits in units of log2 are scale_log2 * dot, and those minus `shift` do not overflow exp2.
template <class Operand>
struct Matrix {
  using Element = typename Operand::Element;
  const Logits& a;
  const Element *x_hat, *y_hat;
  int64_t steps;  // of a dot product, a word of both rows each
  float scale_log2, shift;
  int64_t first_kept;  // row

  explicit Matrix(const Logits& a)
      : a(a),
        x_hat(static_cast<const Element*>(a.x_hat)),
        y_hat(static_cast<const Element*>(a.y_hat)),
        steps(a.width / Operand::kPerWord),
        scale_log2(*a.scale * kLog2E),
        shift(scale_log2 > kHeadroom ? scale_log2 - kHeadroom : 0.0f),
        first_kept(a.rows - a.kept_rows) {}

  // Whether one shift can serve all rows and columns: where it cannot, no exponential is kept.
  bool may_share_shift() const { return scale_log2 >= 0 && scale_log2 <= 2 * kHeadroom; }

  // The kept exponentials of a row; null before the first that has some, which begins a tile.
  MODEST_ALIGN_METHOD Element* kept(int64_t row) const {
    return row < first_kept ? nullptr : static_cast<Element*>(a.exponentials) + (row - first_kept) * a.kept_stride;
  }
};

// The pairs of a tile's columns that are excluded with a row, or do not exist.
struct Excluded {
  IntVec id[kTileVectors], number[kTileVectors], outside[kTileVectors];

  MODEST_ALIGN_INLINE Excluded of(const Logits& a, int64_t col0, int64_t end) {
    int32_t ids[kTileColumns], numbers[kTileColumns], out[kTileColumns];
    for (int j = 0; j < kTileColumns; ++j) {
      out[j] = col0 + j < end ? 0 : -1;
      ids[j] = a.col_ids && !out[j] ? a.col_ids[col0 + j] : 0;
      numbers[j] = static_cast<int32_t>(col0 + j);
    }
    Excluded found;
    for (int v = 0; v < kTileVectors; ++v) {
      found.id[v] = load<IntVec>(ids + v * kLanes);
      found.number[v] = load<IntVec>(numbers + v * kLanes);
      found.outside[v] = load<IntVec>(out + v * kLanes);
    }
    return found;
  }

  // All bits set where a pair of vector v and this row is excluded.
  IntVec mask(const Logits& a, int v, int64_t row) const {
    const int32_t row_id = a.row_ids ? a.row_ids[row] : 1;
    const int32_t row_number = a.exclude_diagonal ? static_cast<int32_t>(row) : -1;
    return (id[v] == row_id) | (number[v] == row_number) | outside[v];
  }
};

struct IdRange {
  int32_t lowest, highest;

  MODEST_ALIGN_INLINE IdRange of(const int32_t* ids, int64_t first, int64_t count) {
    if (!ids) return {0, 0};
    IdRange range{ids[first], ids[first]};
    for (int64_t i = first + 1; i < first + count; ++i) {
      range.lowest = ids[i] < range.lowest ? ids[i] : range.lowest;
      range.highest = ids[i] > range.highest ? ids[i] : range.highest;
    }
    return range;
  }
};

// What a worker packs: `panel` rows of the left operand, and a tile's columns of the right one.
struct Packed {
  int64_t panel;
  uint32_t* left;    // [panel, steps]
  uint32_t* right;   // [kTileColumns, steps]
  IdRange* row_ids;  // of each tile

  MODEST_ALIGN_INLINE Packed take(Arena& arena, int64_t panel, int64_t steps) {
    Packed packed{panel, nullptr, nullptr, nullptr};
    packed.left = arena.take<uint32_t>(panel * steps);
    packed.right = arena.take<uint32_t>(kTileColumns * steps);
    packed.row_ids = arena.take<IdRange>(panel / kTileRows);
    return packed;
  }
};

template <class Operand, class Epilogue, bool some_excluded>
__attribute__((noinline)) void multiply_one_tile(const Matrix<Operand>& m, const uint32_t* left, const uint32_t* right,
                                                 int64_t row0, int64_t col0, int64_t col_end, Epilogue& epilogue) {
  Vec acc[kTileRows][kTileVectors] = {};
  multiply_tile<Operand>(left, right, m.steps, acc);
  Excluded excluded;
  if (some_excluded) excluded = Excluded::of(m.a, col0, col_end);
  epilogue.template tile<some_excluded>(acc, excluded, row0, col0);
}

// The rows [first, last) times the columns [col_first, col_last). The epilogue sees begin_rows(i0, i1), then for every
// kTileColumns columns begin_columns(), a tile<some_excluded>(acc, excluded, row0, col0) for all of those rows and
// end_columns(col0), then end_rows().
template <class Operand, class Epilogue>
void multiply_rows(const Matrix<Operand>& m, const Packed& packed, int64_t first, int64_t last, int64_t col_first,
                   int64_t col_last, Epilogue& epilogue) {
  const Logits& a = m.a;
  const uint32_t* x_words = reinterpret_cast<const uint32_t*>(m.x_hat);
  const uint32_t* y_words = reinterpret_cast<const uint32_t*>(m.y_hat);
  for (int64_t i0 = first; i0 < last; i0 += packed.panel) {
    const int64_t i1 = smaller(last, i0 + packed.panel), tiles = ceil_div(i1 - i0, kTileRows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row0 = i0 + t * kTileRows, count = smaller(kTileRows, i1 - row0);
      pack_along_rows<kTileRows>(packed.left + t * kTileRows * m.steps, x_words + row0 * m.steps, m.steps, count,
                                 m.steps);
      packed.row_ids[t] = IdRange::of(a.row_ids, row0, count);
    }
    epilogue.begin_rows(i0, i1);
    for (int64_t col0 = col_first; col0 < col_last; col0 += kTileColumns) {
      const int64_t count = smaller(kTileColumns, col_last - col0);
      pack_along_rows<kTileColumns>(packed.right, y_words + col0 * m.steps, m.steps, count, m.steps);
      const IdRange col_ids = IdRange::of(a.col_ids, col0, count);
      epilogue.begin_columns();
      const int64_t next = smaller(kTileColumns, col_last - col0 - count);
      const Ahead ahead{reinterpret_cast<const char*>(y_words + (col0 + count) * m.steps), 4 * m.steps, next,
                        4 * m.steps / kLine, tiles};
      for (int64_t t = 0; t < tiles; ++t) {
        ahead.fetch(t);
        const int64_t row0 = i0 + t * kTileRows;
        const IdRange row_ids = packed.row_ids[t];
        const bool diagonal = a.exclude_diagonal && row0 < col0 + kTileColumns && col0 < row0 + kTileRows;
        const bool ids = a.row_ids && row_ids.highest >= col_ids.lowest && row_ids.lowest <= col_ids.highest;
        const auto multiply = count < kTileColumns || diagonal || ids ? multiply_one_tile<Operand, Epilogue, true>
                                                                      : multiply_one_tile<Operand, Epilogue, false>;
        multiply(m, packed.left + t * kTileRows * m.steps, packed.right, row0, col0, col_last, epilogue);
      }
      epilogue.end_columns(col0);
    }
    epilogue.end_rows();
  }
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
