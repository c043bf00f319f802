// Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC 2011), as in modest_align_kernels/noise.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MODEST_ALIGN_HOST_DEVICE __host__ __device__
#else
#define MODEST_ALIGN_HOST_DEVICE
#endif

namespace modest_align {

constexpr int kPhiloxRounds = 10;

MODEST_ALIGN_HOST_DEVICE static inline void philox_round(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2,
                                                         std::uint32_t& c3, std::uint32_t key0, std::uint32_t key1) {
  const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0;
  const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c2;
  c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
  c1 = static_cast<std::uint32_t>(product1);
  c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c3 = static_cast<std::uint32_t>(product0);
}

MODEST_ALIGN_HOST_DEVICE static inline void philox_next_key(std::uint32_t& key0, std::uint32_t& key1) {
  key0 += 0x9E3779B9u;
  key1 += 0xBB67AE85u;
}

// Replaces a counter by its four random words.
MODEST_ALIGN_HOST_DEVICE static inline void philox4x32_10(std::uint32_t counter[4], std::uint32_t key0,
                                                          std::uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(counter[0], counter[1], counter[2], counter[3], key0, key1);
    philox_next_key(key0, key1);
  }
}

}  // namespace modest_align
