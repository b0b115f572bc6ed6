// Standard normals from a key, on the GPU's own units for logarithms and square roots.
#pragma once

#include "common/box_muller.h"
#include "common/philox.h"

namespace ddpm_fast {

struct Key {
  uint64_t seed, offset;
};

__device__ __forceinline__ Key load_key(const int64_t* keys, int64_t index) {
  return {static_cast<uint64_t>(keys[2 * index]), static_cast<uint64_t>(keys[2 * index + 1])};
}

// sqrt(-2 ln u). lg2.approx is good to 2^-22 absolute, which near u = 1, where the logarithm vanishes, is not enough:
// there it is a polynomial in u - 1 (minimax, 3e-8). The result is good to 5e-7 in the middle, 8e-7 in the tail.
__device__ __forceinline__ float radius(float u) {
  float log2, root;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(u));
  const float f = u - 1.0f;  // exact where it is used
  float p = fmaf(f, 0.5517734885215759f, -0.664740800857544f);
  p = fmaf(p, f, 1.000020146369934f);
  p = fmaf(p, f, -2.0f) * f;
  const float square = u > 0.9375f ? p : log2 * -1.3862943611198906f;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(square));
  return root;
}

__device__ __forceinline__ Pair device_box_muller(uint32_t word0, uint32_t word1) {
  return turned(radius(uniform(word0)), uniform(word1));
}

// The kCount elements of a key's stream from 4 * block on.
template <int kCount>
__device__ __forceinline__ void normals(Key key, int64_t block, float (&out)[kCount]) {
  static_assert(kCount % 4 == 0);
  // Hides from the compiler that a loop's tiles share the key: it would keep the keys of all rounds, in 18 registers
  // that are worth more than the additions.
  asm volatile("" : "+l"(key.seed));
  const uint64_t counter = key.offset + static_cast<uint64_t>(block);
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    const Words w = philox(key.seed, counter + j / 4);
    const Pair a = device_box_muller(w.w0, w.w1), b = device_box_muller(w.w2, w.w3);
    out[j] = a.first, out[j + 1] = a.second, out[j + 2] = b.first, out[j + 3] = b.second;
  }
}

}  // namespace ddpm_fast
