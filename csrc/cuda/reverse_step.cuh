// One step of any sampler: reads x, pred and the optional inputs once, writes x_next and the optional outputs once.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include "cuda/noise.cuh"
#include "cuda/tile.cuh"

namespace ddpm_fast {

// Optional tensors are tested for at run time: the branch is uniform, and taken once for each tile.
template <typename X, typename Pred, class Tile>
__device__ __forceinline__ void step_tiles(const ReverseStep& r, int64_t tiles, int64_t tiles_per_block) {
  constexpr int kSize = Tile::kSize;
  const int64_t sample = sample_of_thread();
  if (sample >= r.shape.samples) return;
  const int64_t given = r.step[r.step_is_shared ? 0 : sample];
  const bool known = static_cast<uint64_t>(given) < static_cast<uint64_t>(r.steps);
  const int64_t step = known ? given : 0;
  const float* row = r.rows + step * r.columns;
  const float u = row[0], w = row[1], A = row[2], B = row[3], C = row[4], sigma = row[5];
  float low = r.low, high = r.high;
  if (r.bounds) low = r.bounds[2 * sample], high = r.bounds[2 * sample + 1];
  Key key{};
  if (r.keys) key = load_key(r.keys, (r.key_steps == 1 ? 0 : step) * r.shape.samples + sample);

  for_tiles(tiles, tiles_per_block, [&](int64_t index) {
    const Tile tile(r.shape, r.keys && r.shape.planar, {sample, index});
    float x[kSize], y[kSize];
    tile.template load<X>(r.x, x);
    tile.template load<Pred>(r.pred, y);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      y[j] = device_clip(u * x[j] + w * y[j], low, high);
      x[j] = A * x[j] + B * y[j];
    }
    if (r.x_start_prev) {
      tile.template exchange<X>(r.x_start_prev, r.x_start, y);
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] += C * y[j];
    } else if (r.x_start) {
      tile.template store<X>(r.x_start, y);
    }
    if (r.keys || r.noise) {
      if (r.keys)
        normals(key, index * (kSize / 4), y);
      else
        tile.template load<X>(r.noise, y);
      if (r.variance) {
        float v[kSize];
        tile.template load<Pred>(r.variance, v);
        const float lower = row[6], upper = row[7];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float learned = expf(0.5f * (lower + (v[j] + 1.0f) * 0.5f * (upper - lower)));
          x[j] += (sigma > 0.0f ? learned : 0.0f) * y[j];
        }
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) x[j] += sigma * y[j];
      }
    }
    tile.template store<X>(r.x_next, x);
    if (r.model_input) tile.template store<Pred>(r.model_input, x);
  });
  CUDA_KERNEL_ASSERT(known && "reverse_step: step is outside [0, K)");
}

}  // namespace ddpm_fast
