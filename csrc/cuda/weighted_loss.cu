// Reads pred (and x_start; the noise is made again from its key), writes the gradient, and adds up the loss on the way.
#include <torch/headeronly/macros/Macros.h>

#include "cuda/launch.h"
#include "cuda/noise.cuh"
#include "cuda/sample_sum.cuh"

namespace ddpm_fast {

// Errors become slopes; returns the sum of the losses.
template <LossType type, class Tile>
__device__ __forceinline__ float losses(const Tile& tile, float (&error)[Tile::kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < Tile::kSize; ++j) {
    const Loss loss = loss_of<type>(error[j]);
    if (tile.has(j)) sum += loss.value;
    error[j] = loss.slope;
  }
  return sum;
}

template <typename Pred, typename Data, class Tile>
__global__ void __launch_bounds__(kSumThreads, 2)
    weighted_loss_kernel(const __grid_constant__ WeightedLoss l, int64_t tiles, int64_t tiles_per_segment) {
  constexpr int kSize = Tile::kSize;
  const int64_t sample = sample_of_thread();
  const bool present = sample < l.shape.samples;
  const int64_t t = present ? l.t[sample] : 0;
  const bool known = static_cast<uint64_t>(t) < static_cast<uint64_t>(l.timesteps);
  const float* row = l.rows + (known ? 3 * t : 0);
  // A sample without elements has the loss 0.
  const float p = row[0], q = row[1], weight = row[2] / static_cast<float>(max(size_of(l.shape), int64_t{1}));
  const float slope_factor = (l.upstream && present ? l.scale * l.upstream[sample] : l.scale) * weight;
  Key key{};
  if (l.keys && present) key = load_key(l.keys, sample);

  float sum = 0.0f;
  for_tiles(present ? tiles : 0, tiles_per_segment, [&](int64_t index) {
    const Tile tile(l.shape, l.keys && l.shape.planar, {sample, index});
    float error[kSize], target[kSize], noise[kSize];
    tile.template load<Pred>(l.pred, error);
    if (l.x_start) {
      if (l.x_is_bytes)
        tile.template load<uint8_t>(l.x_start, target);
      else
        tile.template load<Data>(l.x_start, target);
    }
    if (l.keys) normals(key, index * (kSize / 4), noise);
    if (l.noise) tile.template load<Data>(l.noise, noise);
    if (!l.keys && !l.noise) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) error[j] -= p * target[j];
    } else if (!l.x_start) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) error[j] -= q * noise[j];
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) error[j] -= p * target[j] + q * noise[j];
    }
    if (l.loss_type == LossType::l2) sum += losses<LossType::l2>(tile, error);
    if (l.loss_type == LossType::l1) sum += losses<LossType::l1>(tile, error);
    if (l.loss_type == LossType::huber) sum += losses<LossType::huber>(tile, error);
    if (!l.grad) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) error[j] *= slope_factor;
    tile.template store<Pred>(l.grad, error);
  });

  sum = row_sum(sum);
  if (threadIdx.x == 0 && present) {
    float* out = gridDim.x > 1 ? l.workspace + sample * gridDim.x + blockIdx.x : l.loss + sample;
    *out = sum * (l.scale * weight);
  }
  CUDA_KERNEL_ASSERT(known && "weighted_loss: t is outside [0, T)");
}

template <typename F>
static void with_loss_tile(const WeightedLoss& l, const F& f) {
  with_tile<true>(l.shape, l.keys && l.shape.planar, {l.pred, l.x_start, l.noise, l.grad}, [&](auto tag) {
    const int64_t tiles = divide_up(size_of(l.shape), decltype(tag)::type::kSize);
    f(tag, tiles, plan_sum(tiles));
  });
}

int64_t workspace_size(const WeightedLoss& l) {
  int64_t size = 0;
  with_loss_tile(l, [&](auto, int64_t, const SumPlan& plan) { size = plan.segments > 1 ? plan.segments : 0; });
  return l.shape.samples * size;
}

cudaError_t launch(const WeightedLoss& l, cudaStream_t stream) {
  if (l.shape.samples == 0) return cudaSuccess;
  return with_wide_and_type(l.data_type, l.pred_type, [&](auto data, auto pred) {
    with_loss_tile(l, [&](auto tag, int64_t tiles, const SumPlan& plan) {
      const Grid grid = grid_of_segments(l.shape.samples, plan);
      weighted_loss_kernel<decltype(pred), decltype(data), typename decltype(tag)::type>
          <<<grid.blocks, grid.threads, 0, stream>>>(l, tiles, plan.tiles_per_segment);
      if (plan.segments > 1) sum_segments(l.workspace, l.loss, l.shape.samples, plan.segments, stream);
    });
    return cudaGetLastError();
  });
}

}  // namespace ddpm_fast
