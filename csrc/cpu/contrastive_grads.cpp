// Blocks of G = exp(S - row_lse) + exp(S - col_lse), and from each block both products with the other side.
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

template <class Operand>
struct Problem {
  const typename Operand::Element* x_hat;
  const typename Operand::Element* y_hat;
  const int32_t* ids;
  int64_t rows, columns, width, steps;
  float scale_log2, shift;
  bool one_shift;
  const float *row_log2, *col_log2;      // [rows], [columns, padded]
  const float *row_weight, *col_weight;  // 2^(shift - those)
};

struct Extents {
  int64_t block_rows, block_columns;  // of G, multiples of the tile
  int64_t part_rows;                  // of a block that one task writes
  int64_t panel;                      // of those that it packs together
  int64_t depth;                      // steps of the products at a time
};

struct Workspace {
  float *row_log2, *col_log2, *row_weight, *col_weight;
  char* g;
  char* workers;
  int64_t worker_bytes;
};

// A length of equal parts of `total`, each at most `largest`, rounded up to a multiple.
int64_t even_part(int64_t total, int64_t largest, int64_t multiple) {
  return round_up(divide_up(total, divide_up(total, larger(largest, multiple))), multiple);
}

template <class Operand>
Extents extents(int64_t rows, int64_t columns, int64_t width, int threads) {
  const int64_t elements = smaller(kBlockBytes * threads, kMostBlockBytes) / sizeof(typename Operand::Element);
  int64_t side = 512;
  while (4 * side * side <= elements) side *= 2;
  Extents e;
  e.block_rows = even_part(rows, side, 2 * kTileRows);
  e.block_columns = even_part(columns, elements / e.block_rows, 2 * kTileColumns);
  // Each task packs all columns of the block: few tasks, but some to spare for a thread that is held up.
  e.part_rows = even_part(e.block_rows, divide_up(e.block_rows, 2 * threads), kTileRows);
  e.panel = smaller(panel_rows(width / Operand::kPerWord), e.part_rows);
  e.depth = larger(64, smaller(512, kRightBytes / (4 * round_up(width, kTileColumns))));
  return e;
}

template <class Operand>
int64_t lay_out(char* base, Workspace& w, int64_t rows, int64_t columns, int64_t width, int threads) {
  const Extents e = extents<Operand>(rows, columns, width, threads);
  const int64_t steps = width / Operand::kPerWord;
  Arena arena{base};
  w.row_log2 = arena.take<float>(rows);
  w.row_weight = arena.take<float>(rows);
  w.col_log2 = arena.take<float>(padded(columns));
  w.col_weight = arena.take<float>(padded(columns));
  w.g = arena.take<char>(e.block_rows * e.block_columns * sizeof(typename Operand::Element));
  w.workers = arena.next;
  const int64_t for_g = 4 * (e.panel + kTileColumns) * steps + 64;
  const int64_t for_product = 4 * (kTileRows + round_up(width, kTileColumns)) * e.depth + 64;
  w.worker_bytes = round_up(larger(for_g, for_product), 64);
  return w.workers - base + threads * w.worker_bytes;
}

template <class Operand, bool masked>
__attribute__((noinline)) void g_tile(const Problem<Operand>& p, const uint32_t* left, const uint32_t* right,
                                      int64_t row0, int64_t rows_end, int64_t col0, int64_t columns_end,
                                      typename Operand::Element* g, int64_t stride) {
  Vec acc[kTileRows][kTileVectors] = {};
  multiply_tile<Operand>(left, right, p.steps, acc);
  Negatives negatives;
  if (masked) negatives = Negatives::of(p.ids, col0, columns_end);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    const bool outside = row0 + m >= rows_end;
    const int64_t row = outside ? row0 : row0 + m;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      Vec value;
      if (p.one_shift) {
        value = exp2(acc[m][v] * p.scale_log2 - p.shift) *
                (load<Vec>(p.col_weight + col0 + v * kLanes) + p.row_weight[row]);
      } else {
        const Vec s = acc[m][v] * p.scale_log2;
        value = exp2(s - p.row_log2[row]) + exp2(s - load<Vec>(p.col_log2 + col0 + v * kLanes));
      }
      if (masked) value = negatives.mask(v, p.ids[row]) != 0 ? value : Vec{};
      if (outside) value = Vec{};
      Operand::store_vector(g + m * stride + v * kLanes, value);
    }
  }
}

// The rows [first, last) of the block of G whose first row and column are row0 and col0.
template <class Operand>
void write_g(const Problem<Operand>& p, int64_t panel, char* scratch, int64_t row0, int64_t first, int64_t last,
             int64_t col0, int64_t col1, typename Operand::Element* g, int64_t stride) {
  const int64_t row_words = p.width / Operand::kPerWord;
  Arena arena{scratch};
  uint32_t* left = arena.take<uint32_t>(panel * p.steps);
  uint32_t* right = arena.take<uint32_t>(kTileColumns * p.steps);
  for (int64_t i0 = first; i0 < last; i0 += panel) {
    const int64_t i1 = smaller(last, i0 + panel), tiles = divide_up(i1 - i0, kTileRows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = i0 + t * kTileRows;
      pack_along_rows<kTileRows>(left + t * kTileRows * p.steps,
                                 reinterpret_cast<const uint32_t*>(p.x_hat) + i * row_words, row_words,
                                 smaller(kTileRows, i1 - i), p.steps);
    }
    int32_t low_row = p.ids[i0], high_row = p.ids[i0];
    for (int64_t i = i0; i < i1; ++i) {
      low_row = p.ids[i] < low_row ? p.ids[i] : low_row;
      high_row = p.ids[i] > high_row ? p.ids[i] : high_row;
    }
    for (int64_t j = col0; j < col1; j += kTileColumns) {
      const int64_t count = smaller(kTileColumns, col1 - j);
      pack_along_rows<kTileColumns>(right, reinterpret_cast<const uint32_t*>(p.y_hat) + j * row_words, row_words,
                                    count, p.steps);
      bool masked = count < kTileColumns;
      for (int64_t c = j; c < j + count; ++c) masked = masked || (p.ids[c] >= low_row && p.ids[c] <= high_row);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = i0 + t * kTileRows;
        (masked ? g_tile<Operand, true> : g_tile<Operand, false>)(p, left + t * kTileRows * p.steps, right, i, last, j,
                                                                  col1, g + (i - row0) * stride + (j - col0), stride);
      }
    }
  }
}

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
    const int64_t steps = divide_up(rows, Operand::kPerWord);
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
void run(const void* x_hat, const void* y_hat, const float* scale, const float* row_lse, const float* col_lse,
         const int32_t* ids, float* grad_x, float* grad_y, int64_t rows, int64_t columns, int64_t width,
         void* workspace, int threads, int used, Team& team) {
  using Element = typename Operand::Element;
  Problem<Operand> p;
  p.x_hat = static_cast<const Element*>(x_hat);
  p.y_hat = static_cast<const Element*>(y_hat);
  p.ids = ids;
  p.rows = rows;
  p.columns = columns;
  p.width = width;
  p.steps = width / Operand::kPerWord;
  p.scale_log2 = *scale * kLog2E;
  p.shift = p.scale_log2 > kHeadroom ? p.scale_log2 - kHeadroom : 0.0f;

  Workspace w;
  const Extents e = extents<Operand>(rows, columns, width, threads);
  lay_out<Operand>(static_cast<char*>(workspace), w, rows, columns, width, threads);
  p.one_shift = p.scale_log2 <= 2 * kHeadroom;
  for (int64_t i = 0; i < rows; ++i) {
    w.row_log2[i] = row_lse[i] * kLog2E;
    w.col_log2[i] = col_lse[i] * kLog2E;
    if (w.row_log2[i] - p.shift < kSmallestLog2Sum || w.col_log2[i] - p.shift < kSmallestLog2Sum) p.one_shift = false;
  }
  for (int64_t j = rows; j < padded(columns); ++j) w.col_log2[j] = __builtin_inff();
  for (int64_t i = 0; i < rows; ++i) w.row_weight[i] = __builtin_exp2f(p.shift - w.row_log2[i]);
  for (int64_t j = 0; j < padded(columns); ++j) w.col_weight[j] = __builtin_exp2f(p.shift - w.col_log2[j]);
  p.row_log2 = w.row_log2;
  p.col_log2 = w.col_log2;
  p.row_weight = w.row_weight;
  p.col_weight = w.col_weight;

  Element* g = reinterpret_cast<Element*>(w.g);
  for (int64_t i0 = 0; i0 < rows; i0 += e.block_rows) {
    const int64_t i1 = smaller(rows, i0 + e.block_rows);
    for (int64_t j0 = 0; j0 < columns; j0 += e.block_columns) {
      const int64_t j1 = smaller(columns, j0 + e.block_columns), stride = padded(j1 - j0);
      parallel(team, divide_up(i1 - i0, e.part_rows), [&](int64_t task, int worker) {
        const int64_t first = i0 + task * e.part_rows, last = smaller(i1, first + e.part_rows);
        write_g<Operand>(p, e.panel, w.workers + worker * w.worker_bytes, i0, first, last, j0, j1, g, stride);
      });
      const int64_t x_part = even_part(i1 - i0, smaller(kTaskRows, divide_up(i1 - i0, used)), kTileRows);
      const int64_t y_part = even_part(j1 - j0, smaller(kTaskRows, divide_up(j1 - j0, used)), kTileRows);
      const int64_t x_tasks = grad_x ? divide_up(i1 - i0, x_part) : 0;
      const int64_t y_tasks = grad_y ? divide_up(j1 - j0, y_part) : 0;
      parallel(team, x_tasks + y_tasks, [&](int64_t task, int worker) {
        char* scratch = w.workers + worker * w.worker_bytes;
        if (task < x_tasks) {
          const int64_t m = task * x_part;
          product<Operand, true>(g + m * stride, stride, smaller(x_part, i1 - i0 - m), j1 - j0, p.y_hat + j0 * width,
                                 width, e.depth, j0 == 0, grad_x + (i0 + m) * width, scratch);
        } else {
          const int64_t m = (task - x_tasks) * y_part;
          product<Operand, false>(g + m, stride, smaller(y_part, j1 - j0 - m), i1 - i0, p.x_hat + i0 * width, width,
                                  e.depth, i0 == 0, grad_y + (j0 + m) * width, scratch);
        }
      });
    }
  }
}

void grads(const void* x_hat, const void* y_hat, Dtype operand_dtype, const float* scale, const float* row_lse,
           const float* col_lse, const int32_t* ids, float* grad_x, float* grad_y, int64_t rows, int64_t columns,
           int64_t width, void* workspace, int threads) {
  const int used = useful_threads(threads, rows * columns * width);
  with_team(used, [&](Team& team) {
#if defined(__AVX512BF16__)
    if (operand_dtype == Dtype::bfloat16) {
      return run<BFloat16>(x_hat, y_hat, scale, row_lse, col_lse, ids, grad_x, grad_y, rows, columns, width, workspace,
                           threads, used, team);
    }
#endif
    (void)operand_dtype;
    run<Float32>(x_hat, y_hat, scale, row_lse, col_lse, ids, grad_x, grad_y, rows, columns, width, workspace, threads,
                 used, team);
  });
}

int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width, Dtype operand_dtype, int threads) {
  Workspace w;
#if defined(__AVX512BF16__)
  if (operand_dtype == Dtype::bfloat16) return lay_out<BFloat16>(nullptr, w, rows, columns, width, threads);
#endif
  (void)operand_dtype;
  return lay_out<Float32>(nullptr, w, rows, columns, width, threads);
}

}  // namespace

extern const decltype(CpuKernels::contrastive_grads) contrastive_grads;
extern const decltype(CpuKernels::contrastive_grads_workspace) contrastive_grads_workspace;
const decltype(CpuKernels::contrastive_grads) contrastive_grads = grads;
const decltype(CpuKernels::contrastive_grads_workspace) contrastive_grads_workspace = workspace_bytes;

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
