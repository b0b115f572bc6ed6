// Two standard normals from two random words: sqrt(-2 ln u) times the cosine and the sine of 2 pi v.
//
// u and v are word * 2^-32 + 2^-33, rounded in float32 where the reference rounds: near u = 1 another rounding moves
// the result by 3e-4. Beyond that the functions here differ from exact ones by about one unit in the last place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace ddpm_fast {

struct Pair {
  float first, second;
};

// Fused where the instruction set has it at no cost; the compilers are told not to fuse on their own.
DDPM_FAST_HOST_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

DDPM_FAST_HOST_DEVICE int32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

DDPM_FAST_HOST_DEVICE float float_of(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

DDPM_FAST_HOST_DEVICE float uniform(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;  // the product is exact
}

// ln u for normal u > 0, with the relative precision that u near 1 needs (minimax, 6e-9).
DDPM_FAST_HOST_DEVICE float natural_log(float u) {
  const int32_t shifted = bits_of(u) - 0x3F3504F3;  // of sqrt(1/2): u = m 2^e with m in [sqrt(1/2), sqrt(2))
  const float e = static_cast<float>(shifted >> 23);
  const float f = float_of((shifted & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  float p = -0.07634500414133072f;
  p = fused(p, f, 0.1276157945394516f);
  p = fused(p, f, -0.13160182535648346f);
  p = fused(p, f, 0.14201757311820984f);
  p = fused(p, f, -0.16623356938362122f);
  p = fused(p, f, 0.20001226663589478f);
  p = fused(p, f, -0.2500081956386566f);
  p = fused(p, f, 0.3333333134651184f);
  const float f2 = f * f;
  return fused(e, 0.693147180559945f, fused(f2, fused(p, f, -0.5f), f));
}

// (cos, sin) of 2 pi v for v in [0, 1] (minimax on an eighth of a turn, 5e-9).
DDPM_FAST_HOST_DEVICE Pair cos_sin_of_turns(float v) {
  const float rounded = fused(v, 4.0f, 12582912.0f);  // 1.5 2^23: the quarter turns stand in the lowest bits
  const int32_t quarter = bits_of(rounded);
  const float r = fused(rounded - 12582912.0f, -0.25f, v);  // exact
  const float r2 = r * r;
  float s = fused(r2, 41.46989059448242f, -76.6977767944336f);
  s = fused(s, r2, 81.6052017211914f);
  s = fused(s, r2, -41.34170150756836f);
  s = fused(s, r2, 6.2831854820251465f) * r;
  float c = fused(r2, 59.24596405029297f, -85.44374084472656f);
  c = fused(c, r2, 64.93932342529297f);
  c = fused(c, r2, -19.739208221435547f);
  c = fused(c, r2, 1.0f);
  const bool swapped = quarter & 1;
  const float x = swapped ? s : c, y = swapped ? c : s;
  // Quarters 1 and 2 have a negative cosine, 2 and 3 a negative sine.
  return {float_of(bits_of(x) ^ ((quarter + 1) & 2) << 30), float_of(bits_of(y) ^ (quarter & 2) << 30)};
}

DDPM_FAST_HOST_DEVICE Pair box_muller(uint32_t word0, uint32_t word1) {
  const float radius = sqrtf(-2.0f * natural_log(uniform(word0)));
  const Pair turn = cos_sin_of_turns(uniform(word1));
  return {radius * turn.first, radius * turn.second};
}

}  // namespace ddpm_fast
