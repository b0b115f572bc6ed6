// Two standard normals from two random words: sqrt(-2 ln u) times the cosine and the sine of 2 pi v.
//
// u and v are word * 2^-32 + 2^-33, rounded to float32 exactly as in the reference: near u = 1, a different rounding
// would change the result by 3e-4. The functions of u and v are accurate to about one unit in the last place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace ddpm_fast {

struct Pair {
  float first, second;
};

// a * b + c, with a single rounding where the instruction set has a fused multiply-add. Compilers do not fuse other
// expressions: setup.py turns that off.
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
  return fused(static_cast<float>(word), 0x1p-32f, 0x1p-33f);  // the product is exact
}

// -2 ln u for normal u > 0, by a minimax polynomial with a relative error of 6e-9, also near u = 1, where ln u is near
// 0.
DDPM_FAST_HOST_DEVICE float minus_two_ln(float u) {
  const int32_t shifted = bits_of(u) - 0x3F3504F3;  // of sqrt(1/2): u = m 2^e with m in [sqrt(1/2), sqrt(2))
  const float e = static_cast<float>(shifted >> 23);
  const float f = float_of((shifted & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  float p = 0.15269000828266144f;
  p = fused(p, f, -0.2552315890789032f);
  p = fused(p, f, 0.26320365071296692f);
  p = fused(p, f, -0.28403514623641968f);
  p = fused(p, f, 0.33246713876724243f);
  p = fused(p, f, -0.40002453327178955f);
  p = fused(p, f, 0.5000163912773132f);
  p = fused(p, f, -0.6666666269302368f);
  p = fused(p, f, 1.0f);
  return fused(e, -1.38629436111989f, f * fused(p, f, -2.0f));
}

// A radius times the cosine and the sine of 2 pi v, for v in [0, 1]. The angle is reduced by the nearest multiple of
// pi; an odd multiple changes the sign of the radius. Minimax polynomials, with an error of 5e-8.
DDPM_FAST_HOST_DEVICE Pair turned(float radius, float v) {
  const float rounded = fused(v, 2.0f, 12582912.0f);  // adding 1.5 * 2^23 leaves the multiple of pi in the lowest bits
  const float r = fused(rounded - 12582912.0f, -0.5f, v);  // exact
  const float signed_radius = float_of(bits_of(radius) ^ bits_of(rounded) << 31);
  const float r2 = r * r;
  float s = fused(r2, 39.53886795043945f, -76.55010986328125f);
  s = fused(s, r2, 81.60102081298828f);
  s = fused(s, r2, -41.34165573120117f);
  s = fused(s, r2, 6.283185005187988f) * r;
  float c = fused(r2, 56.34064865112305f, -85.2540054321289f);
  c = fused(c, r2, 64.93521881103516f);
  c = fused(c, r2, -19.739181518554688f);
  c = fused(c, r2, 1.0f);
  return {signed_radius * c, signed_radius * s};
}

DDPM_FAST_HOST_DEVICE Pair box_muller(uint32_t word0, uint32_t word1) {
  return turned(sqrtf(minus_two_ln(uniform(word0))), uniform(word1));
}

}  // namespace ddpm_fast
