#pragma once

#include "common/box_muller.h"

namespace ddpm_fast::cpu {

// 2^n e^r, with r in [-ln 2 / 2, ln 2 / 2]: n as a float's bits' change, and e^r - 1 - r (minimax, 1e-9).
struct SplitExponential {
  float scale, r, rest;
};

inline SplitExponential split_exponential(float x) {
  const float rounded = fused(x, 1.4426950408889634f, 12582912.0f);  // 1.5 2^23: the whole number is in the lowest bits
  const float n = rounded - 12582912.0f;
  const float r = fused(n, -1.42860677e-6f, fused(n, -0.693145752f, x));  // n times ln 2's first part is exact
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  return {float_of((bits_of(rounded) << 23) + 0x3F800000), r, p * r * r};
}

// e^x to about an ulp for x in [-87, 87]; beyond, what it is at the ends.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const SplitExponential e = split_exponential(x);
  return fused(e.scale, e.r + e.rest, e.scale);
}

}  // namespace ddpm_fast::cpu
