// philox4x32-10 (Salmon et al. 2011): four random words from a key and a counter.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ddpm_fast {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The lower and upper half of the product of two words. In device code, the plain 64-bit product would compile to
// needless additions of zero upper words.
DDPM_FAST_HOST_DEVICE void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
#ifdef __CUDA_ARCH__
  low = a * b, high = __umulhi(a, b);
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  low = static_cast<uint32_t>(product), high = static_cast<uint32_t>(product >> 32);
#endif
}

// Only the lower 64 bits of the counter can be set; the upper ones are 0.
DDPM_FAST_HOST_DEVICE Words philox(uint64_t seed, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    uint32_t low0, high0, low1, high1;
    multiply(0xD2511F53u, c0, low0, high0);
    multiply(0xCD9E8D57u, c2, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace ddpm_fast
