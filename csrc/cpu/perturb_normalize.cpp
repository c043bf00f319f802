#include "../philox.h"
#include "matmul.h"
#include "parallel.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {
namespace {

constexpr float kMinNorm = 1e-12f;
constexpr float kTwoToMinus24 = 5.9604644775390625e-08f;
// Features of a row at a time: kLanes groups of four, whose noise is one call of the generator.
constexpr int kChunk = 4 * kLanes;
// Features of a noisy row that is kept between its two passes.
constexpr int64_t kKept = 8192;

MODEST_ALIGN_INLINE float load_element(const float* p) { return *p; }
MODEST_ALIGN_INLINE float load_element(const uint16_t* p) { return from_bfloat16(*p); }
MODEST_ALIGN_INLINE Vec load_vector(const float* p) { return load<Vec>(p); }
MODEST_ALIGN_INLINE Vec load_vector(const uint16_t* p) { return load_bfloat16(p); }
MODEST_ALIGN_INLINE void store_element(float* p, float x) { *p = x; }
MODEST_ALIGN_INLINE void store_element(uint16_t* p, float x) { *p = to_bfloat16(x); }
MODEST_ALIGN_INLINE void store_vector(float* p, Vec v) { store(p, v); }
MODEST_ALIGN_INLINE void store_vector(uint16_t* p, Vec v) { store_bfloat16(p, v); }

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

// Standard normal noise of the features [d, d + kChunk) of a row, as reference.gaussian_noise draws it.
MODEST_ALIGN_INLINE void gaussian_noise(uint64_t seed, int stream, uint64_t row, int64_t d, float (&noise)[kChunk]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    c0[lane] = static_cast<uint32_t>(d / 4 + lane);
    c1[lane] = static_cast<uint32_t>(row);
    c2[lane] = static_cast<uint32_t>(row >> 32);
    c3[lane] = static_cast<uint32_t>(stream);
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

template <class Input, class Output>
void normalize_rows(const Input* x, const int64_t* seed, int stream, float noise_std, bool relative_noise,
                    Output* x_hat, float* inv_norm, int64_t rows, int64_t features, int64_t width, int threads) {
  const int parts = useful_threads(threads, rows * width * (seed ? 64 : 16));
  with_team(parts, [&](Team& team) { parallel(team, parts, [&](int64_t part, int) {
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const Input* row = x + i * features;
      Output* to = x_hat + i * width;
      float std = noise_std;
      if (seed && relative_noise) {
        Vec squares = {};
        for (int64_t d = 0; d < features; d += kLanes) {
          const Vec v = load_ragged(row, d, features);
          squares += v * v;
        }
        std *= static_cast<float>(__builtin_sqrt(sum(squares) / features));
      }
      // A noisy row is kept for the second pass, or drawn again if it is too long for the stack.
      float kept[kKept];
      const bool keep = seed && width <= kKept;
      for (int writing = 0; writing < 2; ++writing) {
        Vec squares = {};
        const float inverse = writing ? inv_norm[i] : 0.0f;
        for (int64_t d = 0; d < width; d += kChunk) {
          float noise[kChunk];
          const bool draw = seed && !(keep && writing);
          if (draw) gaussian_noise(static_cast<uint64_t>(*seed), stream, static_cast<uint64_t>(i), d, noise);
          for (int64_t c = d; c < d + kChunk && c < width; c += kLanes) {
            Vec v;
            if (keep && writing) {
              v = load<Vec>(kept + c);
            } else {
              v = load_ragged(row, c, features);
              if (draw) v += load<Vec>(noise + (c - d)) * std;
              for (int lane = 0; c + kLanes > features && lane < kLanes; ++lane) {
                if (c + lane >= features) v[lane] = 0.0f;
              }
              if (keep) store(kept + c, v);
            }
            if (writing) {
              store_vector(to + c, v * inverse);
            } else {
              squares += v * v;
            }
          }
        }
        if (!writing) {
          const float norm = static_cast<float>(__builtin_sqrt(sum(squares)));
          inv_norm[i] = 1.0f / (norm < kMinNorm ? kMinNorm : norm);
        }
      }
    }
  }); });
}

template <class Operand, class Output>
void backward_rows(const float* grad, const Operand* x_hat, const float* inv_norm, const Operand* pair_hat,
                   const float* pair_weight, const float* offset, float factor, Output* dx, float* row_dot,
                   int64_t rows, int64_t pairs, int64_t features, int64_t width, int threads) {
  const int parts = useful_threads(threads, rows * width * 16);
  with_team(parts, [&](Team& team) { parallel(team, parts, [&](int64_t part, int) {
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const bool paired = i < pairs;
      const float* row_offset = paired ? offset : offset + width;
      const float weight = paired ? pair_weight[i] : 0.0f;
      const Operand* pair = pair_hat + (paired ? i : 0) * width;
      const auto gradient = [&](int64_t d) {
        const Vec g = load<Vec>(grad + i * width + d) + load<Vec>(row_offset + d);
        return (paired ? g + load_vector(pair + d) * weight : g) * factor;
      };
      Vec products = {};
      for (int64_t d = 0; d < width; d += kLanes) products += load_vector(x_hat + i * width + d) * gradient(d);
      row_dot[i] = static_cast<float>(sum(products));
      // A row whose norm was below 1e-12 was divided by a constant: no projection there.
      const float projection = inv_norm[i] < 1 / kMinNorm ? row_dot[i] : 0.0f;
      for (int64_t d = 0; d < features; d += kLanes) {
        const Vec result = (gradient(d) - load_vector(x_hat + i * width + d) * projection) * inv_norm[i];
        store_ragged(dx + i * features, d, features, result);
      }
    }
  }); });
}

void forward(const void* x, Dtype x_dtype, const int64_t* seed, int stream, float noise_std, bool relative_noise,
             void* x_hat, Dtype operand_dtype, float* inv_norm, int64_t rows, int64_t features, int64_t width,
             int threads) {
  const auto run = [&](auto* in, auto* out) {
    normalize_rows(in, seed, stream, noise_std, relative_noise, out, inv_norm, rows, features, width, threads);
  };
  const float* floats = static_cast<const float*>(x);
  const uint16_t* halves = static_cast<const uint16_t*>(x);
  if (x_dtype == Dtype::bfloat16) {
    operand_dtype == Dtype::bfloat16 ? run(halves, static_cast<uint16_t*>(x_hat))
                                     : run(halves, static_cast<float*>(x_hat));
  } else {
    operand_dtype == Dtype::bfloat16 ? run(floats, static_cast<uint16_t*>(x_hat))
                                     : run(floats, static_cast<float*>(x_hat));
  }
}

void backward(const float* grad, const void* x_hat, Dtype operand_dtype, const float* inv_norm, const void* pair_hat,
              const float* pair_weight, const float* offset, const float* factor, void* dx, Dtype dx_dtype,
              float* row_dot, int64_t rows, int64_t pairs, int64_t features, int64_t width, int threads) {
  const auto run = [&](auto* unit, auto* out) {
    backward_rows(grad, unit, inv_norm, static_cast<decltype(unit)>(pair_hat), pair_weight, offset, *factor, out,
                  row_dot, rows, pairs, features, width, threads);
  };
  const float* floats = static_cast<const float*>(x_hat);
  const uint16_t* halves = static_cast<const uint16_t*>(x_hat);
  if (operand_dtype == Dtype::bfloat16) {
    dx_dtype == Dtype::bfloat16 ? run(halves, static_cast<uint16_t*>(dx)) : run(halves, static_cast<float*>(dx));
  } else {
    dx_dtype == Dtype::bfloat16 ? run(floats, static_cast<uint16_t*>(dx)) : run(floats, static_cast<float*>(dx));
  }
}

}  // namespace

extern const decltype(CpuKernels::perturb_normalize) perturb_normalize;
extern const decltype(CpuKernels::perturb_normalize_backward) perturb_normalize_backward;
const decltype(CpuKernels::perturb_normalize) perturb_normalize = forward;
const decltype(CpuKernels::perturb_normalize_backward) perturb_normalize_backward = backward;

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
