// Sums of exponentials of every row and column, in a pass over the logits that stores at most exponentials of the last
// rows, for contrastive_grads.
#include "level.h"
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

// Rows that are collected together, into column sums of their own: a slot is a task.
struct Slots {
  int64_t rows, count;

  Slots(int64_t all_rows, int64_t steps, int threads) {
    // A whole number for each thread, of a panel each or of several equal ones.
    const int64_t wanted = smaller(larger(threads, 32), round_up(ceil_div(all_rows, panel_rows(steps)), threads));
    rows = round_up(ceil_div(all_rows, wanted), kTileRows);
    count = ceil_div(all_rows, rows);
  }
};

struct Workspace {
  Slots slots;
  double *row_total, *col_total;  // [rows], [slots, padded columns]
  float *row_shift, *col_shift;   // [rows], [padded columns], for shifted_sums
  int64_t panel;                  // rows that a worker packs together
  char* workers;
  int64_t worker_bytes, bytes;

  Workspace(char* base, const ContrastiveStats& a, int64_t steps) : slots(a.rows, steps, a.threads) {
    Arena arena{base};
    row_total = arena.take<double>(a.rows);
    col_total = arena.take<double>(slots.count * padded(a.columns));
    row_shift = arena.take<float>(a.rows);
    col_shift = arena.take<float>(padded(a.columns));
    panel = even_part(slots.rows, panel_rows(steps), kTileRows);
    workers = arena.next;
    Arena worker{nullptr};
    Packed::take(worker, panel, steps);
    worker.take<Vec>(panel);
    worker_bytes = staggered(worker.next - static_cast<char*>(nullptr));
    bytes = workers - base + a.threads * worker_bytes;
  }
};

// The epilogue: what a tile gives to its rows (in memory) and columns (in registers).
template <class Operand, Collect collect>
struct Collector {
  static constexpr bool kMaxima = collect == Collect::maxima;
  const Matrix<Operand>& m;
  const Workspace& w;
  Vec* row_partial;  // [panel]
  double* col_total;
  int64_t i0 = 0, i1 = 0, panels = 0;
  Vec col_partial[kTileVectors] = {};

  static Vec start() { return splat(kMaxima ? kLowest : 0.0f); }

  void begin_rows(int64_t first, int64_t last) {
    i0 = first;
    i1 = last;
    for (int64_t i = i0; i < i1; ++i) {
      w.row_total[i] = kMaxima ? kLowest : 0.0;
      row_partial[i - i0] = start();
    }
  }

  void begin_columns() {
    for (Vec& partial : col_partial) partial = start();
  }

  template <bool some_excluded>
  MODEST_ALIGN_METHOD void tile(const Vec (&acc)[kTileRows][kTileVectors], const Excluded& excluded, int64_t row0,
                                int64_t col0) {
    const int count = static_cast<int>(smaller(kTileRows, i1 - row0));
    typename Operand::Element* const kept = collect == Collect::sums ? m.kept(row0) : nullptr;
    Vec col[kTileVectors], col_shift[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      col[v] = col_partial[v];
      if (collect == Collect::shifted_sums) col_shift[v] = load<Vec>(w.col_shift + col0 + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      if (r >= count) break;
      Vec row = row_partial[row0 - i0 + r];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec s = acc[r][v] * m.scale_log2;
        Vec to_row = s, to_col = s;
        if (collect == Collect::sums) {
          to_row = to_col = exp2(s - m.shift);
        } else if (collect == Collect::shifted_sums) {
          to_row = exp2(s - w.row_shift[row0 + r]);
          to_col = exp2(s - col_shift[v]);
        }
        if (some_excluded) {
          const IntVec out = excluded.mask(m.a, v, row0 + r);
          to_row = out ? start() : to_row;
          to_col = out ? start() : to_col;
        }
        if (kept) store_vector(kept + r * m.a.kept_stride + col0 + v * kLanes, to_row);
        row = kMaxima ? maximum(row, to_row) : row + to_row;
        col[v] = kMaxima ? maximum(col[v], to_col) : col[v] + to_col;
      }
      row_partial[row0 - i0 + r] = row;
    }
    for (int v = 0; v < kTileVectors; ++v) col_partial[v] = col[v];
  }

  void end_columns(int64_t col0) {
    for (int j = 0; j < kTileColumns; ++j) add(col_total[col0 + j], col_partial[j / kLanes][j % kLanes]);
    if (++panels % kFlush == 0) end_rows();
  }

  void end_rows() {
    for (int64_t i = i0; i < i1; ++i) {
      Vec& partial = row_partial[i - i0];
      if (kMaxima) {
        for (int lane = 0; lane < kLanes; ++lane) add(w.row_total[i], partial[lane]);
      } else {
        w.row_total[i] += sum(partial);
      }
      partial = start();
    }
  }

  static void add(double& total, double value) { total = kMaxima ? (value > total ? value : total) : total + value; }
};

// Row and column totals of the whole matrix; the columns' end in the first slot, merged in the order of the slots.
template <class Operand, Collect collect>
void collect_all(const Matrix<Operand>& m, const Workspace& w, Team& team) {
  using Epilogue = Collector<Operand, collect>;
  const int64_t stride = padded(m.a.columns);
  parallel(team, w.slots.count, [&](int64_t slot, int worker) {
    Arena arena{w.workers + worker * w.worker_bytes};
    const Packed packed = Packed::take(arena, w.panel, m.steps);
    Epilogue epilogue{m, w, arena.take<Vec>(w.panel), w.col_total + slot * stride};
    for (int64_t j = 0; j < stride; ++j) epilogue.col_total[j] = Epilogue::kMaxima ? kLowest : 0.0;
    const int64_t first = slot * w.slots.rows;
    multiply_rows(m, packed, first, smaller(m.a.rows, first + w.slots.rows), 0, m.a.columns, epilogue);
  });
  for (int64_t slot = 1; slot < w.slots.count; ++slot) {
    for (int64_t j = 0; j < m.a.col_count; ++j) Epilogue::add(w.col_total[j], w.col_total[slot * stride + j]);
  }
}

// Logsumexps from sums under shifts. False if a sum is so small that it may have lost terms.
template <class Shift>
bool logsumexps(const double* total, int64_t count, float* lse, Shift&& shift) {
  bool exact = true;
  for (int64_t i = 0; i < count; ++i) {
    exact = exact && !(total[i] < __builtin_exp2(kSmallestLog2Sum));
    lse[i] = static_cast<float>((__builtin_log2(total[i]) + shift(i)) * kLn2);
  }
  return exact;
}

template <class Operand>
void run(const ContrastiveStats& a, Team& team) {
  const Matrix<Operand> m(a);
  const Workspace w(static_cast<char*>(a.workspace), a, m.steps);
  if (m.may_share_shift()) {
    prefer_huge_pages(a.exponentials,
                      a.kept_rows * a.kept_stride * static_cast<int64_t>(sizeof(typename Operand::Element)));
    collect_all<Operand, Collect::sums>(m, w, team);
    const auto shift = [&](int64_t) { return m.shift; };
    const bool rows_exact = logsumexps(w.row_total, a.rows, a.row_lse, shift);
    if (logsumexps(w.col_total, a.col_count, a.col_lse, shift) && rows_exact) return;
  }
  collect_all<Operand, Collect::maxima>(m, w, team);
  for (int64_t i = 0; i < a.rows; ++i) w.row_shift[i] = static_cast<float>(w.row_total[i]);
  for (int64_t j = 0; j < padded(a.columns); ++j) {
    w.col_shift[j] = j < a.col_count ? static_cast<float>(w.col_total[j]) : -kLowest;
  }
  collect_all<Operand, Collect::shifted_sums>(m, w, team);
  logsumexps(w.row_total, a.rows, a.row_lse, [&](int64_t i) { return w.row_shift[i]; });
  logsumexps(w.col_total, a.col_count, a.col_lse, [&](int64_t j) { return w.col_shift[j]; });
}

}  // namespace

void contrastive_stats(const ContrastiveStats& a) {
  with_team(useful_threads(a.threads, a.rows * a.columns * a.width),
            [&](Team& team) { with_operand(a.operand_dtype, [&](auto operand) { run<decltype(operand)>(a, team); }); });
}

int64_t contrastive_stats_workspace(const ContrastiveStats& a) {
  return with_operand(a.operand_dtype,
                      [&](auto operand) { return Workspace(nullptr, a, a.width / decltype(operand)::kPerWord).bytes; });
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
