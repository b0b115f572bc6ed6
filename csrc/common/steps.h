// Formulas for one element, in float32, for both the CPU's and the CUDA kernels.
#pragma once

#include <cmath>

#include "common/arguments.h"
#include "common/macros.h"

namespace ddpm_fast {

// Maps a byte of an image from [0, 255] to [-1, 1].
DDPM_FAST_HOST_DEVICE float from_byte(uint8_t value) { return static_cast<float>(value) * (2.0f / 255.0f) - 1.0f; }

// Returns NaN for NaN, like torch.clamp.
DDPM_FAST_HOST_DEVICE float clip(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Ho et al. (2020), eq. 4.
DDPM_FAST_HOST_DEVICE float q_sample(float a, float s, float x_start, float noise) { return a * x_start + s * noise; }

struct Loss {
  float value, slope;  // slope is the derivative of value with respect to the error
};

template <LossType type>
DDPM_FAST_HOST_DEVICE Loss loss_of(float error) {
  if constexpr (type == LossType::l2) return {error * error, 2.0f * error};
  const float size = fabsf(error), sign = error > 0.0f ? 1.0f : error < 0.0f ? -1.0f : 0.0f;
  if constexpr (type == LossType::l1) return {size, sign};
  // A NaN error takes the last branch, so its slope is NaN. (With l1 it is 0, like sign(NaN) in PyTorch.)
  return size > 1.0f ? Loss{size - 0.5f, sign} : Loss{0.5f * error * error, error};
}

}  // namespace ddpm_fast
