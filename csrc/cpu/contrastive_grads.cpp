// Blocks of G = row_weight exp(S - row_lse) + col_weight exp(S - col_lse), and from each block both products with the
// other side.
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
    e.depth = larger(64, smaller(512, kRightBytes / (4 * round_up(a.width, kTileColumns))));
    return e;
  }
};

struct Workspace {
  float *row_log2, *col_log2;      // [rows], [padded columns]: the logsumexps in units of log2
  float *row_factor, *col_factor;  // the weights, times 2^(shift - those) if one shift serves all
  char* g;
  char* workers;
  int64_t worker_bytes, bytes;

  template <class Operand>
  Workspace(char* base, const ContrastiveGrads& a, const Extents& e, Operand) {
    Arena arena{base};
    row_log2 = arena.take<float>(a.rows);
    row_factor = arena.take<float>(a.rows);
    col_log2 = arena.take<float>(padded(a.columns));
    col_factor = arena.take<float>(padded(a.columns));
    g = arena.take<char>(e.block_rows * e.block_columns * sizeof(typename Operand::Element));
    workers = arena.next;
    Arena for_g{nullptr}, for_product{nullptr};
    Packed::take(for_g, e.panel, a.width / Operand::kPerWord);
    for_product.take<uint32_t>(kTileRows * e.depth);
    for_product.take<uint32_t>(round_up(a.width, kTileColumns) * e.depth);
    const char* const null = nullptr;
    worker_bytes = staggered(larger(for_g.next - null, for_product.next - null));
    bytes = workers - base + a.threads * worker_bytes;
  }
};

// `lse` in units of log2, and the weights beside it; what no pair takes part in, or is past the end, counts for
// nothing. False if a softmax is so small under the shift that its exponentials may have lost terms.
bool prepare(const float* lse, const float* weight, int64_t count, int64_t length, float shift, float* log2,
             float* factor) {
  bool exact = true;
  for (int64_t i = 0; i < length; ++i) {
    log2[i] = i < count && lse[i] != -__builtin_inff() ? lse[i] * kLog2E : __builtin_inff();
    factor[i] = i < count ? weight[i] : 0.0f;
    exact = exact && !(log2[i] - shift < kSmallestLog2Sum);
  }
  return exact;
}

// The epilogue that writes G: rows from row0 on to `last`, columns from col0 on.
template <class Operand>
struct WriteG {
  const Matrix<Operand>& m;
  const Workspace& w;
  bool one_shift;
  int64_t row0, last, col0, stride;
  typename Operand::Element* g;

  void begin_rows(int64_t, int64_t) {}
  void begin_columns() {}
  void end_columns(int64_t) {}
  void end_rows() {}

  template <bool some_excluded>
  MODEST_ALIGN_METHOD void tile(const Vec (&acc)[kTileRows][kTileVectors], const Excluded& excluded, int64_t tile_row,
                                int64_t tile_col) {
    typename Operand::Element* out = g + (tile_row - row0) * stride + (tile_col - col0);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const bool outside = tile_row + r >= last;
      const int64_t row = outside ? tile_row : tile_row + r;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t col = tile_col + v * kLanes;
        const Vec s = acc[r][v] * m.scale_log2, col_factor = load<Vec>(w.col_factor + col);
        Vec value;
        if (one_shift) {
          value = exp2(s - m.shift) * (col_factor + w.row_factor[row]);
        } else {
          value = exp2(s - w.row_log2[row]) * w.row_factor[row] + exp2(s - load<Vec>(w.col_log2 + col)) * col_factor;
        }
        if (some_excluded) value = excluded.mask(m.a, v, row) ? Vec{} : value;
        if (outside) value = Vec{};
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

// out rows (+)= left * right, where right has `depth_rows` rows and left's steps run over them: along G's rows for the
// images' gradient (left row m is G's row m), across them for the texts' (left row m is G's column m).
template <class Operand, bool along>
void product(const typename Operand::Element* g, int64_t stride, int64_t count, int64_t depth_rows,
             const typename Operand::Element* right, int64_t width, int64_t depth, bool first, float* out,
             char* scratch) {
  Arena arena{scratch};
  uint32_t* left_packed = arena.take<uint32_t>(kTileRows * depth);
  uint32_t* right_packed = arena.take<uint32_t>(round_up(width, kTileColumns) * depth);
  for (int64_t k0 = 0; k0 < depth_rows; k0 += depth * Operand::kPerWord) {
    const int64_t rows = smaller(depth_rows - k0, depth * Operand::kPerWord);
    const int64_t steps = ceil_div(rows, Operand::kPerWord);
    for (int64_t d = 0; d < width; d += kTileColumns) {
      pack_across_rows<Operand, kTileColumns>(right_packed + d * steps, right + k0 * width + d, width,
                                              smaller(kTileColumns, width - d), rows);
    }
    for (int64_t m = 0; m < count; m += kTileRows) {
      const int64_t tile = smaller(kTileRows, count - m);
      if (along) {
        // An odd last column is followed by a zero: a row of G has a whole number of tiles.
        pack_along_rows<kTileRows>(left_packed, reinterpret_cast<const uint32_t*>(g + m * stride + k0),
                                   stride / Operand::kPerWord, tile, steps);
      } else {
        pack_across_rows<Operand, kTileRows>(left_packed, g + k0 * stride + m, stride, tile, rows);
      }
      multiply_panels<Operand>(left_packed, right_packed, steps, tile, width, first && k0 == 0, out + m * width);
    }
  }
}

template <class Operand>
void run(const ContrastiveGrads& a, int used, Team& team) {
  using Element = typename Operand::Element;
  const Matrix<Operand> m(a);
  const Extents e = Extents::of(a, Operand());
  const Workspace w(static_cast<char*>(a.workspace), a, e, Operand());
  const int64_t width = a.width, length = padded(a.columns);
  const bool rows_exact = prepare(a.row_lse, a.row_weight, a.rows, a.rows, m.shift, w.row_log2, w.row_factor);
  const bool cols_exact = prepare(a.col_lse, a.col_weight, a.col_count, length, m.shift, w.col_log2, w.col_factor);
  const bool one_shift = m.scale_log2 <= 2 * kHeadroom && rows_exact && cols_exact;
  if (one_shift) {
    for (int64_t i = 0; i < a.rows; ++i) w.row_factor[i] *= __builtin_exp2f(m.shift - w.row_log2[i]);
    for (int64_t j = 0; j < length; ++j) w.col_factor[j] *= __builtin_exp2f(m.shift - w.col_log2[j]);
  }

  Element* g = reinterpret_cast<Element*>(w.g);
  for (int64_t i0 = 0; i0 < a.rows; i0 += e.block_rows) {
    const int64_t i1 = smaller(a.rows, i0 + e.block_rows);
    for (int64_t j0 = 0; j0 < a.columns; j0 += e.block_columns) {
      const int64_t j1 = smaller(a.columns, j0 + e.block_columns), stride = padded(j1 - j0);
      parallel(team, ceil_div(i1 - i0, e.part_rows), [&](int64_t task, int worker) {
        const int64_t first = i0 + task * e.part_rows, last = smaller(i1, first + e.part_rows);
        Arena arena{w.workers + worker * w.worker_bytes};
        WriteG<Operand> epilogue{m, w, one_shift, i0, last, j0, stride, g};
        multiply_rows(m, Packed::take(arena, e.panel, m.steps), first, last, j0, j1, epilogue);
      });
      const int64_t x_part = even_part(i1 - i0, smaller(kTaskRows, ceil_div(i1 - i0, used)), kTileRows);
      const int64_t y_part = even_part(j1 - j0, smaller(kTaskRows, ceil_div(j1 - j0, used)), kTileRows);
      const int64_t x_tasks = a.grad_x ? ceil_div(i1 - i0, x_part) : 0;
      const int64_t y_tasks = a.grad_y ? ceil_div(j1 - j0, y_part) : 0;
      parallel(team, x_tasks + y_tasks, [&](int64_t task, int worker) {
        char* scratch = w.workers + worker * w.worker_bytes;
        if (task < x_tasks) {
          const int64_t r = task * x_part;
          product<Operand, true>(g + r * stride, stride, smaller(x_part, i1 - i0 - r), j1 - j0, m.y_hat + j0 * width,
                                 width, e.depth, j0 == 0, a.grad_x + (i0 + r) * width, scratch);
        } else {
          const int64_t c = (task - x_tasks) * y_part;
          product<Operand, false>(g + c, stride, smaller(y_part, j1 - j0 - c), i1 - i0, m.x_hat + i0 * width, width,
                                  e.depth, i0 == 0, a.grad_y + (j0 + c) * width, scratch);
        }
      });
    }
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
