#include "logits.h"
#include "parallel.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr float kLowest = -1e30f;
// Column panels between two moves of the rows' float32 sums into float64.
constexpr int kFlush = 64;

// What a pass over the matrix collects of every row and column.
enum class Collect { sums, maxima, shifted_sums };

template <class Operand>
struct Problem {
  const typename Operand::Element* x_hat;
  const typename Operand::Element* y_hat;
  const int32_t* ids;
  int64_t rows, columns, paired, width, steps;
  float scale_log2, shift;
  const float* row_shift;  // [rows], for shifted_sums
  const float* col_shift;  // [columns, padded], likewise
};

struct Worker {
  uint32_t* left;    // [panel, steps], packed
  uint32_t* right;   // [kTileColumns, steps], packed
  Vec* row_partial;  // [panel]
  int32_t* lowest_id;
  int32_t* highest_id;  // of each tile's rows
};

// Rows that are collected together, into column sums of their own: a slot is a task.
struct Slots {
  int64_t rows, count;
};

Slots slots(int64_t rows, int64_t steps, int threads) {
  const int64_t wanted = larger(threads, smaller(32, rows / panel_rows(steps)));
  const int64_t slot_rows = round_up(divide_up(rows, wanted), kTileRows);
  return {slot_rows, divide_up(rows, slot_rows)};
}

struct Workspace {
  double *row_total, *col_total;  // [rows], [slots, padded columns]
  float *row_shift, *col_shift;
  int64_t panel;  // rows that a worker packs together
  char* workers;
  int64_t worker_bytes;
};

int64_t lay_out(char* base, Workspace& w, int64_t rows, int64_t columns, int64_t steps, int threads) {
  Arena arena{base};
  w.row_total = arena.take<double>(rows);
  const Slots parts = slots(rows, steps, threads);
  w.panel = smaller(panel_rows(steps), parts.rows);
  w.col_total = arena.take<double>(parts.count * padded(columns));
  w.row_shift = arena.take<float>(rows);
  w.col_shift = arena.take<float>(padded(columns));
  w.workers = arena.next;
  w.worker_bytes = 4 * (w.panel + kTileColumns) * steps + w.panel * sizeof(Vec);
  w.worker_bytes += 2 * round_up(4 * w.panel / kTileRows, 64);
  w.worker_bytes = round_up(w.worker_bytes, 64);
  return w.workers - base + threads * w.worker_bytes;
}

Worker worker_at(const Workspace& w, int index, int64_t steps) {
  Arena arena{w.workers + index * w.worker_bytes};
  Worker worker;
  worker.left = arena.take<uint32_t>(w.panel * steps);
  worker.right = arena.take<uint32_t>(kTileColumns * steps);
  worker.row_partial = arena.take<Vec>(w.panel);
  worker.lowest_id = arena.take<int32_t>(w.panel / kTileRows);
  worker.highest_id = arena.take<int32_t>(w.panel / kTileRows);
  return worker;
}

// One tile: its products, and what they give to their rows (in memory) and columns (in registers).
template <class Operand, Collect collect, bool masked>
__attribute__((noinline)) void collect_tile(const Problem<Operand>& p, const uint32_t* left, const uint32_t* right,
                                            int64_t row0, int64_t col0, Vec* row_partial, Vec* col_partial) {
  Vec acc[kTileRows][kTileVectors] = {};
  multiply_tile<Operand>(left, right, p.steps, acc);
  const int count = static_cast<int>(smaller(kTileRows, p.rows - row0));
  Negatives negatives;
  if (masked) negatives = Negatives::of(p.ids, col0, p.columns);
  Vec col_shift[kTileVectors];
  if (collect == Collect::shifted_sums) {
    for (int v = 0; v < kTileVectors; ++v) col_shift[v] = load<Vec>(p.col_shift + col0 + v * kLanes);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    if (m >= count) break;
    Vec row = row_partial[m];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      Vec to_row, to_col;
      if (collect == Collect::sums) {
        to_row = to_col = exp2(acc[m][v] * p.scale_log2 - p.shift);
      } else if (collect == Collect::maxima) {
        to_row = to_col = acc[m][v] * p.scale_log2;
      } else {
        const Vec s = acc[m][v] * p.scale_log2;
        to_row = exp2(s - p.row_shift[row0 + m]);
        to_col = exp2(s - col_shift[v]);
      }
      if (masked) {
        const IntVec negative = negatives.mask(v, p.ids[row0 + m]);
        const Vec nothing = splat(collect == Collect::maxima ? kLowest : 0.0f);
        to_row = negative ? to_row : nothing;
        to_col = negative ? to_col : nothing;
      }
      if (collect == Collect::maxima) {
        row = maximum(row, to_row);
        col_partial[v] = maximum(col_partial[v], to_col);
      } else {
        row += to_row;
        col_partial[v] += to_col;
      }
    }
    row_partial[m] = row;
  }
}

// The rows [first, last) against every column.
template <class Operand, Collect collect>
void collect_rows(const Problem<Operand>& p, const Workspace& w, const Worker& worker, int64_t first, int64_t last,
                  double* col_total) {
  constexpr bool maxima = collect == Collect::maxima;
  const Vec start = splat(maxima ? kLowest : 0.0f);
  const int64_t row_words = p.width / Operand::kPerWord;
  for (int64_t j = 0; j < padded(p.columns); ++j) col_total[j] = maxima ? kLowest : 0.0;
  for (int64_t i0 = first; i0 < last; i0 += w.panel) {
    const int64_t i1 = smaller(last, i0 + w.panel), tiles = divide_up(i1 - i0, kTileRows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row0 = i0 + t * kTileRows, count = smaller(kTileRows, i1 - row0);
      pack_along_rows<kTileRows>(worker.left + t * kTileRows * p.steps,
                                 reinterpret_cast<const uint32_t*>(p.x_hat) + row0 * row_words, row_words, count,
                                 p.steps);
      worker.lowest_id[t] = worker.highest_id[t] = p.ids[row0];
      for (int64_t m = 1; m < count; ++m) {
        worker.lowest_id[t] = static_cast<int32_t>(smaller(worker.lowest_id[t], p.ids[row0 + m]));
        worker.highest_id[t] = static_cast<int32_t>(larger(worker.highest_id[t], p.ids[row0 + m]));
      }
    }
    for (int64_t i = i0; i < i1; ++i) {
      w.row_total[i] = maxima ? kLowest : 0.0;
      worker.row_partial[i - i0] = start;
    }
    for (int64_t col0 = 0, panel = 1; col0 < p.columns; col0 += kTileColumns, ++panel) {
      const int64_t count = smaller(kTileColumns, p.columns - col0);
      pack_along_rows<kTileColumns>(worker.right, reinterpret_cast<const uint32_t*>(p.y_hat) + col0 * row_words,
                                    row_words, count, p.steps);
      int64_t lowest = p.ids[col0], highest = p.ids[col0];
      for (int64_t j = 1; j < count; ++j) {
        lowest = smaller(lowest, p.ids[col0 + j]);
        highest = larger(highest, p.ids[col0 + j]);
      }
      Vec col_partial[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) col_partial[v] = start;
      for (int64_t t = 0; t < tiles; ++t) {
        const bool masked =
            count < kTileColumns || (worker.highest_id[t] >= lowest && worker.lowest_id[t] <= highest);
        (masked ? collect_tile<Operand, collect, true> : collect_tile<Operand, collect, false>)(
            p, worker.left + t * kTileRows * p.steps, worker.right, i0 + t * kTileRows, col0,
            worker.row_partial + t * kTileRows, col_partial);
      }
      for (int j = 0; j < kTileColumns; ++j) {
        const double value = col_partial[j / kLanes][j % kLanes];
        double& total = col_total[col0 + j];
        total = maxima ? (value > total ? value : total) : total + value;
      }
      if (panel % kFlush == 0 || col0 + kTileColumns >= p.columns) {
        for (int64_t i = i0; i < i1; ++i) {
          if (maxima) {
            for (int lane = 0; lane < kLanes; ++lane) {
              const double value = worker.row_partial[i - i0][lane];
              if (value > w.row_total[i]) w.row_total[i] = value;
            }
          } else {
            w.row_total[i] += sum(worker.row_partial[i - i0]);
          }
          worker.row_partial[i - i0] = start;
        }
      }
    }
  }
}

// Row and column totals of the whole matrix; the columns' end in the first slot, merged in the order of the slots.
template <class Operand, Collect collect>
void collect_all(const Problem<Operand>& p, const Workspace& w, const Slots& slots, Team& team) {
  parallel(team, slots.count, [&](int64_t slot, int worker) {
    collect_rows<Operand, collect>(p, w, worker_at(w, worker, p.steps), slot * slots.rows,
                                   smaller(p.rows, (slot + 1) * slots.rows), w.col_total + slot * padded(p.columns));
  });
  for (int64_t slot = 1; slot < slots.count; ++slot) {
    for (int64_t j = 0; j < p.paired; ++j) {
      const double value = w.col_total[slot * padded(p.columns) + j];
      double& total = w.col_total[j];
      total = collect == Collect::maxima ? (value > total ? value : total) : total + value;
    }
  }
}

template <class Operand>
void run(Problem<Operand> p, const float* scale, float* positive, float* row_lse, float* col_lse, char* base,
         int threads, Team& team) {
  Workspace w;
  lay_out(base, w, p.rows, p.columns, p.steps, threads);
  const Slots parts = slots(p.rows, p.steps, threads);
  parallel(team, parts.count, [&](int64_t part, int) {
    for (int64_t i = part * parts.rows; i < smaller(p.rows, (part + 1) * parts.rows); ++i) {
      Vec dot = {};
      for (int64_t d = 0; d < p.width; d += kLanes) {
        dot += Operand::load_vector(p.x_hat + i * p.width + d) * Operand::load_vector(p.y_hat + i * p.width + d);
      }
      positive[i] = static_cast<float>(sum(dot)) * *scale;
    }
  });

  p.scale_log2 = *scale * kLog2E;
  bool one_shift = p.scale_log2 <= 2 * kHeadroom;
  if (one_shift) {
    p.shift = p.scale_log2 > kHeadroom ? p.scale_log2 - kHeadroom : 0.0f;
    collect_all<Operand, Collect::sums>(p, w, parts, team);
    for (int64_t i = 0; i < p.rows; ++i) {
      const double row = w.row_total[i], col = i < p.paired ? w.col_total[i] : 1.0;
      if (row < __builtin_exp2(kSmallestLog2Sum) || col < __builtin_exp2(kSmallestLog2Sum)) one_shift = false;
      row_lse[i] = static_cast<float>((__builtin_log2(row) + p.shift) * kLn2);
      if (i < p.paired) col_lse[i] = static_cast<float>((__builtin_log2(col) + p.shift) * kLn2);
    }
  }
  if (!one_shift) {
    collect_all<Operand, Collect::maxima>(p, w, parts, team);
    for (int64_t i = 0; i < p.rows; ++i) w.row_shift[i] = static_cast<float>(w.row_total[i]);
    for (int64_t j = 0; j < padded(p.columns); ++j) {
      w.col_shift[j] = j < p.paired ? static_cast<float>(w.col_total[j]) : -kLowest;
    }
    p.row_shift = w.row_shift;
    p.col_shift = w.col_shift;
    collect_all<Operand, Collect::shifted_sums>(p, w, parts, team);
    for (int64_t i = 0; i < p.rows; ++i) {
      row_lse[i] = static_cast<float>((__builtin_log2(w.row_total[i]) + w.row_shift[i]) * kLn2);
      if (i < p.paired) {
        col_lse[i] = static_cast<float>((__builtin_log2(w.col_total[i]) + w.col_shift[i]) * kLn2);
      }
    }
  }
  for (int64_t i = p.paired; i < p.rows; ++i) col_lse[i] = -__builtin_inff();
}

template <class Operand>
void run(const void* x_hat, const void* y_hat, const float* scale, const int32_t* ids, bool symmetric, float* positive,
         float* row_lse, float* col_lse, int64_t rows, int64_t columns, int64_t width, void* workspace, int threads) {
  using Element = typename Operand::Element;
  Problem<Operand> problem{static_cast<const Element*>(x_hat),
                           static_cast<const Element*>(y_hat),
                           ids,
                           rows,
                           columns,
                           symmetric ? rows : 0,
                           width,
                           width / Operand::kPerWord,
                           0.0f,
                           0.0f,
                           nullptr,
                           nullptr};
  with_team(useful_threads(threads, rows * columns * width), [&](Team& team) {
    run<Operand>(problem, scale, positive, row_lse, col_lse, static_cast<char*>(workspace), threads, team);
  });
}

void stats(const void* x_hat, const void* y_hat, Dtype operand_dtype, const float* scale, const int32_t* ids,
           bool symmetric, float* positive, float* row_lse, float* col_lse, int64_t rows, int64_t columns,
           int64_t width, void* workspace, int threads) {
#if defined(__AVX512BF16__)
  if (operand_dtype == Dtype::bfloat16) {
    return run<BFloat16>(x_hat, y_hat, scale, ids, symmetric, positive, row_lse, col_lse, rows, columns, width,
                         workspace, threads);
  }
#endif
  (void)operand_dtype;
  run<Float32>(x_hat, y_hat, scale, ids, symmetric, positive, row_lse, col_lse, rows, columns, width, workspace,
               threads);
}

int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width, Dtype operand_dtype, int threads) {
  Workspace w;
  return lay_out(nullptr, w, rows, columns, width / (operand_dtype == Dtype::bfloat16 ? 2 : 1), threads);
}

}  // namespace

extern const decltype(CpuKernels::contrastive_stats) contrastive_stats;
extern const decltype(CpuKernels::contrastive_stats_workspace) contrastive_stats_workspace;
const decltype(CpuKernels::contrastive_stats) contrastive_stats = stats;
const decltype(CpuKernels::contrastive_stats_workspace) contrastive_stats_workspace = workspace_bytes;

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
