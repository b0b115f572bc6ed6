#pragma once

#include <limits>

#include "common/box_muller.h"

namespace ddpm_fast::cpu {

// x = n ln 2 + r, with r in [-ln 2 / 2, ln 2 / 2].
struct Reduced {
  int32_t n_bits;  // n, in the lowest bits
  float r;
};

inline Reduced reduce(float x) {
  const float rounded = fused(x, 1.4426950408889634f, 12582912.0f);  // 1.5 2^23
  const float n = rounded - 12582912.0f;
  return {bits_of(rounded), fused(n, -1.42860677e-6f, fused(n, -0.693145752f, x))};  // n ln 2's first part is exact
}

// (e^r - 1 - r) / r^2 for such an r (minimax, to 3e-9 of e^r).
inline float exponential_series(float r) {
  float p = 0.0013950478751212358f;
  p = fused(p, r, 0.008368882350623608f);
  p = fused(p, r, 0.04166620597243309f);
  p = fused(p, r, 0.1666651964187622f);
  return fused(p, r, 0.5f);
}

// e^x to about one unit in the last place. |x| is limited to 87, and NaN is treated as 87 too. The limit is applied to
// the bits as integers, which compiles to three instructions instead of the six of two comparisons.
inline float exponential(float x) {
  const int32_t bits = bits_of(x), size = bits & 0x7FFFFFFF, limit = 0x42AE0000;
  const Reduced a = reduce(float_of((size < limit ? size : limit) | (bits & INT32_MIN)));
  const float p = fused(fused(exponential_series(a.r), a.r, 1.0f), a.r, 1.0f);
  return float_of(bits_of(p) + (a.n_bits << 23));
}

// The same, but infinite where e^x exceeds the range of float32, and NaN for NaN.
inline float exponential_or_infinite(float x) {
  const float least = x < -87.0f ? -87.0f : x;
  const Reduced a = reduce(least);
  const float p = fused(fused(exponential_series(a.r), a.r, 1.0f), a.r, 1.0f);
  const float finite = float_of(static_cast<int32_t>(bits_of(p) + (static_cast<uint32_t>(a.n_bits) << 23)));
  return x < 88.72284f ? finite : x * std::numeric_limits<float>::infinity();
}

}  // namespace ddpm_fast::cpu
