// Vectors of float32 in the width of the level that this file is compiled for, and the functions on them.
//
// A level's files use nothing of the C++ library: an inline function of it, compiled here for AVX-512, could be the
// copy that the linker keeps for every level, and a machine without AVX-512 would stop at it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../extents.h"
#include "../kernels.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;

// A tile of the matmul is kTileRows x kTileVectors vectors, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 8, kTileVectors = 3;
#else
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * kLanes;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
MODEST_ALIGN_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
MODEST_ALIGN_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class To, class From>
MODEST_ALIGN_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

MODEST_ALIGN_INLINE Vec splat(float x) { return x - Vec{}; }
MODEST_ALIGN_INLINE IntVec splat(int32_t x) { return x - IntVec{}; }

MODEST_ALIGN_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

MODEST_ALIGN_INLINE double sum(Vec v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// 2^x for x <= 127, 0 below -126; NaN stays NaN. Polynomial of degree 6 with a relative error of 2e-9, before rounding.
MODEST_ALIGN_INLINE Vec exp2(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum is rounded to an integer
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.54614447e-4f);
  p = p * f + 1.34004282e-3f;
  p = p * f + 9.61805668e-3f;
  p = p * f + 5.55032723e-2f;
  p = p * f + 2.40226509e-1f;
  p = p * f + 6.93147207e-1f;
  p = p * f + 1.0f;
  const IntVec exponent = (bits<IntVec>(shifted) - bits<IntVec>(magic) + 127) << 23;
  return x < -126.0f ? Vec{} : p * bits<Vec>(exponent);
}

// ln x for normal x > 0.
MODEST_ALIGN_INLINE Vec log(Vec x) {
  // The exponent of x / sqrt(1/2), so that the rest lies in [sqrt(1/2), sqrt(2)).
  const IntVec exponent = (bits<IntVec>(x) - 0x3F3504F3) >> 23;
  const Vec f = bits<Vec>(bits<IntVec>(x) - (exponent << 23)) - 1.0f;
  Vec q = splat(-7.67364150e-2f);
  q = q * f + 1.27226728e-1f;
  q = q * f - 1.31275557e-1f;
  q = q * f + 1.42048560e-1f;
  q = q * f - 1.66266456e-1f;
  q = q * f + 2.00012345e-1f;
  q = q * f - 2.50007812e-1f;
  q = q * f + 3.33333300e-1f;
  q = q * f - 4.99999976e-1f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  // ln 2 in two parts, the first exact in few bits
  return e * 0.693359375f + (f + (f * f * q + e * -2.12194440e-4f));
}

// sin and cos of 2 pi v for v in [0, 1).
MODEST_ALIGN_INLINE void sincos_turns(Vec v, Vec& sin, Vec& cos) {
  const IntVec quarter = __builtin_convertvector(v * 4.0f + 0.5f, IntVec);
  const Vec r = v - __builtin_convertvector(quarter, Vec) * 0.25f;
  const Vec t = r * r;
  Vec s = splat(41.4728332f);
  s = s * t - 76.6978664f;
  s = s * t + 81.6052047f;
  s = s * t - 41.3417022f;
  s = (s * t + 6.28318531f) * r;
  Vec c = splat(59.2201690f);
  c = c * t - 85.4428447f;
  c = c * t + 64.9393161f;
  c = c * t - 19.7392087f;
  c = c * t + 1.0f;
  const IntVec swapped = (quarter & 1) != 0;
  sin = swapped ? c : s;
  cos = swapped ? s : c;
  sin = (quarter & 2) != 0 ? -sin : sin;
  cos = ((quarter + 1) & 2) != 0 ? -cos : cos;
}

MODEST_ALIGN_INLINE float from_bfloat16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

MODEST_ALIGN_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t word = bits<uint32_t>(x);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

// Elements are float, or uint16_t that hold bfloat16.
MODEST_ALIGN_INLINE float load_element(const float* p) { return *p; }
MODEST_ALIGN_INLINE float load_element(const uint16_t* p) { return from_bfloat16(*p); }
MODEST_ALIGN_INLINE void store_element(float* p, float x) { *p = x; }
MODEST_ALIGN_INLINE void store_element(uint16_t* p, float x) { *p = to_bfloat16(x); }

MODEST_ALIGN_INLINE Vec load_vector(const float* p) { return load<Vec>(p); }
MODEST_ALIGN_INLINE Vec load_vector(const uint16_t* p) {
  return bits<Vec>(__builtin_convertvector(load<HalfVec>(p), WordVec) << 16);
}
MODEST_ALIGN_INLINE void store_vector(float* p, Vec x) { store(p, x); }
MODEST_ALIGN_INLINE void store_vector(uint16_t* p, Vec x) {
#if defined(__AVX512BF16__)
  store(p, bits<HalfVec>(_mm512_cvtneps_pbh((__m512)x)));
#else
  const WordVec word = bits<WordVec>(x);
  const WordVec rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
  const WordVec kept = x == x ? rounded : 0x7FC0 - WordVec{};
  store(p, __builtin_convertvector(kept, HalfVec));
#endif
}

// Operands by name of their type: what one step of a dot product takes, as a 32-bit word, and how it is added.
struct Float32 {
  using Element = float;
  static constexpr int kPerWord = 1;
  MODEST_ALIGN_INLINE Vec multiply_add(Vec sum, uint32_t a, WordVec b) { return sum + bits<float>(a) * bits<Vec>(b); }
  MODEST_ALIGN_INLINE WordVec word(Vec first, Vec) { return bits<WordVec>(first); }
};

#if defined(__AVX512BF16__)
constexpr bool kBFloat16 = true;
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kPerWord = 2;
  MODEST_ALIGN_INLINE Vec multiply_add(Vec sum, uint32_t a, WordVec b) {
    const WordVec both = a - WordVec{};
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)b);
  }
  MODEST_ALIGN_INLINE WordVec word(Vec first, Vec second) {
    const WordVec low = __builtin_convertvector(bits<HalfVec>(_mm512_cvtneps_pbh((__m512)first)), WordVec);
    const WordVec high = __builtin_convertvector(bits<HalfVec>(_mm512_cvtneps_pbh((__m512)second)), WordVec);
    return low | high << 16;
  }
};
#else
constexpr bool kBFloat16 = false;
using BFloat16 = Float32;
#endif

// Calls function(Operand()).
template <class Function>
MODEST_ALIGN_INLINE auto with_operand(Dtype dtype, Function&& function) {
  return kBFloat16 && dtype == Dtype::bfloat16 ? function(BFloat16()) : function(Float32());
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
