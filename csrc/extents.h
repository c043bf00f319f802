// Arithmetic of extents, for every part; nvcc takes what is constexpr into kernels.
#pragma once

#include <cstdint>

namespace modest_align {

// Static and inlined by force, for each CPU level must have its own copy (cpu/vector.h says why).
#define MODEST_ALIGN_METHOD inline __attribute__((always_inline))
#define MODEST_ALIGN_INLINE static MODEST_ALIGN_METHOD

MODEST_ALIGN_INLINE constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
MODEST_ALIGN_INLINE constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
MODEST_ALIGN_INLINE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
MODEST_ALIGN_INLINE constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// The length of the fewest equal parts of `total` that have at most `largest`, rounded up to whole multiples.
MODEST_ALIGN_INLINE std::int64_t even_part(std::int64_t total, std::int64_t largest, std::int64_t multiple) {
  return round_up(ceil_div(total, ceil_div(total, larger(largest, multiple))), multiple);
}

}  // namespace modest_align
