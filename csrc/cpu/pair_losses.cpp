#include "level.h"
#include "negated_sums.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {
namespace {

// Of a logsumexp of the negatives above its positive: softplus, the loss, and the logistic function, its derivative.
struct Margin {
  float loss, weight;

  MODEST_ALIGN_INLINE Margin of(float margin) {
    const float e = __builtin_expf(margin > 0 ? -margin : margin);
    return {(margin > 0 ? margin : 0) + __builtin_log1pf(e), (margin > 0 ? 1 : e) / (1 + e)};
  }
};

// Of the smoothing, what is made before the pairs.
struct Workspace {
  NegatedSums x_sums, y_sums;
  float *row_counts, *col_counts;  // of each number's rows and columns
  int64_t bytes;

  Workspace(void* memory, const PairLosses& a) : x_sums{}, y_sums{}, row_counts(nullptr), col_counts(nullptr) {
    Arena arena{static_cast<char*>(memory)};
    y_sums = NegatedSums::take(arena, a.col_ids, a.rows, a.width, false);
    if (a.col_count) x_sums = NegatedSums::take(arena, a.row_ids, a.rows, a.width, false);
    if (a.row_ids) {
      row_counts = arena.take<float>(a.rows + 1);
      col_counts = arena.take<float>(a.rows + 1);
    }
    bytes = arena.next - static_cast<char*>(memory);
  }
};

void count(float* counts, int64_t numbers, const int32_t* ids, int64_t length) {
  std::memset(counts, 0, sizeof(float) * numbers);
  for (int64_t i = 0; i < length; ++i) counts[ids[i]] += 1;
}

template <class Element>
float dot(const Element* hat, const float* sums, int64_t width) {
  Vec products = {};
  for (int64_t d = 0; d < width; d += kLanes) products += load_vector(hat + d) * load<Vec>(sums + d);
  return static_cast<float>(sum(products));
}

template <class Element>
void smoothed_pair(const PairLosses& a, const Workspace& w, int64_t i) {
  const bool grouped = a.row_ids, apart = !grouped || a.row_ids[i] != a.col_ids[i], columns = a.col_count;
  const float row_negatives = a.columns - (grouped ? w.col_counts[a.row_ids[i]] : 0) - apart;
  const float col_negatives = a.rows - (grouped ? w.row_counts[a.col_ids[i]] : 0) - apart;
  const float row_weight = row_negatives > 0 ? 1 / row_negatives : 0;
  const float col_weight = columns && col_negatives > 0 ? 1 / col_negatives : 0;
  const float on_pair = (row_weight > 0) + (col_weight > 0) + apart * (row_weight + col_weight);
  float slope = a.pair_dot[i] * on_pair;
  const Element *x_hat = static_cast<const Element*>(a.x_hat), *y_hat = static_cast<const Element*>(a.y_hat);
  if (row_weight > 0) {
    slope += row_weight * dot(x_hat + i * a.width, w.y_sums.of(w.y_sums.plain, a.row_ids, i), a.width);
  }
  if (col_weight > 0) {
    slope += col_weight * dot(y_hat + i * a.width, w.x_sums.of(w.x_sums.plain, a.col_ids, i), a.width);
  }
  slope *= (columns ? 0.5f : 1.0f) * *a.scale;
  a.slope[i] = slope;
  a.losses[i] += *a.smoothing * slope;
  a.pair_weight[i] += *a.smoothing * on_pair;
  a.row_negative_weight[i] = row_weight;
  a.col_negative_weight[i] = col_weight;
}

void pair(const PairLosses& a, int64_t i) {
  const float positive = a.pair_dot[i] * *a.scale;
  const Margin row = Margin::of(a.row_lse[i] - positive);
  a.losses[i] = row.loss;
  a.row_weight[i] = row.weight;
  a.pair_weight[i] = -row.weight;
  if (!a.col_count) return;
  const Margin col = Margin::of(a.col_lse[i] - positive);
  a.losses[i] = 0.5f * (row.loss + col.loss);
  a.col_weight[i] = col.weight;
  a.pair_weight[i] -= col.weight;
}

template <class Element>
void run(const PairLosses& a) {
  const int parts = useful_threads(a.threads, a.smoothing ? a.rows * a.width * 64 : a.rows * 1024);
  with_team(parts, [&](Team& team) {
    const Workspace w(a.workspace, a);
    if (a.smoothing) {
      fill(w.y_sums, team, static_cast<const Element*>(a.y_hat), a.columns, a.col_ids);
      if (a.col_count) fill(w.x_sums, team, static_cast<const Element*>(a.x_hat), a.rows, a.row_ids);
      if (a.row_ids) {
        count(w.row_counts, a.rows + 1, a.row_ids, a.rows);
        count(w.col_counts, a.rows + 1, a.col_ids, a.columns);
      }
    }
    parallel(team, parts, [&](int64_t part, int) {
      for (int64_t i = a.rows * part / parts; i < a.rows * (part + 1) / parts; ++i) {
        pair(a, i);
        if (a.smoothing) smoothed_pair<Element>(a, w, i);
      }
    });
  });
}

}  // namespace

void pair_losses(const PairLosses& a) { a.operand_dtype == Dtype::bfloat16 ? run<uint16_t>(a) : run<float>(a); }

int64_t pair_losses_workspace(const PairLosses& a) { return a.smoothing ? Workspace(nullptr, a).bytes : 0; }

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
