// The terms of the variational bound: reads x_start, x_t and pred once, writes a number a sample.
#include <torch/headeronly/macros/Macros.h>

#include "cuda/launch.h"
#include "cuda/sample_sum.cuh"

namespace ddpm_fast {

// ln of the normal's mass in the bin of width 2 / 255 around x, as in the reference: Ho et al. (2020), eq. 13.
__device__ __forceinline__ float log_bin(float x, float mean, float log_sigma) {
  const float inverse = expf(-log_sigma) * 0.70710678118654752f;  // in units of sqrt(2) sigma
  float upper = (x - mean + 1.0f / 255.0f) * inverse, lower = (x - mean - 1.0f / 255.0f) * inverse;
  bool open_left = x < -0.999f, open_right = x > 0.999f;
  if (upper + lower < 0.0f) {  // erfc is precise in the right tail
    const float mirrored = -upper;
    upper = -lower, lower = mirrored;
    const bool left = open_left;
    open_left = open_right, open_right = left;
  }
  const float mass = 0.5f * ((open_left ? 2.0f : erfcf(lower)) - (open_right ? 0.0f : erfcf(upper)));
  return logf(mass < 1e-12f ? 1e-12f : mass);
}

template <typename Pred, class Tile>
__global__ void __launch_bounds__(kSumThreads, 2)
    vlb_terms_kernel(const __grid_constant__ VlbTerms v, int64_t tiles, int64_t tiles_per_segment) {
  constexpr int kSize = Tile::kSize;
  const int64_t sample = sample_of_thread();
  const bool present = sample < v.shape.samples;
  const int64_t t = present ? v.t[sample] : 0;
  const bool known = static_cast<uint64_t>(t) < static_cast<uint64_t>(v.timesteps);
  const float* row = v.rows + (known ? t * v.columns : 0);
  const float u = row[0], w = row[1], c0 = row[2], cx = row[3], log_q = row[4];

  float sum = 0.0f;
  for_tiles(present ? tiles : 0, tiles_per_segment, [&](int64_t index) {
    const Tile tile(v.shape, false, {sample, index});
    float x_start[kSize], x_t[kSize], x_hat[kSize], log_p[kSize];
    if (v.x_is_bytes)
      tile.template load<uint8_t>(v.x_start, x_start);
    else
      tile.template load<float>(v.x_start, x_start);
    tile.template load<float>(v.x_t, x_t);
    tile.template load<Pred>(v.pred, x_hat);
    if (v.variance) tile.template load<Pred>(v.variance, log_p);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      x_hat[j] = device_clip(u * x_t[j] + w * x_hat[j], v.low, v.high);
      log_p[j] = v.variance ? row[6] + (log_p[j] + 1.0f) * 0.5f * (row[7] - row[6]) : row[5];
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      float term;
      if (t == 0) {
        term = -log_bin(x_start[j], c0 * x_hat[j] + cx * x_t[j], 0.5f * log_p[j]);
      } else {
        const float error = c0 * (x_start[j] - x_hat[j]);
        term = 0.5f * (log_p[j] - log_q + expm1f(log_q - log_p[j]) + error * error * expf(-log_p[j]));
      }
      if (tile.has(j)) sum += term;
    }
  });

  sum = row_sum(sum);
  if (threadIdx.x == 0 && present)
    (gridDim.x > 1 ? v.workspace + sample * gridDim.x + blockIdx.x : v.out + sample)[0] = sum;
  CUDA_KERNEL_ASSERT(known && "vlb_terms: t is outside [0, T)");
}

template <typename F>
static void with_vlb_tile(const VlbTerms& v, const F& f) {
  with_linear_tile(size_of(v.shape), {v.x_start, v.x_t, v.pred, v.variance}, [&](auto tag) {
    const int64_t tiles = divide_up(size_of(v.shape), decltype(tag)::type::kSize);
    f(tag, tiles, plan_sum(tiles));
  });
}

int64_t workspace_size(const VlbTerms& v) {
  int64_t size = 0;
  with_vlb_tile(v, [&](auto, int64_t, const SumPlan& plan) { size = plan.segments > 1 ? plan.segments : 0; });
  return v.shape.samples * size;
}

cudaError_t launch(const VlbTerms& v, cudaStream_t stream) {
  if (v.shape.samples == 0) return cudaSuccess;
  return with_float_type(v.pred_type, [&](auto pred) {
    with_vlb_tile(v, [&](auto tag, int64_t tiles, const SumPlan& plan) {
      const Grid grid = grid_of_segments(v.shape.samples, plan);
      vlb_terms_kernel<decltype(pred), typename decltype(tag)::type>
          <<<grid.blocks, grid.threads, 0, stream>>>(v, tiles, plan.tiles_per_segment);
      if (plan.segments > 1) sum_segments(v.workspace, v.out, v.shape.samples, plan.segments, stream);
    });
    return cudaGetLastError();
  });
}

}  // namespace ddpm_fast
