// The gradients of group_norm_silu, from x, the statistics and the output's gradient: one launch sums over the pixels
// of each channel, a small one joins slices, groups and samples, and one reads both tensors again and writes x's
// gradient.
#include "cuda/group_norm.cuh"
#include "cuda/launch.h"

namespace ddpm_fast {

struct Sums {
  float g, gx;  // of the gradient before the affine map, and of it times the normalised x
};

struct BackwardPlan {
  Slices sums;  // of pixels
  Parts output;
  int64_t group_channels;
  Sums* of_slice;  // (samples, slices, channels)
  Sums* of_group;  // (samples, groups): means
};

static BackwardPlan plan_backward(const GroupNormSiluBackward& g) {
  BackwardPlan plan{};
  plan.group_channels = g.shape.channels / g.groups;
  plan.sums = slices_of(g.shape.plane, g.shape.planar ? 4 : g.shape.channels);  // planar: a warp has a slice
  plan.output = parts_of(g.shape);
  plan.of_slice = reinterpret_cast<Sums*>(g.workspace);
  plan.of_group = plan.of_slice + g.shape.samples * plan.sums.count * g.shape.channels;
  return plan;
}

int64_t workspace_size(const GroupNormSiluBackward& g) {
  if (g.groups == 0) return 0;
  return 2 * g.shape.samples * (plan_backward(g).sums.count * g.shape.channels + g.groups);
}

// The gradient by z = x_hat factor + term.
__device__ __forceinline__ float through_silu(float grad, float difference, const Map& map, bool silu) {
  if (!silu) return grad;
  const float z = fmaf(difference, map.factor, map.term), s = sigmoid(z);
  return grad * s * fmaf(z, 1.0f - s, 1.0f);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    sums_kernel(const __grid_constant__ GroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  __shared__ Sums of_thread[kNormThreads * kWidth];
  const int64_t sample = sample_of_block(), channels = g.shape.channels;
  if (sample >= g.shape.samples) return;
  const int64_t begin = blockIdx.x * plan.sums.per_slice, end = min(begin + plan.sums.per_slice, g.shape.plane);
  const int64_t start = sample * size_of(g.shape);
  Sums* out = plan.of_slice + (sample * plan.sums.count + blockIdx.x) * channels;
  const Seat at = seat(channels / kWidth);

  for (int64_t base = 0; base < channels; base += at.columns * kWidth) {
    const int64_t c = base + at.column * kWidth;
    float sum_g[kWidth] = {}, sum_gx[kWidth] = {};
    if (c < channels && at.row < at.rows) {
      Map map[kWidth];
      float rstd[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) map[j] = map_of(g, plan.group_channels, sample, c + j, rstd[j]);
      for (int64_t p = begin + at.row; p < end; p += at.rows) {
        float x[kWidth], grad[kWidth];
        load<T>(g.x, start + p * channels + c, x);
        load<T>(g.grad, start + p * channels + c, grad);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float difference = x[j] - map[j].mean, inner = through_silu(grad[j], difference, map[j], g.silu);
          sum_g[j] += inner;
          sum_gx[j] = fmaf(inner, difference, sum_gx[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum_gx[j] *= rstd[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWidth; ++j) of_thread[j * kNormThreads + threadIdx.x] = {sum_g[j], sum_gx[j]};
    __syncthreads();
    for (int i = threadIdx.x; i < at.columns * kWidth; i += kNormThreads) {
      const int column = i % at.columns, lane = i / at.columns;
      if (base + column * kWidth >= channels) continue;
      const Sums* rows = of_thread + lane * kNormThreads + column;
      Sums total = rows[0];
      for (int y = 1; y < at.rows; ++y) total.g += rows[y * at.columns].g, total.gx += rows[y * at.columns].gx;
      out[base + column * kWidth + lane] = total;
    }
  }
}

// Planar: a warp for each slice of each channel; x counts slices and channels, eight of which share a block.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    planar_sums_kernel(const __grid_constant__ GroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  const int64_t sample = sample_of_block(), channels = g.shape.channels;
  const auto slices = static_cast<uint32_t>(plan.sums.count);
  const uint32_t task = blockIdx.x * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t c = task / slices, slice = task % slices;
  if (sample >= g.shape.samples || c >= channels) return;
  float rstd;
  const Map map = map_of(g, plan.group_channels, sample, c, rstd);
  const int64_t start = sample * size_of(g.shape) + c * g.shape.plane;
  const int64_t begin = slice * plan.sums.per_slice, end = min(begin + plan.sums.per_slice, g.shape.plane);
  float sum_g = 0.0f, sum_gx = 0.0f;
  for (int64_t i = begin + threadIdx.x % kWarp * kWidth; i < end; i += kWarp * kWidth) {
    float x[kWidth], grad[kWidth];
    load<T>(g.x, start + i, x);
    load<T>(g.grad, start + i, grad);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float difference = x[j] - map.mean, inner = through_silu(grad[j], difference, map, g.silu);
      sum_g += inner;
      sum_gx = fmaf(inner, difference, sum_gx);
    }
  }
  sum_g = warp_sum(sum_g), sum_gx = warp_sum(sum_gx) * rstd;
  if (threadIdx.x % kWarp == 0) plan.of_slice[(sample * plan.sums.count + slice) * channels + c] = {sum_g, sum_gx};
}

// The sums of a sample's channel, over its slices.
__device__ __forceinline__ Sums sums_of(
    const GroupNormSiluBackward& g, const BackwardPlan& plan, int64_t sample, int64_t c) {
  const Sums* slice = plan.of_slice + sample * plan.sums.count * g.shape.channels + c;
  Sums total{0.0f, 0.0f};
  for (int64_t i = 0; i < plan.sums.count; ++i, slice += g.shape.channels) total.g += slice->g, total.gx += slice->gx;
  return total;
}

// A warp a group of a sample: its means, and the gradients of scale and shift.
__device__ __forceinline__ void join_group(
    const GroupNormSiluBackward& g, const BackwardPlan& plan, int64_t sample, int64_t group) {
  Sums mean{0.0f, 0.0f};
  for (int64_t k = threadIdx.x % kWarp; k < plan.group_channels; k += kWarp) {
    const int64_t c = group * plan.group_channels + k, at = sample * g.shape.channels + c;
    const Sums s = sums_of(g, plan, sample, c);
    const float factor = affine(g, sample, c).factor;
    mean.g = fmaf(factor, s.g, mean.g), mean.gx = fmaf(factor, s.gx, mean.gx);
    if (!g.scale) continue;
    const float weight = load_as(g.weight, g.parameter_type, c), bias = load_as(g.bias, g.parameter_type, c);
    store_as(g.grad_scale, g.x_type, at, s.gx * weight + s.g * bias);
    store_as(g.grad_shift, g.x_type, at, s.g);
  }
  const auto count = static_cast<float>(plan.group_channels * g.shape.plane);
  mean = {__fdividef(warp_sum(mean.g), count), __fdividef(warp_sum(mean.gx), count)};
  if (threadIdx.x % kWarp == 0) plan.of_group[sample * g.groups + group] = mean;
}

// A block for 32 channels: a warp for every eighth sample, whose sums are added in order.
__device__ __forceinline__ void join_samples(const GroupNormSiluBackward& g, const BackwardPlan& plan, int64_t block) {
  constexpr int kWarps = kNormThreads / kWarp;
  __shared__ Sums of_warp[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c = block * kWarp + lane;
  Sums total{0.0f, 0.0f};
  for (int64_t sample = warp; sample < g.shape.samples && c < g.shape.channels; sample += kWarps) {
    const Sums s = sums_of(g, plan, sample, c);
    const float scale = g.scale ? 1.0f + load_as(g.scale, g.x_type, sample * g.shape.channels + c) : 1.0f;
    total.g = fmaf(scale, s.g, total.g), total.gx = fmaf(scale, s.gx, total.gx);
  }
  of_warp[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || c >= g.shape.channels) return;
  for (int i = 1; i < kWarps; ++i) total.g += of_warp[i][lane].g, total.gx += of_warp[i][lane].gx;
  store_as(g.grad_weight, g.parameter_type, c, total.gx);
  store_as(g.grad_bias, g.parameter_type, c, total.g);
}

// The first blocks of each sample join its groups; after those of the first sample come the ones that join samples.
__global__ void __launch_bounds__(kNormThreads, kNormBlocks) join_sums_kernel(
    const __grid_constant__ GroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan, unsigned group_blocks) {
  const int64_t sample = sample_of_block();
  if (blockIdx.x >= group_blocks) {
    if (sample == 0) join_samples(g, plan, blockIdx.x - group_blocks);
    return;
  }
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  if (sample < g.shape.samples && group < g.groups) join_group(g, plan, sample, group);
}

struct GradientMap {
  Map map;
  float mean_g, slope;  // grad_x = factor g - mean_g - slope (x - mean)
};

template <typename T, int kWidth, bool kPlanar>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    gradient_kernel(const __grid_constant__ GroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  extern __shared__ GradientMap gradient_maps[];
  const int64_t sample = sample_of_block();
  if (sample >= g.shape.samples) return;
  const Part part = part_of_block(g.shape, plan.output);
  for (int64_t i = threadIdx.x; i < part.channels; i += kNormThreads) {
    const int64_t c = part.first_channel + i;
    float rstd;
    const Map map = map_of(g, plan.group_channels, sample, c, rstd);
    const Sums mean =
        plan.of_group[sample * g.groups + static_cast<uint32_t>(c) / static_cast<uint32_t>(plan.group_channels)];
    gradient_maps[i] = {map, rstd * mean.g, rstd * rstd * mean.gx};
  }
  __syncthreads();
  const int64_t start = sample * size_of(g.shape);
  for_vectors<kPlanar, kWidth>(g.shape, part, gradient_maps, [&](int64_t i, const GradientMap(&own)[kWidth]) {
    float x[kWidth], grad[kWidth];
    load<T>(g.x, start + i, x);
    load<T>(g.grad, start + i, grad);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Map& map = own[j].map;
      const float difference = x[j] - map.mean, inner = through_silu(grad[j], difference, map, g.silu);
      x[j] = fmaf(-own[j].slope, difference, fmaf(map.factor, inner, -own[j].mean_g));
    }
    store<T>(g.grad_x, start + i, x);
  });
}

template <typename T, int kWidth, bool kPlanar>
static cudaError_t launch_backward(const GroupNormSiluBackward& g, cudaStream_t stream) {
  const BackwardPlan plan = plan_backward(g);
  const int64_t samples = g.shape.samples, warps = kNormThreads / kWarp;
  if constexpr (kPlanar) {
    const int64_t blocks = divide_up(plan.sums.count * g.shape.channels, warps);
    planar_sums_kernel<T, kWidth><<<grid_of_slices(blocks, samples), kNormThreads, 0, stream>>>(g, plan);
  } else {
    sums_kernel<T, kWidth><<<grid_of_slices(plan.sums.count, samples), kNormThreads, 0, stream>>>(g, plan);
  }
  const int64_t group_blocks = divide_up(g.groups, warps), blocks = group_blocks + divide_up(g.shape.channels, kWarp);
  join_sums_kernel<<<grid_of_slices(blocks, samples), kNormThreads, 0, stream>>>(
      g, plan, static_cast<unsigned>(group_blocks));
  const size_t shared = plan.output.channels * sizeof(GradientMap);
  if (const auto error = allow_shared(gradient_kernel<T, kWidth, kPlanar>, shared)) return error;
  gradient_kernel<T, kWidth, kPlanar>
      <<<grid_of_slices(plan.output.count, samples), kNormThreads, shared, stream>>>(g, plan);
  return cudaGetLastError();
}

// A join of no slices writes the zeros that are the parameters' gradients where x is empty.
cudaError_t launch(const GroupNormSiluBackward& g, cudaStream_t stream) {
  if (g.shape.channels == 0) return cudaSuccess;
  if (g.shape.samples == 0 || g.shape.plane == 0) {
    const auto blocks = static_cast<unsigned>(divide_up(g.shape.channels, kWarp));
    join_sums_kernel<<<blocks, kNormThreads, 0, stream>>>(g, BackwardPlan{}, 0u);
    return cudaGetLastError();
  }
  return with_norm_layout(g.x_type, g.shape, {g.x, g.grad, g.grad_x}, [&](auto t, auto width, auto planar) {
    return launch_backward<decltype(t), decltype(width)::value, decltype(planar)::value>(g, stream);
  });
}

}  // namespace ddpm_fast
