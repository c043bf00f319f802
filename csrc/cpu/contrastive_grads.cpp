// Both products of G = row_weight exp(S - row_lse) + col_weight exp(S - col_lse) with the other side: from the
// exponentials that contrastive_stats kept, and for all other rows from blocks of them that are computed again.
#include "level.h"
#include "logits.h"
#include "parallel.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {
namespace {

// Bytes of G for each thread, and in all: eight times as much is no faster.
constexpr int64_t kBlockBytes = int64_t{1} << 20, kMostBlockBytes = int64_t{64} << 20;
// Rows of a product that one task computes.
constexpr int64_t kTaskRows = 21 * kTileRows;
// Bytes of the right operand that stay packed, for the second cache.
constexpr int64_t kRightBytes = int64_t{512} << 10;

// Sizes of the blocks of G and of the tasks.
struct Extents {
  int64_t block_rows, block_columns;  // of G, multiples of the tile
  int64_t part_rows;                  // of a block that one task writes
  int64_t panel;                      // of those that it packs together
  int64_t depth;                      // steps of the products at a time

  template <class Operand>
  static Extents of(const ContrastiveGrads& a, Operand) {
    const int64_t elements = smaller(kBlockBytes * a.threads, kMostBlockBytes) / sizeof(typename Operand::Element);
    int64_t side = 512;
    while (4 * side * side <= elements) side *= 2;
    Extents e;
    e.block_rows = even_part(a.rows, side, 2 * kTileRows);
    e.block_columns = even_part(a.columns, elements / e.block_rows, 2 * kTileColumns);
    // Each task packs all columns of the block: few tasks, but some to spare for a thread that is held up.
    e.part_rows = even_part(e.block_rows, ceil_div(e.block_rows, 2 * a.threads), kTileRows);
    e.panel = smaller(panel_rows(a.width / Operand::kPerWord), e.part_rows);
    e.depth = larger(64, smaller(512, kRightBytes / (4 * round_up(a.width, kTileColumns)) / kLanes * kLanes));
    return e;
  }
};

// What a task packs: a tile's rows of the left operand, and the whole width of the right one.
struct Panels {
  uint32_t *left, *right;
  void* weighted;  // [kTileRows, depth] elements of a block, before they are packed

  template <class Operand>
  static Panels take(Arena& arena, int64_t width, int64_t depth, Operand) {
    Panels p;
    p.left = arena.take<uint32_t>(kTileRows * depth + kLanes);  // the last step is stored as a whole vector
    p.right = arena.take<uint32_t>(round_up(width, kTileColumns) * depth);
    p.weighted = arena.take<uint32_t>(kTileRows * depth);
    return p;
  }
};

struct Workspace {
  float *row_log2, *col_log2;      // [rows], [padded columns]: the logsumexps in units of log2
  float *row_weight, *col_weight;  // beside them; 0 for what does not count
  float *row_factor, *col_factor;  // G is a block's element times the sum of its row's and its column's factor
  char* block;
  char* workers;
  int64_t worker_bytes, bytes;

  template <class Operand>
  Workspace(char* base, const ContrastiveGrads& a, const Extents& e, Operand operand) {
    const int64_t length = columns_length(a);
    Arena arena{base};
    row_log2 = arena.take<float>(a.rows);
    row_weight = arena.take<float>(a.rows);
    row_factor = arena.take<float>(a.rows);
    col_log2 = arena.take<float>(length);
    col_weight = arena.take<float>(length);
    col_factor = arena.take<float>(length);
    block = arena.take<char>(e.block_rows * e.block_columns * sizeof(typename Operand::Element) + 64);
    workers = arena.next;
    Arena for_block{nullptr}, for_product{nullptr};
    Packed::take(for_block, e.panel, a.width / Operand::kPerWord);
    Panels::take(for_product, a.width, e.depth, operand);
    const char* const null = nullptr;
    worker_bytes = staggered(larger(for_block.next - null, for_product.next - null));
    bytes = workers - base + a.threads * worker_bytes;
  }

  // Of the columns' vectors: a tile's rows of the left operand can be loaded from every column on.
  static int64_t columns_length(const ContrastiveGrads& a) { return padded(a.columns) + round_up(kTileRows, kLanes); }
};

// `lse` in units of log2, and the weights beside it; what no pair takes part in, or is past the end, counts for
// nothing. False if a softmax is so small under the shift that its exponentials may have lost terms.
bool prepare(const float* lse, const float* weight, int64_t count, int64_t length, float shift, float* log2,
             float* prepared_weight) {
  bool exact = true;
  for (int64_t i = 0; i < length; ++i) {
    log2[i] = i < count && lse[i] != -__builtin_inff() ? lse[i] * kLog2E : __builtin_inff();
    prepared_weight[i] = i < count ? weight[i] : 0.0f;
    exact = exact && !(log2[i] - shift < kSmallestLog2Sum);
  }
  return exact;
}

// The epilogue that writes a block: exponentials under the shared shift, or if that does not suffice G itself. Rows
// from row0 on to `last`, columns from col0 on.
template <class Operand>
struct WriteBlock {
  const Matrix<Operand>& m;
  const Workspace& w;
  bool one_shift;
  int64_t row0, last, col0, stride;
  typename Operand::Element* block;

  void begin_rows(int64_t, int64_t) {}
  void begin_columns() {}
  void end_columns(int64_t) {}
  void end_rows() {}

  template <bool some_excluded>
  MODEST_ALIGN_METHOD void tile(const Vec (&acc)[kTileRows][kTileVectors], const Excluded& excluded, int64_t tile_row,
                                int64_t tile_col) {
    typename Operand::Element* out = block + (tile_row - row0) * stride + (tile_col - col0);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = tile_row + r;
      if (row >= last) break;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t col = tile_col + v * kLanes;
        const Vec s = acc[r][v] * m.scale_log2;
        Vec value;
        if (one_shift) {
          value = exp2(s - m.shift);
        } else {
          value = exp2(s - w.row_log2[row]) * w.row_weight[row] +
                  exp2(s - load<Vec>(w.col_log2 + col)) * load<Vec>(w.col_weight + col);
        }
        if (some_excluded) value = excluded.mask(m.a, v, row) ? Vec{} : value;
        store_vector(out + r * stride + v * kLanes, value);
      }
    }
  }
};

// out[m, :] (+)= sum over k of a tile's left[k, m] * right[k, :], for `count` rows and `width` columns.
template <class Operand>
void multiply_panels(const uint32_t* left, const uint32_t* right, int64_t steps, int64_t count, int64_t width,
                     bool first, float* out) {
  for (int64_t d = 0; d < width; d += kTileColumns) {
    Vec acc[kTileRows][kTileVectors] = {};
    multiply_tile<Operand>(left, right + d * steps, steps, acc);
    if (count == kTileRows && d + kTileColumns <= width) {
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          float* to = out + m * width + d + v * kLanes;
          store(to, first ? acc[m][v] : acc[m][v] + load<Vec>(to));
        }
      }
    } else {
      float tile[kTileRows][kTileColumns];
      std::memcpy(tile, acc, sizeof tile);
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t c = 0; c < smaller(kTileColumns, width - d); ++c) {
          float& to = out[m * width + d + c];
          to = first ? tile[m][c] : to + tile[m][c];
        }
      }
    }
  }
}

// Exponentials, or G, of some rows and columns: [rows, stride], readable for a vector from any element on.
template <class Operand>
struct Block {
  const typename Operand::Element* elements;
  int64_t stride, row0, rows, col0, columns;
  const float *row_factor, *col_factor;  // from row0 and col0 on

  // packed[k * kTileRows + m] = word k of G's rows from `row` on, columns from `column` on: the left operand of the
  // images' gradient. Zero for rows past `count`.
  MODEST_ALIGN_METHOD void pack_rows(const Panels& p, int64_t row, int64_t count, int64_t column,
                                     int64_t columns) const {
    using Element = typename Operand::Element;
    Element* const weighted = static_cast<Element*>(p.weighted);
    const int64_t words = ceil_div(columns, Operand::kPerWord), length = words * Operand::kPerWord;
    const int64_t row_length = round_up(length, kLanes);
    for (int64_t m = 0; m < count; ++m) {
      const Element* from = elements + (row + m) * stride + column;
      for (int64_t k = 0; k < length; k += kLanes) {
        store_vector(weighted + m * row_length + k,
                     load_vector(from + k) * (load<Vec>(col_factor + column + k) + row_factor[row + m]));
      }
    }
    pack_along_rows<kTileRows>(p.left, reinterpret_cast<const uint32_t*>(weighted), row_length / Operand::kPerWord,
                               count, words);
  }

  // packed[k * kTileRows + m] = G's element in row `row` + k and column `column` + m, of two rows for pairs: the left
  // operand of the texts' gradient. Zero for an odd last row; columns past the end are those of no result.
  MODEST_ALIGN_METHOD void pack_columns(const Panels& p, int64_t column, int64_t row, int64_t rows) const {
    const auto g = [&](int64_t i, int64_t j) {
      return load_vector(elements + i * stride + j) * (load<Vec>(col_factor + j) + row_factor[i]);
    };
    uint32_t* to = p.left;
    for (int64_t k = 0; k < rows; k += Operand::kPerWord, to += kTileRows) {
      for (int m = 0; m < kTileRows; m += kLanes) {
        const int64_t i = row + k, j = column + m;
        const bool paired = k + 1 < rows;
        store(to + m, Operand::word(g(i, j), Operand::kPerWord > 1 && paired ? g(i + 1, j) : Vec{}));
      }
    }
  }
};

// out rows (+)= left * right, where right has as many rows as left has steps: columns of the block for the images'
// gradient (whose rows are the block's), rows of it for the texts' (whose rows are the block's columns).
template <class Operand, bool images>
void product(const Block<Operand>& block, int64_t begin, int64_t count, const typename Operand::Element* right,
             int64_t width, int64_t depth, bool first, float* out, const Panels& p) {
  const int64_t depth_rows = images ? block.columns : block.rows;
  for (int64_t k0 = 0; k0 < depth_rows; k0 += depth * Operand::kPerWord) {
    const int64_t rows = smaller(depth_rows - k0, depth * Operand::kPerWord);
    const int64_t steps = ceil_div(rows, Operand::kPerWord);
    for (int64_t d = 0; d < width; d += kTileColumns) {
      pack_across_rows<Operand, kTileColumns>(p.right + d * steps, right + k0 * width + d, width,
                                              smaller(kTileColumns, width - d), rows);
    }
    for (int64_t m = 0; m < count; m += kTileRows) {
      const int64_t tile = smaller(kTileRows, count - m);
      if (images) {
        block.pack_rows(p, begin + m, tile, k0, rows);
      } else {
        block.pack_columns(p, begin + m, k0, rows);
      }
      multiply_panels<Operand>(p.left, p.right, steps, tile, width, first && k0 == 0, out + m * width);
    }
  }
}

// Adds both products with a block to the results.
template <class Operand>
void multiply_block(const ContrastiveGrads& a, const Matrix<Operand>& m, const Extents& e, const Workspace& w,
                    const Block<Operand>& block, int used, Team& team) {
  const auto part_of = [&](int64_t rows) {
    return even_part(rows, smaller(kTaskRows, ceil_div(rows, used)), kTileRows);
  };
  const int64_t x_part = part_of(block.rows), y_part = part_of(block.columns), width = a.width;
  const int64_t x_tasks = a.grad_x ? ceil_div(block.rows, x_part) : 0;
  const int64_t y_tasks = a.grad_y ? ceil_div(block.columns, y_part) : 0;
  parallel(team, x_tasks + y_tasks, [&](int64_t task, int worker) {
    Arena arena{w.workers + worker * w.worker_bytes};
    const Panels p = Panels::take(arena, width, e.depth, Operand());
    if (task < x_tasks) {
      const int64_t r = task * x_part;
      product<Operand, true>(block, r, smaller(x_part, block.rows - r), m.y_hat + block.col0 * width, width, e.depth,
                             block.col0 == 0, a.grad_x + (block.row0 + r) * width, p);
    } else {
      const int64_t c = (task - x_tasks) * y_part;
      product<Operand, false>(block, c, smaller(y_part, block.columns - c), m.x_hat + block.row0 * width, width,
                              e.depth, block.row0 == 0, a.grad_y + (block.col0 + c) * width, p);
    }
  });
}

template <class Operand>
void run(const ContrastiveGrads& a, int used, Team& team) {
  using Element = typename Operand::Element;
  const Matrix<Operand> m(a);
  const Extents e = Extents::of(a, Operand());
  const Workspace w(static_cast<char*>(a.workspace), a, e, Operand());
  const int64_t length = Workspace::columns_length(a);
  const bool rows_exact = prepare(a.row_lse, a.row_weight, a.rows, a.rows, m.shift, w.row_log2, w.row_weight);
  const bool cols_exact = prepare(a.col_lse, a.col_weight, a.col_count, length, m.shift, w.col_log2, w.col_weight);
  const bool one_shift = m.may_share_shift() && rows_exact && cols_exact;
  for (int64_t i = 0; i < a.rows; ++i) {
    w.row_factor[i] = one_shift ? w.row_weight[i] * __builtin_exp2f(m.shift - w.row_log2[i]) : 1.0f;
  }
  for (int64_t j = 0; j < length; ++j) {
    w.col_factor[j] = one_shift ? w.col_weight[j] * __builtin_exp2f(m.shift - w.col_log2[j]) : 0.0f;
  }

  // What was not kept, in blocks of a few tasks' size.
  const int64_t computed = one_shift ? m.first_kept : a.rows;
  Element* const elements = reinterpret_cast<Element*>(w.block);
  for (int64_t i0 = 0; i0 < computed; i0 += e.block_rows) {
    const int64_t i1 = smaller(computed, i0 + e.block_rows);
    for (int64_t j0 = 0; j0 < a.columns; j0 += e.block_columns) {
      const int64_t j1 = smaller(a.columns, j0 + e.block_columns), stride = padded(j1 - j0);
      parallel(team, ceil_div(i1 - i0, e.part_rows), [&](int64_t task, int worker) {
        const int64_t first = i0 + task * e.part_rows, last = smaller(i1, first + e.part_rows);
        Arena arena{w.workers + worker * w.worker_bytes};
        WriteBlock<Operand> epilogue{m, w, one_shift, i0, last, j0, stride, elements};
        multiply_rows(m, Packed::take(arena, e.panel, m.steps), first, last, j0, j1, epilogue);
      });
      multiply_block(a, m, e, w, {elements, stride, i0, i1 - i0, j0, j1 - j0, w.row_factor + i0, w.col_factor + j0},
                     used, team);
    }
  }
  if (computed < a.rows) {
    multiply_block(
        a, m, e, w,
        {m.kept(computed), a.kept_stride, computed, a.kept_rows, 0, a.columns, w.row_factor + computed, w.col_factor},
        used, team);
  }
}

}  // namespace

void contrastive_grads(const ContrastiveGrads& a) {
  const int used = useful_threads(a.threads, a.rows * a.columns * a.width);
  with_team(used, [&](Team& team) {
    with_operand(a.operand_dtype, [&](auto operand) { run<decltype(operand)>(a, used, team); });
  });
}

int64_t contrastive_grads_workspace(const ContrastiveGrads& a) {
  return with_operand(a.operand_dtype,
                      [&](auto operand) { return Workspace(nullptr, a, Extents::of(a, operand), operand).bytes; });
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
