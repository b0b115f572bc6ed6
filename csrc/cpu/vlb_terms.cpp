#include <cmath>

#include "cpu/convert.h"
#include "cpu/exponential.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace ddpm_fast::cpu {
namespace {

struct Row {
  float u, w, c0, cx, log_q, log_p;
};

// e^d - 1 - d. Near 0, where variances nearly agree, the difference is a series' rest.
inline float expm1_rest(float d) {
  const float near = d * d * exponential_series(d), far = exponential_or_infinite(d) - 1.0f - d;
  return fabsf(d) < 0.34f ? near : far;
}

// KL(q || p) of each element.
void set_divergences(const Row& row, float low, float high, const float* __restrict__ x_start,
    const float* __restrict__ x_t, const float* __restrict__ pred, const float* __restrict__ log_p, int64_t size,
    float* __restrict__ out) {
  for (int64_t i = 0; i < size; ++i) {
    const float x_hat = clip(row.u * x_t[i] + row.w * pred[i], low, high);
    const float error = row.c0 * (x_start[i] - x_hat);
    out[i] = 0.5f * (expm1_rest(row.log_q - log_p[i]) + error * error * exponential_or_infinite(-log_p[i]));
  }
}

// ln of the normal's mass in the bin of width 2 / 255 around x, the outer bins reaching to infinity (Ho et al. 2020,
// eq. 13); masses are at least 1e-12. One timestep in all of them needs it: it is not worth vectors.
double log_bin(double x, double mean, double log_sigma) {
  const double inverse = std::exp(-log_sigma) * std::sqrt(0.5);
  double upper = (x - mean + 1.0 / 255) * inverse, lower = (x - mean - 1.0 / 255) * inverse;
  bool open_left = x < -0.999, open_right = x > 0.999;
  // erfc keeps its relative precision in the right tail alone: take the mass where it is not a difference of ones.
  if (upper + lower < 0) {
    const double flipped = -upper;
    upper = -lower;
    lower = flipped;
    std::swap(open_left, open_right);
  }
  const double mass = 0.5 * ((open_left ? 2.0 : std::erfc(lower)) - (open_right ? 0.0 : std::erfc(upper)));
  return std::log(mass < 1e-12 ? 1e-12 : mass);  // NaN stays
}

void set_decoder(const Row& row, float low, float high, const float* x_start, const float* x_t, const float* pred,
    const float* log_p, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    const float x_hat = clip(row.u * x_t[i] + row.w * pred[i], low, high);
    const double mean = static_cast<double>(row.c0) * x_hat + static_cast<double>(row.cx) * x_t[i];
    out[i] = static_cast<float>(-log_bin(x_start[i], mean, 0.5 * log_p[i]));
  }
}

void set_log_variances(
    float lower, float upper, const float* __restrict__ variance, int64_t size, float* __restrict__ log_p) {
  for (int64_t i = 0; i < size; ++i) log_p[i] = lower + (variance[i] + 1.0f) * 0.5f * (upper - lower);
}

}  // namespace

void run(const VlbTerms& v) {
  std::vector<double> sums(v.shape.samples);
  for_each_run(v.shape, sums.data(), [&](int64_t n, int64_t index, int64_t size, const float*) {
    alignas(64) float x_buffer[tile_size], pred_buffer[tile_size], log_p[tile_size], out[tile_size];
    const float* columns = v.rows + v.columns * v.t[n];
    const Row& row = reinterpret_cast<const Row&>(*columns);
    if (v.variance) {
      set_log_variances(columns[6], columns[7], load(v.variance, v.pred_type, index, size, out), size, log_p);
    } else {
      std::fill(log_p, log_p + size, row.log_p);
    }
    const float* x_start = load(v.x_start, v.x_is_bytes ? Type::u8 : Type::f32, index, size, x_buffer);
    const float* pred = load(v.pred, v.pred_type, index, size, pred_buffer);
    const auto set = v.t[n] == 0 ? set_decoder : set_divergences;
    set(row, v.low, v.high, x_start, v.x_t + index, pred, log_p, size, out);
    return sum(out, size);
  });
  for (int64_t n = 0; n < v.shape.samples; ++n) v.out[n] = static_cast<float>(sums[n]);
}

}  // namespace ddpm_fast::cpu
