// Both products of G = row_weight exp(S - row_lse) + col_weight exp(S - col_lse) with the other side: from the
// exponentials that contrastive_stats kept, and for all other rows from blocks of them that are computed again.
#include "level.h"
#include "logits.h"
#include "parallel.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {
namespace {

// Bytes of a block for each thread, and in all: eight times as much is no faster.
constexpr int64_t kBlockBytes = int64_t{1} << 20, kMostBlockBytes = int64_t{64} << 20;
// Bytes of a slice of the right operand that is packed at a time, for the second cache.
constexpr int64_t kSliceBytes = int64_t{512} << 10;
// Tiles of a product that one task computes at most.
constexpr int64_t kTaskTiles = 8;

// A logsumexp in units of log2; +inf, so that the softmax is 0, where no pair takes part.
MODEST_ALIGN_INLINE float log2_of(float lse) { return lse != -__builtin_inff() ? lse * kLog2E : __builtin_inff(); }

// Whether exponentials under the shared shift serve every softmax: none is so small that they may have lost terms, or
// so large beside a small weight that the factor of both is below float32's normal numbers.
template <class Operand>
bool one_shift_serves(const ContrastiveGrads& a, const Matrix<Operand>& m) {
  const auto exact = [&](const float* lse, const float* weight, int64_t count) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) {
      const float log2 = log2_of(lse[i]) - m.shift;
      const float exponent = static_cast<float>(bits<uint32_t>(weight[i]) >> 23 & 255);  // of 2^-126 it is 1
      const bool normal = exponent >= log2 + 1 || weight[i] == 0 || log2 == __builtin_inff();
      all = all && !(log2 < kSmallestLog2Sum) && normal;
    }
    return all;
  };
  return m.may_share_shift() && exact(a.row_lse, a.row_weight, a.rows) && exact(a.col_lse, a.col_weight, a.col_count);
}

// Sizes of the blocks and of the tasks.
struct Extents {
  int64_t computed;                   // rows whose exponentials were not kept
  int64_t block_rows, block_columns;  // of these rows, multiples of the tile
  int64_t part_rows;                  // of a block that one task writes
  int64_t panel;                      // of those that it packs together
  int64_t depth;                      // steps in a slice of the right operand

  template <class Operand>
  static Extents of(const ContrastiveGrads& a, const Matrix<Operand>& m, bool one_shift) {
    const int64_t elements = smaller(kBlockBytes * a.threads, kMostBlockBytes) / sizeof(typename Operand::Element);
    int64_t side = 512;
    while (4 * side * side <= elements) side *= 2;
    Extents e{};
    e.computed = one_shift ? m.first_kept : a.rows;
    if (e.computed > 0) {
      e.block_rows = even_part(e.computed, side, 2 * kTileRows);
      e.block_columns = even_part(a.columns, elements / e.block_rows, 2 * kTileColumns);
      // Each task packs all columns of the block: few tasks, but some to spare for a thread that is held up.
      e.part_rows = even_part(e.block_rows, ceil_div(e.block_rows, 2 * a.threads), kTileRows);
      e.panel = smaller(panel_rows(m.steps), e.part_rows);
    }
    e.depth = larger(64, smaller(512, kSliceBytes / (4 * round_up(a.width, kTileColumns)) / kLanes * kLanes));
    return e;
  }
};

// What a worker packs of the left operand: a tile's rows.
struct Left {
  uint32_t* packed;
  void* weighted;  // [kTileRows, depth] elements of a block, before they are packed

  MODEST_ALIGN_INLINE Left take(Arena& arena, int64_t depth) {
    Left left;
    left.packed = arena.take<uint32_t>(kTileRows * depth + kLanes);  // the last step is stored as a whole vector
    left.weighted = arena.take<uint32_t>(kTileRows * depth);
    return left;
  }
};

struct Workspace {
  float *row_log2, *col_log2;  // [rows], [padded columns]: the logsumexps in units of log2, if one shift does not serve
  float *row_weight, *col_weight;  // beside them; 0 for what does not count
  float *row_factor, *col_factor;  // G is a block's element times the sum of its row's and its column's factor
  char* block;
  uint32_t* slices[2][2];  // of each product's right operand: one to multiply with while the next one is packed
  char* workers;
  int64_t worker_bytes, bytes;

  template <class Operand>
  Workspace(char* base, const ContrastiveGrads& a, const Extents& e, bool one_shift, Operand) {
    const int64_t length = columns_length(a);
    Arena arena{base};
    row_log2 = arena.take<float>(one_shift ? 0 : a.rows);
    row_weight = arena.take<float>(one_shift ? 0 : a.rows);
    row_factor = arena.take<float>(a.rows);
    col_log2 = arena.take<float>(one_shift ? 0 : length);
    col_weight = arena.take<float>(one_shift ? 0 : length);
    col_factor = arena.take<float>(length);
    block = arena.take<char>(e.block_rows * e.block_columns * sizeof(typename Operand::Element) + 64);
    const int64_t words = round_up(a.width, kTileColumns) * e.depth, slice = e.depth * Operand::kPerWord;
    for (int product = 0; product < 2; ++product) {
      const int64_t length = product == 0 ? (a.grad_x ? a.columns : 0) : (a.grad_y ? a.rows : 0);
      slices[product][0] = arena.take<uint32_t>(length > 0 ? words : 0);
      slices[product][1] = arena.take<uint32_t>(length > slice ? words : 0);
    }
    workers = arena.next;
    Arena for_block{nullptr}, for_product{nullptr};
    if (e.computed > 0) Packed::take(for_block, e.panel, a.width / Operand::kPerWord);
    Left::take(for_product, e.depth);
    const char* const null = nullptr;
    worker_bytes = staggered(larger(for_block.next - null, for_product.next - null));
    bytes = workers - base + a.threads * worker_bytes;
  }

  // Of the columns' vectors: a tile's rows of the left operand can be loaded from every column on.
  static int64_t columns_length(const ContrastiveGrads& a) { return padded(a.columns) + round_up(kTileRows, kLanes); }
};

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

// Exponentials, or G, of some rows and columns: [rows, stride], readable for a vector from any element on.
template <class Operand>
struct Block {
  using Element = typename Operand::Element;
  const Element* elements;
  int64_t stride, row0, rows, col0, columns;
  const float *row_factor, *col_factor;  // from row0 and col0 on

  // What one of the following two reads.
  Ahead ahead(bool images, int64_t first, int64_t count, int64_t k0, int64_t length, int64_t shares) const {
    const int64_t bytes = sizeof(Element);
    const char* const from = reinterpret_cast<const char*>(elements);
    if (images)
      return {from + (first * stride + k0) * bytes, stride * bytes, count, ceil_div(length * bytes, kLine), shares};
    // The line in which a row's part begins is there from the tile before.
    return {from + (k0 * stride + first + kTileRows - 1) * bytes, stride * bytes, length, 1, shares};
  }

  // packed[k * kTileRows + m] = word k of G's row `row` + m, from `column` on: the left operand of the images'
  // gradient. Zero for rows past `count`.
  void pack_rows(const Left& left, int64_t row, int64_t count, int64_t column, int64_t length) const {
    Element* const weighted = static_cast<Element*>(left.weighted);
    const int64_t words = ceil_div(length, Operand::kPerWord), row_length = round_up(length, kLanes);
    for (int64_t m = 0; m < count; ++m) {
      const Element* from = elements + (row + m) * stride + column;
      const float factor = row_factor[row + m];
      for (int64_t k = 0; k < row_length; k += kLanes) {
        store_vector(weighted + m * row_length + k,
                     load_vector(from + k) * (load<Vec>(col_factor + column + k) + factor));
      }
    }
    pack_along_rows<kTileRows>(left.packed, reinterpret_cast<const uint32_t*>(weighted), row_length / Operand::kPerWord,
                               count, words);
  }

  // packed[k * kTileRows + m] = G's element in row `row` + k and column `column` + m, of two rows for pairs: the left
  // operand of the texts' gradient. Zero for an odd last row; columns past the end are those of no result.
  void pack_columns(const Left& left, int64_t column, int64_t row, int64_t length) const {
    // From the last vector on: what it writes past its step, the first one overwrites.
    for (int m = (kTileRows - 1) / kLanes * kLanes; m >= 0; m -= kLanes) {
      const Vec factor = load<Vec>(col_factor + column + m);
      const Element* from = elements + row * stride + column + m;
      const auto g = [&](int64_t k) { return load_vector(from + k * stride) * (factor + row_factor[row + k]); };
      uint32_t* to = left.packed + m;
      int64_t k = 0;
      for (; k + Operand::kPerWord <= length; k += Operand::kPerWord, to += kTileRows) {
        store(to, Operand::word(g(k), g(k + Operand::kPerWord - 1)));
      }
      if (k < length) store(to, Operand::word(g(k), Vec{}));
    }
  }
};

// One of the two products: out rows (+)= G's rows times the texts, or G's columns times the images.
template <class Operand>
struct Product {
  bool images;                             // whose gradient it is
  const typename Operand::Element* right;  // [length, width]
  int64_t length;                          // of its sums
  float* out;                              // [rows, width]
  int64_t rows, part;                      // of which a task computes `part`
  bool first;                              // nothing has been added yet
  uint32_t* const* slices;                 // packed ones

  int64_t tasks() const { return ceil_div(rows, part); }
};

// out[m, :] (+)= sum over k of a tile's left[k, m] * right[k, :], for `count` rows and `width` columns.
template <class Operand>
void multiply_panels(const uint32_t* left, const uint32_t* right, int64_t steps, int64_t count, int64_t width,
                     bool first, float* out, const Ahead& ahead) {
  for (int64_t d = 0; d < width; d += kTileColumns) {
    ahead.fetch(d / kTileColumns);
    for (int64_t m = 0; m < count; ++m) {
      for (int v = 0; v < kTileVectors; ++v) __builtin_prefetch(out + m * width + d + v * kLanes, 1);
    }
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

// Adds both products with a block to the results, a slice of their sums at a time: a slice of the right operand is
// packed once for all threads, while they multiply with the one before.
template <class Operand>
void multiply_block(const ContrastiveGrads& a, const Matrix<Operand>& m, const Extents& e, const Workspace& w,
                    const Block<Operand>& block, int used, Team& team) {
  const int64_t width = a.width, slice = e.depth * Operand::kPerWord;
  const auto part_of = [&](int64_t rows) {
    return even_part(rows, smaller(kTaskTiles * kTileRows, ceil_div(rows, 4 * used)), kTileRows);
  };
  Product<Operand> products[2];
  int wanted = 0;
  if (a.grad_x) {
    products[wanted++] = {true,       m.y_hat + block.col0 * width, block.columns,   a.grad_x + block.row0 * width,
                          block.rows, part_of(block.rows),          block.col0 == 0, w.slices[0]};
  }
  if (a.grad_y) {
    products[wanted++] = {false,         m.x_hat + block.row0 * width, block.rows,      a.grad_y + block.col0 * width,
                          block.columns, part_of(block.columns),       block.row0 == 0, w.slices[1]};
  }
  const int64_t panels = ceil_div(width, kTileColumns);

  const auto pack = [&](const Product<Operand>& p, int64_t k0, int64_t panel) {
    const int64_t length = smaller(slice, p.length - k0), d = panel * kTileColumns;
    pack_across_rows<Operand, kTileColumns>(p.slices[k0 / slice % 2] + d * ceil_div(length, Operand::kPerWord),
                                            p.right + k0 * width + d, width, smaller(kTileColumns, width - d), length);
  };
  const auto multiply = [&](const Product<Operand>& p, int64_t k0, int64_t task, int worker) {
    Arena arena{w.workers + worker * w.worker_bytes};
    const Left left = Left::take(arena, e.depth);
    const int64_t length = smaller(slice, p.length - k0), end = smaller(p.rows, (task + 1) * p.part);
    for (int64_t row = task * p.part; row < end; row += kTileRows) {
      const int64_t count = smaller(kTileRows, end - row), next = row + kTileRows;
      const Ahead ahead = next < end ? block.ahead(p.images, next, smaller(kTileRows, end - next), k0, length, panels)
                                     : Ahead{nullptr, 0, 0, 0, panels};
      if (p.images) {
        block.pack_rows(left, row, count, k0, length);
      } else {
        block.pack_columns(left, row, k0, length);
      }
      multiply_panels<Operand>(left.packed, p.slices[k0 / slice % 2], ceil_div(length, Operand::kPerWord), count, width,
                               p.first && k0 == 0, p.out + row * width, ahead);
    }
  };

  for (int64_t k0 = -slice; k0 < larger(block.rows, block.columns); k0 += slice) {
    int64_t tasks = 0, ends[4];
    for (int i = 0; i < wanted; ++i) ends[i] = tasks += k0 + slice < products[i].length ? panels : 0;
    for (int i = 0; i < wanted; ++i)
      ends[2 + i] = tasks += k0 >= 0 && k0 < products[i].length ? products[i].tasks() : 0;
    parallel(team, tasks, [&](int64_t task, int worker) {
      int64_t begin = 0;
      for (int i = 0; i < wanted; begin = ends[i++]) {
        if (task < ends[i]) return pack(products[i], k0 + slice, task - begin);
      }
      for (int i = 0; i < wanted; begin = ends[2 + i++]) {
        if (task < ends[2 + i]) return multiply(products[i], k0, task - begin, worker);
      }
    });
  }
}

template <class Operand>
void run(const ContrastiveGrads& a, int used, Team& team) {
  using Element = typename Operand::Element;
  const Matrix<Operand> m(a);
  const bool one_shift = one_shift_serves(a, m);
  const Extents e = Extents::of(a, m, one_shift);
  const Workspace w(static_cast<char*>(a.workspace), a, e, one_shift, Operand());
  for (int64_t i = 0; i < a.rows; ++i) {
    const float log2 = log2_of(a.row_lse[i]);
    w.row_factor[i] = one_shift ? a.row_weight[i] * __builtin_exp2f(m.shift - log2) : 1.0f;
    if (!one_shift) w.row_log2[i] = log2, w.row_weight[i] = a.row_weight[i];
  }
  for (int64_t j = 0; j < Workspace::columns_length(a); ++j) {
    const bool counts = j < a.col_count;
    const float log2 = counts ? log2_of(a.col_lse[j]) : __builtin_inff(), weight = counts ? a.col_weight[j] : 0.0f;
    w.col_factor[j] = one_shift ? weight * __builtin_exp2f(m.shift - log2) : 0.0f;
    if (!one_shift) w.col_log2[j] = log2, w.col_weight[j] = weight;
  }

  Element* const elements = reinterpret_cast<Element*>(w.block);
  for (int64_t i0 = 0; i0 < e.computed; i0 += e.block_rows) {
    const int64_t i1 = smaller(e.computed, i0 + e.block_rows);
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
  if (const int64_t i0 = e.computed; i0 < a.rows) {
    multiply_block(a, m, e, w,
                   {m.kept(i0), a.kept_stride, i0, a.rows - i0, 0, a.columns, w.row_factor + i0, w.col_factor}, used,
                   team);
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
  return with_operand(a.operand_dtype, [&](auto operand) {
    const Matrix<decltype(operand)> m(a);
    const bool one_shift = one_shift_serves(a, m);
    return Workspace(nullptr, a, Extents::of(a, m, one_shift), one_shift, operand).bytes;
  });
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
