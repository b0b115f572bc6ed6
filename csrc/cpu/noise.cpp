// Normals from keys. Philox works on vectors of 64-bit lanes, whose upper halves hold what is left of products: the
// instruction sets multiply 32 bits by 32 into 64 in just such lanes. The rest is plain loops, which compilers
// vectorise.
#include "cpu/noise.h"

#include "common/box_muller.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace ddpm_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
typedef uint64_t Wide __attribute__((vector_size(vector_bytes)));
constexpr int wide_lanes = vector_bytes / 8;
constexpr int lanes = 2 * wide_lanes;       // blocks made at once
constexpr int blocks = noise_step / 4 * 4;  // and kept, before they become normals

// The products of the lower halves of the lanes.
inline Wide product(Wide a, Wide b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

struct WideWords {
  Wide w0, w1, w2, w3;  // in the lanes' lower halves
};

// As ddpm_fast::philox, for as many counters.
inline WideWords philox(uint64_t seed, Wide counter) {
  const Wide zero = {};
  const Wide m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  Wide c0 = counter, c1 = counter >> 32, c2 = zero, c3 = zero;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = product(c0, m0), p1 = product(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ (zero + k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ (zero + k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Even blocks came in the one, odd ones in the other: side by side they are in order.
inline void store_words(Wide even, Wide odd, uint32_t* words) {
  const Wide both = (even & 0xFFFFFFFFu) | (odd << 32);
  std::memcpy(words, &both, sizeof both);
}

void make_words(uint64_t seed, uint64_t counter, uint32_t (*words)[blocks], int64_t count) {
  Wide even;
  for (int lane = 0; lane < wide_lanes; ++lane) even[lane] = counter + 2 * lane;
  for (int64_t j = 0; j < count; j += lanes, even += lanes) {
    const WideWords a = philox(seed, even), b = philox(seed, even + 1);
    store_words(a.w0, b.w0, words[0] + j);
    store_words(a.w1, b.w1, words[1] + j);
    store_words(a.w2, b.w2, words[2] + j);
    store_words(a.w3, b.w3, words[3] + j);
  }
}

}  // namespace

void make_noise(const int64_t* key, int64_t first, int64_t size, float* __restrict__ out) {
  alignas(64) uint32_t words[4][blocks];
  const uint64_t seed = static_cast<uint64_t>(key[0]);
  uint64_t counter = static_cast<uint64_t>(key[1]) + static_cast<uint64_t>(first / 4);
  for (int64_t left = round_up(size, noise_step) / 4; left > 0; left -= blocks) {
    const int64_t count = left < blocks ? left : blocks;
    make_words(seed, counter, words, count);
    for (int64_t j = 0; j < count; ++j) {
      const Pair a = box_muller(words[0][j], words[1][j]), b = box_muller(words[2][j], words[3][j]);
      out[4 * j] = a.first;
      out[4 * j + 1] = a.second;
      out[4 * j + 2] = b.first;
      out[4 * j + 3] = b.second;
    }
    counter += count;
    out += 4 * count;
  }
}

}  // namespace ddpm_fast::cpu
