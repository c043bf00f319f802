#include <type_traits>

#include "../philox.h"
#include "level.h"
#include "negated_sums.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {
namespace {

constexpr float kMinNorm = 1e-12f;
// A row of finite features whose squares overflow is taken so many times: else it would count as a row of zeros.
constexpr float kShrink = 0x1p-80f;
constexpr float kTwoToMinus24 = 5.9604644775390625e-08f;
// Features of a row at a time: kLanes groups of four, whose noise is one call of the generator.
constexpr int kChunk = 4 * kLanes;
// Features of a noisy row that is kept between its two passes.
constexpr int64_t kKept = 8192;

// kLanes elements of a row from `d` on, zero past the row's end.
template <class Element>
MODEST_ALIGN_INLINE Vec load_ragged(const Element* row, int64_t d, int64_t features) {
  if (d + kLanes <= features) return load_vector(row + d);
  float some[kLanes] = {};
  for (int64_t lane = 0; d + lane < features; ++lane) some[lane] = load_element(row + d + lane);
  return load<Vec>(some);
}

template <class Element>
MODEST_ALIGN_INLINE void store_ragged(Element* row, int64_t d, int64_t features, Vec v) {
  if (d + kLanes <= features) return store_vector(row + d, v);
  for (int64_t lane = 0; d + lane < features; ++lane) store_element(row + d + lane, v[lane]);
}

// Standard normal noise of the features [d, d + kChunk) of a row, as noise.gaussian_noise draws it.
MODEST_ALIGN_INLINE void gaussian_noise(uint64_t seed, int noise_stream, uint64_t row, int64_t d,
                                        float (&noise)[kChunk]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    c0[lane] = static_cast<uint32_t>(d / 4 + lane);
    c1[lane] = static_cast<uint32_t>(row);
    c2[lane] = static_cast<uint32_t>(row >> 32);
    c3[lane] = static_cast<uint32_t>(noise_stream);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) philox_round(c0[lane], c1[lane], c2[lane], c3[lane], key0, key1);
    philox_next_key(key0, key1);
  }
  float normal[4][kLanes];
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int pair = 0; pair < 4; pair += 2) {
    const IntVec top = bits<IntVec>(load<WordVec>(words[pair]) >> 8);
    const IntVec turn = bits<IntVec>(load<WordVec>(words[pair + 1]) >> 8);
    const Vec u = (__builtin_convertvector(top, Vec) + 1.0f) * kTwoToMinus24;
    Vec sin, cos;
    sincos_turns(__builtin_convertvector(turn, Vec) * kTwoToMinus24, sin, cos);
    const Vec square = log(u) * -2.0f;
    float radius[kLanes];
    store(radius, square);
    for (int lane = 0; lane < kLanes; ++lane) radius[lane] = __builtin_sqrtf(radius[lane]);
    store(normal[pair], load<Vec>(radius) * cos);
    store(normal[pair + 1], load<Vec>(radius) * sin);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int word = 0; word < 4; ++word) noise[4 * lane + word] = normal[word][lane];
  }
}

// The features [d, d + kChunk) of a row, kShrink times if they are `shrunk`, with its noise; zero past D.
template <class Input, bool shrunk>
MODEST_ALIGN_INLINE void noisy_chunk(const PerturbNormalize& a, int64_t row, float std, int64_t d, Vec (&chunk)[4]) {
  const Input* x = static_cast<const Input*>(a.x) + row * a.row_stride;
  float noise[kChunk];
  if (a.seed) {
    gaussian_noise(static_cast<uint64_t>(*a.seed), a.noise_stream, static_cast<uint64_t>(a.first_row + row), d, noise);
  }
  for (int v = 0; v < 4; ++v) {
    const int64_t c = d + v * kLanes;
    chunk[v] = load_ragged(x, c, a.features);
    if (shrunk) chunk[v] *= kShrink;
    if (!a.seed) continue;
    chunk[v] += load<Vec>(noise + v * kLanes) * std;
    for (int lane = 0; c + kLanes > a.features && lane < kLanes; ++lane) {
      if (c + lane >= a.features) chunk[v][lane] = 0.0f;
    }
  }
}

template <class Input, bool shrunk>
MODEST_ALIGN_INLINE float noise_std_of(const PerturbNormalize& a, int64_t row) {
  if (!a.seed || !a.relative_noise) return a.seed ? *a.noise_std * (shrunk ? kShrink : 1.0f) : 0.0f;
  const Input* x = static_cast<const Input*>(a.x) + row * a.row_stride;
  Vec squares = {};
  for (int64_t d = 0; d < a.features; d += kLanes) {
    Vec v = load_ragged(x, d, a.features);
    if (shrunk) v *= kShrink;
    squares += v * v;
  }
  return *a.noise_std * static_cast<float>(__builtin_sqrt(sum(squares) / a.features));
}

template <class Input, class Output>
void normalize_shrunk_row(const PerturbNormalize& a, int64_t row);

template <class Input, class Output, bool shrunk = false>
void normalize_row(const PerturbNormalize& a, int64_t row) {
  // A noisy row is kept, or drawn again if it is too long for the stack.
  float kept[kKept];
  const bool keep = a.seed && a.width <= kKept;
  const float std = noise_std_of<Input, shrunk>(a, row);
  Vec squares = {}, chunk[4];
  for (int64_t d = 0; d < a.width; d += kChunk) {
    noisy_chunk<Input, shrunk>(a, row, std, d, chunk);
    for (const Vec& v : chunk) squares += v * v;
    if (keep) std::memcpy(kept + d, chunk, sizeof chunk);
  }
  const float norm = static_cast<float>(__builtin_sqrt(sum(squares)));
  if (!shrunk && !(norm < __builtin_inff())) return normalize_shrunk_row<Input, Output>(a, row);
  const float inverse = 1.0f / (norm < kMinNorm ? kMinNorm : norm);
  a.inv_norm[row] = shrunk ? inverse * kShrink : inverse;

  Output* x_hat = static_cast<Output*>(a.x_hat) + row * a.width;
  const Output* pair_hat = row < a.pairs ? static_cast<const Output*>(a.pair_hat) + row * a.width : nullptr;
  Vec dot = {};
  for (int64_t d = 0; d < a.width; d += kChunk) {
    if (keep) {
      std::memcpy(chunk, kept + d, sizeof chunk);
    } else {
      noisy_chunk<Input, shrunk>(a, row, std, d, chunk);
    }
    for (int v = 0; v < 4; ++v) {
      const int64_t c = d + v * kLanes;
      store_vector(x_hat + c, chunk[v] * inverse);
      if (pair_hat) dot += load_vector(x_hat + c) * load_vector(pair_hat + c);
    }
  }
  if (pair_hat) a.pair_dot[row] = static_cast<float>(sum(dot));
}

// Out of line: inlined it halves the speed of the usual way.
template <class Input, class Output>
__attribute__((noinline, cold)) void normalize_shrunk_row(const PerturbNormalize& a, int64_t row) {
  normalize_row<Input, Output, true>(a, row);
}

// The other side's sums, for the smoothing.
NegatedSums take_sums(Arena& arena, const PerturbNormalizeBackward& a) {
  return a.smoothing ? NegatedSums::take(arena, a.pair_ids, a.pairs, a.width, true) : NegatedSums{};
}

template <class Operand, class Output, bool smoothed>
void backward_row(const PerturbNormalizeBackward& a, const NegatedSums& sums, int64_t row) {
  const Operand* x_hat = static_cast<const Operand*>(a.x_hat) + row * a.width;
  const bool paired = row < a.pairs;
  const float weight = paired ? a.pair_weight[row] : 0.0f;
  const Operand* pair_hat = static_cast<const Operand*>(a.pair_hat) + (paired ? row : 0) * a.width;
  const float *plain = nullptr, *weighted = nullptr;
  float smoothing = 0.0f, negative_weight = 0.0f;
  if (smoothed) {
    plain = sums.of(sums.plain, a.ids, row);
    weighted = sums.of(sums.weighted, a.ids, row);
    smoothing = *a.smoothing;
    negative_weight = paired ? a.negative_weight[row] : 0.0f;
  }
  const auto gradient = [&](int64_t d) {
    Vec g = load<Vec>(a.grad + row * a.width + d);
    if (paired) g += load_vector(pair_hat + d) * weight;
    if (smoothed) g += (load<Vec>(plain + d) * negative_weight + load<Vec>(weighted + d)) * smoothing;
    return g;
  };
  Vec products = {};
  for (int64_t d = 0; d < a.width; d += kLanes) products += load_vector(x_hat + d) * gradient(d);
  const float dot = static_cast<float>(sum(products));
  a.row_dot[row] = dot * *a.factor;
  const float inverse = a.inv_norm[row], last = inverse * (*a.factor * *a.scale);
  // A row whose norm was below 1e-12 was divided by a constant, and has no gradient. A NaN's stays.
  const bool divided_by_constant = inverse >= 1 / kMinNorm;
  Output* dx = static_cast<Output*>(a.dx) + row * a.features;
  for (int64_t d = 0; d < a.features; d += kLanes) {
    const Vec result = (gradient(d) - load_vector(x_hat + d) * dot) * last;
    store_ragged(dx, d, a.features, divided_by_constant ? Vec{} : result);
  }
}

// Calls function(element, element) with null pointers of the two types.
template <class Function>
void with_elements(Dtype first, Dtype second, Function&& function) {
  const auto with_second = [&](auto* element) {
    second == Dtype::bfloat16 ? function(element, static_cast<uint16_t*>(nullptr))
                              : function(element, static_cast<float*>(nullptr));
  };
  first == Dtype::bfloat16 ? with_second(static_cast<uint16_t*>(nullptr)) : with_second(static_cast<float*>(nullptr));
}

template <class Pointer>
using Pointed = std::remove_pointer_t<Pointer>;

}  // namespace

void perturb_normalize(const PerturbNormalize& a) {
  with_elements(a.x_dtype, a.operand_dtype, [&](auto* in, auto* out) {
    parallel_rows(a.threads, a.rows, a.rows * a.width * (a.seed ? 64 : 16),
                  [&](int64_t row) { normalize_row<Pointed<decltype(in)>, Pointed<decltype(out)>>(a, row); });
  });
}

void perturb_normalize_backward(const PerturbNormalizeBackward& a) {
  const int parts = useful_threads(a.threads, a.rows * a.width * (a.smoothing ? 64 : 16));
  with_elements(a.operand_dtype, a.dx_dtype, [&](auto* in, auto* out) {
    using In = Pointed<decltype(in)>;
    using Out = Pointed<decltype(out)>;
    with_team(parts, [&](Team& team) {
      Arena arena{static_cast<char*>(a.workspace)};
      const NegatedSums sums = take_sums(arena, a);
      if (a.smoothing) {
        fill(sums, team, static_cast<const In*>(a.pair_hat), a.pair_rows, a.pair_ids, a.pair_negative_weight, a.pairs);
      }
      const auto backward = a.smoothing ? backward_row<In, Out, true> : backward_row<In, Out, false>;
      parallel(team, parts, [&](int64_t part, int) {
        for (int64_t i = a.rows * part / parts; i < a.rows * (part + 1) / parts; ++i) backward(a, sums, i);
      });
    });
  });
}

int64_t perturb_normalize_backward_workspace(const PerturbNormalizeBackward& a) {
  Arena arena{nullptr};
  take_sums(arena, a);
  return arena.next - static_cast<char*>(nullptr);
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
