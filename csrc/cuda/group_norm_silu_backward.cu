// The gradients of group_norm_silu, from x (or the sum that was normalised), the statistics and the output's gradient.
//
// Where whole groups of a sample fit into a block, one launch reads both and writes the gradient of x, and a small one
// adds up the parameters' gradients of all samples. Otherwise one launch sums over the pixels of each channel, a small
// one joins slices and channels, and one reads both tensors again and writes; it has blocks of its own that join the
// samples.
#include "cuda/group_norm_slab.cuh"
#include "cuda/launch.h"

namespace ddpm_fast {

constexpr int kHeld = 4;  // vectors of a slab's thread, of x and of the gradient

struct Sums {
  float g, gx;  // of the gradient before the affine map, and of it times the normalised x
};

struct BiasSums {
  float x, grad;  // of x less the mean, and of the sum's own gradient
};

struct BackwardPlan {
  Slices sums;  // of pixels
  Parts output;
  int64_t group_channels;
  Sums* of_slice;           // (samples, slices, channels)
  Sums* of_channel;         // (samples, channels)
  Sums* of_group;           // (samples, groups): means
  BiasSums* bias_of_slice;  // (samples, slices, channels), where input_bias is given and there is no slab
  float* of_bias;           // (samples, g.channels): gradients of an input_bias that the samples share
};

static Slab slab_for(const AddGroupNormSiluBackward& g) {
  if (g.shape.samples == 0 || size_of(g.shape) == 0) return {};
  const bool fits = g.input_bias_stride % 8 == 0 &&
      aligned({g.grad, g.grad_sum, g.x, g.input_bias, g.weight, g.bias, g.scale, g.shift, g.grad_x, g.grad_skip});
  return fits ? slab_of(g.shape, g.channels, g.groups, g.x_type, kHeld) : Slab{};
}

static bool shares_bias(const AddGroupNormSiluBackward& g) { return g.input_bias && g.input_bias_stride == 0; }

// The plan, and how many floats of workspace it takes.
static BackwardPlan plan_backward(const AddGroupNormSiluBackward& g, bool slab, int64_t& floats) {
  BackwardPlan plan{};
  floats = 0;
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(g.workspace + floats);
    floats += count * static_cast<int64_t>(sizeof(*array) / sizeof(float));
  };
  if (g.groups == 0) return plan;
  const int64_t n = g.shape.samples, channels = g.shape.channels;
  plan.group_channels = channels / g.groups;
  plan.output = parts_of(g.shape);
  take(plan.of_channel, n * channels);
  if (shares_bias(g)) take(plan.of_bias, n * g.channels);
  if (slab) return plan;
  plan.sums = slices_of(g.shape.plane, g.shape.planar ? 4 : channels);  // planar: a warp has a slice
  take(plan.of_slice, n * plan.sums.count * channels);
  take(plan.of_group, n * g.groups);
  if (g.input_bias) take(plan.bias_of_slice, n * plan.sums.count * channels);
  return plan;
}

int64_t workspace_size(const AddGroupNormSiluBackward& g) {
  int64_t floats;
  plan_backward(g, slab_for(g).count > 0, floats);
  return floats;
}

int64_t workspace_size(const GroupNormSiluBackward& g) { return workspace_size(with_additions(g)); }

// The gradient by z = x_hat factor + term.
__device__ __forceinline__ float through_silu(float grad, float difference, float factor, float term, bool silu) {
  if (!silu) return grad;
  const float z = fmaf(difference, factor, term), s = sigmoid(z);
  return grad * s * fmaf(z, 1.0f - s, 1.0f);
}

// Where the gradient of h goes, from a channel and pixel of a channels-last sample on, and how far apart pixels are.
template <typename T>
struct Target {
  T* data;
  int stride;
};

template <typename T>
__device__ __forceinline__ Target<T> target_of(
    const AddGroupNormSiluBackward& g, int64_t sample, int64_t c, int64_t pixel) {
  const bool own = c < g.channels;
  const int64_t stride = own ? g.channels : g.shape.channels - g.channels;
  T* data = static_cast<T*>(own ? g.grad_x : g.grad_skip);
  return {data + (sample * g.shape.plane + pixel) * stride + (own ? c : c - g.channels), static_cast<int>(stride)};
}

// Adds up what the rows of a block have for each channel: of_thread[lane][thread].
template <int kWidth, typename Pair>
__device__ __forceinline__ void sum_rows(const Seat& at, int64_t base, int64_t channels, const float (&a)[kWidth],
    const float (&b)[kWidth], Pair* of_thread, Pair* out) {
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kWidth; ++j) of_thread[j * kNormThreads + threadIdx.x] = {a[j], b[j]};
  __syncthreads();
  for (int i = threadIdx.x; i < at.columns * kWidth; i += kNormThreads) {
    const int column = i % at.columns, lane = i / at.columns;
    if (base + column * kWidth >= channels) continue;
    const float2* rows = reinterpret_cast<const float2*>(of_thread) + lane * kNormThreads + column;
    float2 total = rows[0];
    for (int y = 1; y < at.rows; ++y) total.x += rows[y * at.columns].x, total.y += rows[y * at.columns].y;
    out[base + column * kWidth + lane] = {total.x, total.y};
  }
}

template <typename T, int kWidth, bool kBias>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    sums_kernel(const __grid_constant__ AddGroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  constexpr int kCount = kBias ? 1 : kInFlight / 2;  // of each of two tensors; fewer where registers are scarce
  __shared__ float2 of_thread[kNormThreads * kWidth];
  const int64_t sample = sample_of_block(), channels = g.shape.channels;
  if (sample >= g.shape.samples) return;
  const int64_t begin = blockIdx.x * plan.sums.per_slice, end = min(begin + plan.sums.per_slice, g.shape.plane);
  const int pixels = static_cast<int>(end - begin);
  const int64_t slice = (sample * plan.sums.count + blockIdx.x) * channels;
  const Seat at = seat(channels / kWidth);

  for (int64_t base = 0; base < channels; base += at.columns * kWidth) {
    const int64_t c = base + at.column * kWidth;
    float sum_g[kWidth] = {}, sum_gx[kWidth] = {}, sum_x[kWidth] = {}, sum_grad[kWidth] = {};
    if (c < channels && at.row < at.rows) {
      Map map[kWidth];
      float rstd;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) map[j] = map_of(g, plan.group_channels, sample, c + j, rstd);
      Summands<T, kWidth> summands(g, sample, c, begin + at.row);
      const int64_t first = (sample * g.shape.plane + begin + at.row) * channels + c;
      for (int p = at.row; p < pixels; p += kCount * at.rows) {
        const int count = min((pixels - p + at.rows - 1) / at.rows, kCount);
        const int64_t offset = first + static_cast<int64_t>(p - at.row) * channels;
        Vector<T, kWidth> x[kCount], grad[kCount];
        summands.read(static_cast<const T*>(g.grad) + offset, count, at.rows, grad);
        if constexpr (kBias)
          summands.load(count, at.rows, x);
        else
          summands.read(summands.x, count, at.rows, x);
        summands.advance(kCount * at.rows);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (k >= count) break;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const float difference = to_float(x[k].element[j]) - map[j].mean;
            const float inner =
                through_silu(to_float(grad[k].element[j]), difference, map[j].factor, map[j].term, g.silu);
            sum_g[j] += inner;
            sum_gx[j] = fmaf(inner, difference, sum_gx[j]);
            if constexpr (kBias) sum_x[j] += difference;
          }
        }
      }
      if (kBias && g.grad_sum) {
        constexpr int kCount = kInFlight / 2;
        for (int p = at.row; p < pixels; p += kCount * at.rows) {
          const int count = min((pixels - p + at.rows - 1) / at.rows, kCount);
          Vector<T, kWidth> grad[kCount];
          const int64_t offset = first + static_cast<int64_t>(p - at.row) * channels;
          summands.read(static_cast<const T*>(g.grad_sum) + offset, count, at.rows, grad);
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) sum_grad[j] += to_float(grad[k].element[j]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        sum_gx[j] *=
            g.rstd[sample * g.groups + static_cast<uint32_t>(c + j) / static_cast<uint32_t>(plan.group_channels)];
    }
    sum_rows<kWidth>(at, base, channels, sum_g, sum_gx, reinterpret_cast<Sums*>(of_thread), plan.of_slice + slice);
    if constexpr (kBias) {
      auto* of_bias = reinterpret_cast<BiasSums*>(of_thread);
      sum_rows<kWidth>(at, base, channels, sum_x, sum_grad, of_bias, plan.bias_of_slice + slice);
    }
  }
}

// Planar: a warp for each slice of each channel; x counts slices and channels, eight of which share a block.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    planar_sums_kernel(const __grid_constant__ AddGroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
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
      const float difference = x[j] - map.mean;
      const float inner = through_silu(grad[j], difference, map.factor, map.term, g.silu);
      sum_g += inner;
      sum_gx = fmaf(inner, difference, sum_gx);
    }
  }
  sum_g = warp_sum(sum_g), sum_gx = warp_sum(sum_gx) * rstd;
  if (threadIdx.x % kWarp == 0) plan.of_slice[(sample * plan.sums.count + slice) * channels + c] = {sum_g, sum_gx};
}

// The gradients of scale and shift of one channel.
__device__ __forceinline__ void write_modulation(
    const AddGroupNormSiluBackward& g, int64_t sample, int64_t c, const Sums& s) {
  if (!g.scale) return;
  const int64_t at = sample * g.shape.channels + c;
  const float weight = load_as(g.weight, g.parameter_type, c), bias = load_as(g.bias, g.parameter_type, c);
  store_as(g.grad_scale, g.x_type, at, s.gx * weight + s.g * bias);
  store_as(g.grad_shift, g.x_type, at, s.g);
}

__device__ __forceinline__ void write_input_bias(
    const AddGroupNormSiluBackward& g, const BackwardPlan& plan, int64_t sample, int64_t c, float value) {
  const int64_t at = sample * g.channels + c;
  if (plan.of_bias)
    plan.of_bias[at] = value;
  else
    store_as(g.grad_input_bias, g.input_bias_type, at, value);
}

// A warp a group of a sample: the sums of its channels over all slices, its means, and the gradients of a sample's own
// parameters. The lanes divide the slices of as many channels as there is room for.
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    join_slices_kernel(const __grid_constant__ AddGroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  const int64_t sample = sample_of_block(), channels = g.shape.channels, slices = plan.sums.count;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  if (sample >= g.shape.samples || group >= g.groups) return;
  int each = 1;  // lanes of a channel
  while (each < slices && each < kWarp) each *= 2;
  const int lane = threadIdx.x % kWarp, first = lane % each, together = kWarp / each;
  const auto over_slices = [&](const auto* of_slice, int64_t c, bool inside) {
    const auto* values = reinterpret_cast<const float2*>(of_slice) + sample * slices * channels + c;
    float2 total{0.0f, 0.0f};
    for (int64_t i = first; i < slices && inside; i += each)
      total.x += values[i * channels].x, total.y += values[i * channels].y;
    for (int distance = each / 2; distance > 0; distance /= 2) {
      total.x += __shfl_xor_sync(~0u, total.x, distance);
      total.y += __shfl_xor_sync(~0u, total.y, distance);
    }
    return total;
  };

  float mean_g = 0.0f, mean_gx = 0.0f;
  for (int64_t base = 0; base < plan.group_channels; base += together) {
    const int64_t k = base + lane / each, c = group * plan.group_channels + k;
    const bool inside = k < plan.group_channels;
    const float2 total = over_slices(plan.of_slice, c, inside);
    if (!inside || first != 0) continue;
    const Sums s{total.x, total.y};
    plan.of_channel[sample * channels + c] = s;
    write_modulation(g, sample, c, s);
    const float factor = affine(g, sample, c).factor;
    mean_g = fmaf(factor, s.g, mean_g), mean_gx = fmaf(factor, s.gx, mean_gx);
  }
  const auto plane = static_cast<float>(g.shape.plane), count = static_cast<float>(plan.group_channels) * plane;
  mean_g = __fdividef(warp_sum(mean_g), count), mean_gx = __fdividef(warp_sum(mean_gx), count);
  if (lane == 0) plan.of_group[sample * g.groups + group] = {mean_g, mean_gx};
  if (!g.input_bias) return;
  // The sum of the gradients of x over the pixels, as gradient_kernel has them.
  __syncwarp();
  const float rstd = g.rstd[sample * g.groups + group];
  for (int64_t base = 0; base < plan.group_channels; base += together) {
    const int64_t k = base + lane / each, c = group * plan.group_channels + k;
    const bool inside = k < plan.group_channels && c < g.channels;
    const float2 of_bias = over_slices(plan.bias_of_slice, c, inside);
    const float2 of_channel = over_slices(plan.of_slice, c, inside);
    if (!inside || first != 0) continue;
    const float through = rstd * (affine(g, sample, c).factor * of_channel.x - plane * mean_g);
    write_input_bias(g, plan, sample, c, through - rstd * rstd * mean_gx * of_bias.x + of_bias.y);
  }
}

// A block for 32 channels: a warp for every eighth sample, whose sums are added in order.
__device__ __forceinline__ void join_samples(
    const AddGroupNormSiluBackward& g, const BackwardPlan& plan, int64_t block, float (*of_warp)[3][kWarp]) {
  constexpr int kWarps = kNormThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c = block * kWarp + lane;
  const bool inside = c < g.shape.channels, has_bias = plan.of_bias && c < g.channels;
  float total[3] = {};
  for (int64_t sample = warp; sample < g.shape.samples && inside; sample += kWarps) {
    const Sums s = plan.of_channel[sample * g.shape.channels + c];
    const float scale = g.scale ? 1.0f + load_as(g.scale, g.x_type, sample * g.shape.channels + c) : 1.0f;
    total[0] = fmaf(scale, s.g, total[0]), total[1] = fmaf(scale, s.gx, total[1]);
    if (has_bias) total[2] += plan.of_bias[sample * g.channels + c];
  }
#pragma unroll
  for (int v = 0; v < 3; ++v) of_warp[warp][v][lane] = total[v];
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int i = 1; i < kWarps; ++i) {
#pragma unroll
    for (int v = 0; v < 3; ++v) total[v] += of_warp[i][v][lane];
  }
  store_as(g.grad_bias, g.parameter_type, c, total[0]);
  store_as(g.grad_weight, g.parameter_type, c, total[1]);
  if (has_bias) store_as(g.grad_input_bias, g.input_bias_type, c, total[2]);
}

__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    join_samples_kernel(const __grid_constant__ AddGroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  __shared__ float of_warp[kNormThreads / kWarp][3][kWarp];
  join_samples(g, plan, blockIdx.x, of_warp);
}

struct GradientMap {
  Map map;
  float mean_g, slope;  // grad_x = factor g - mean_g - slope (x - mean)
};

// The first blocks of each sample write the gradient of x; after those of the first sample come the ones that join
// samples.
template <typename T, int kWidth, bool kPlanar>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    gradient_kernel(const __grid_constant__ AddGroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan) {
  constexpr int kCount = kInFlight / 2;  // of each of two tensors, or three
  extern __shared__ GradientMap gradient_maps[];
  __shared__ float of_warp[kNormThreads / kWarp][3][kWarp];
  const int64_t sample = sample_of_block();
  if (sample >= g.shape.samples) return;
  if (blockIdx.x >= plan.output.count) {
    if (sample == 0) join_samples(g, plan, blockIdx.x - plan.output.count, of_warp);
    return;
  }
  const Part part = part_of_block(g.shape, plan.output);
  const bool adds = g.input_bias && !g.kept;
  auto* biases = reinterpret_cast<float*>(gradient_maps + part.channels);  // of the input, if `adds`
  for (int64_t i = threadIdx.x; i < part.channels; i += kNormThreads) {
    const int64_t c = part.first_channel + i;
    float rstd;
    const Map map = map_of(g, plan.group_channels, sample, c, rstd);
    const Sums mean =
        plan.of_group[sample * g.groups + static_cast<uint32_t>(c) / static_cast<uint32_t>(plan.group_channels)];
    gradient_maps[i] = {map, rstd * mean.g, rstd * rstd * mean.gx};
    if (adds) biases[i] = load_as(g.input_bias, g.input_bias_type, sample * g.input_bias_stride + c);
  }
  __syncthreads();
  const int64_t channels = g.shape.channels, plane = g.shape.plane, start = sample * size_of(g.shape);
  for_vectors<kPlanar, kWidth>(g.shape, part, gradient_maps, [&](const Run& run, const GradientMap(&own)[kWidth]) {
    Target<T> target{static_cast<T*>(g.grad_x) + start + run.channel * plane + run.pixel, 1};
    if constexpr (!kPlanar) target = target_of<T>(g, sample, run.channel, run.pixel);
#pragma unroll 1
    for (int half = 0; half < run.count; half += kCount) {
      Vector<T, kWidth> held[kCount], grads[kCount], more[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (half + k >= run.count) continue;
        const int64_t i = start + run.offset<kPlanar>(channels, plane, half + k);
        held[k] = *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(g.x) + i);
        grads[k] = *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(g.grad) + i);
        if (g.grad_sum) more[k] = *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(g.grad_sum) + i);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (half + k >= run.count) continue;
        Vector<T, kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          float x = to_float(held[k].element[j]);
          if (adds) x = to_float(from_float<T>(x + biases[run.channel - part.first_channel + j]));
          const Map& map = own[j].map;
          const float difference = x - map.mean;
          const float inner = through_silu(to_float(grads[k].element[j]), difference, map.factor, map.term, g.silu);
          float value = fmaf(-own[j].slope, difference, fmaf(map.factor, inner, -own[j].mean_g));
          if (g.grad_sum) value += to_float(more[k].element[j]);
          out.element[j] = from_float<T>(value);
        }
        store(target.data + (half + k) * run.step * target.stride, out);
      }
    }
  });
}

// Adds up the values of the block for each channel of the slab, in `shared`; kValues for each of them are then in
// of_channel, channel by channel.
template <int kValues, int kWidth>
__device__ __forceinline__ void sum_channels(
    const Slab& slab, const SlabSeat& at, const float (&own)[kValues][kWidth], float* shared, float* of_channel) {
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float sum = column_sum(own[v][j], slab, at.row);
      if (at.lane < slab.columns) shared[((at.column * kWidth + j) * kValues + v) * slab.warps + at.warp] = sum;
    }
  }
  __syncthreads();
  for (int c = at.warp; c < slab.channels; c += slab.warps) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const float sum = warp_sum(at.lane < slab.warps ? shared[(c * kValues + v) * slab.warps + at.lane] : 0.0f);
      if (at.lane == 0) of_channel[c * kValues + v] = sum;
    }
  }
  __syncthreads();
}

// All of a slab, except that the samples are not joined.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
    slab_gradient_kernel(const __grid_constant__ AddGroupNormSiluBackward g, const __grid_constant__ BackwardPlan plan,
        const __grid_constant__ Slab slab) {
  constexpr int kWidth = 16 / sizeof(T);
  extern __shared__ float slab_sums[];
  const int64_t sample = sample_of_block(), channels = g.shape.channels;
  if (sample >= g.shape.samples) return;
  const SlabSeat at(slab, g.shape, kWidth);
  float* of_channel = slab_sums + 2 * slab.channels * slab.warps;  // (channels, 2)
  float* of_group = of_channel + 2 * slab.channels;                // (groups, 2)
  Vector<T, kWidth> x[kHeld], grad[kHeld];
  const Summands<T, kWidth> summands(g, sample, at.channel, at.pixel);
  const int64_t first = (sample * g.shape.plane + at.pixel) * channels + at.channel;
  summands.read(static_cast<const T*>(g.grad) + first, at.count, at.step, grad);
  summands.load(at.count, at.step, x);
  convert_again(x), convert_again(grad);
  float mean[2], rstd[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int64_t group = sample * g.groups + at.first_group + min(at.group + s, at.groups - 1);
    mean[s] = g.mean[group], rstd[s] = g.rstd[group];
  }
  float factor[kWidth], term[kWidth];
  load_affine<T>(g, sample, at.channel, factor, term);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) factor[j] *= j < at.split ? rstd[0] : rstd[1];

  float sums[2][kWidth] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= at.count) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float difference = to_float(x[k].element[j]) - (j < at.split ? mean[0] : mean[1]);
      const float inner = through_silu(to_float(grad[k].element[j]), difference, factor[j], term[j], g.silu);
      sums[0][j] += inner;
      sums[1][j] = fmaf(inner, difference, sums[1][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sums[1][j] *= j < at.split ? rstd[0] : rstd[1];
  sum_channels(slab, at, sums, slab_sums, of_channel);
  convert_again(x), convert_again(grad);

  for (int i = threadIdx.x; i < at.groups * slab.group_channels; i += slab.warps * kWarp) {
    const Sums s{of_channel[2 * i], of_channel[2 * i + 1]};
    const int64_t c = at.first_channel + i;
    plan.of_channel[sample * channels + c] = s;
    write_modulation(g, sample, c, s);
  }
  const float count = static_cast<float>(slab.group_channels) * static_cast<float>(g.shape.plane);
  for (int group = at.warp; group < at.groups; group += slab.warps) {
    float mean_g = 0.0f, mean_gx = 0.0f;
    for (int k = at.lane; k < slab.group_channels; k += kWarp) {
      const int i = group * slab.group_channels + k;
      const float gain = affine(g, sample, at.first_channel + i).factor;
      mean_g = fmaf(gain, of_channel[2 * i], mean_g), mean_gx = fmaf(gain, of_channel[2 * i + 1], mean_gx);
    }
    mean_g = warp_sum(mean_g), mean_gx = warp_sum(mean_gx);
    if (at.lane == 0)
      of_group[2 * group] = __fdividef(mean_g, count), of_group[2 * group + 1] = __fdividef(mean_gx, count);
  }
  __syncthreads();
  float offset[2], slope[2];  // grad_x = factor g - offset - slope (x - mean)
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int group = min(at.group + s, at.groups - 1);
    offset[s] = rstd[s] * of_group[2 * group], slope[s] = rstd[s] * rstd[s] * of_group[2 * group + 1];
  }

  Vector<T, kWidth> more[kHeld];
  if (g.grad_sum) summands.read(static_cast<const T*>(g.grad_sum) + first, at.count, at.step, more);
  const Target<T> target = target_of<T>(g, sample, at.channel, at.pixel);
  float of_bias[1][kWidth] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= at.count) break;
    Vector<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const bool one = j < at.split;
      const float difference = to_float(x[k].element[j]) - (one ? mean[0] : mean[1]);
      const float inner = through_silu(to_float(grad[k].element[j]), difference, factor[j], term[j], g.silu);
      float value = fmaf(factor[j], inner, one ? -offset[0] : -offset[1]);
      value = fmaf(one ? -slope[0] : -slope[1], difference, value);
      if (g.grad_sum) value += to_float(more[k].element[j]);
      of_bias[0][j] += value;
      out.element[j] = from_float<T>(value);
    }
    store(target.data + k * at.step * target.stride, out);
  }
  if (!g.input_bias) return;
  sum_channels(slab, at, of_bias, slab_sums, of_channel);
  for (int i = threadIdx.x; i < at.groups * slab.group_channels; i += slab.warps * kWarp) {
    if (at.first_channel + i < g.channels) write_input_bias(g, plan, sample, at.first_channel + i, of_channel[i]);
  }
}

template <typename T>
static cudaError_t launch_slab_gradient(
    const AddGroupNormSiluBackward& g, const BackwardPlan& plan, const Slab& slab, cudaStream_t stream) {
  const int groups = slab.channels / slab.group_channels;
  const size_t shared = (2 * slab.channels * slab.warps + 2 * slab.channels + 2 * groups) * sizeof(float);
  if (const auto error = allow_shared(slab_gradient_kernel<T>, shared)) return error;
  slab_gradient_kernel<T>
      <<<grid_of_slices(slab.count, g.shape.samples), slab.warps * kWarp, shared, stream>>>(g, plan, slab);
  join_samples_kernel<<<divide_up(g.shape.channels, kWarp), kNormThreads, 0, stream>>>(g, plan);
  return cudaGetLastError();
}

template <typename T, int kWidth, bool kPlanar>
static cudaError_t launch_backward(const AddGroupNormSiluBackward& g, const BackwardPlan& plan, cudaStream_t stream) {
  const int64_t samples = g.shape.samples, warps = kNormThreads / kWarp;
  if constexpr (kPlanar) {
    const int64_t blocks = divide_up(plan.sums.count * g.shape.channels, warps);
    planar_sums_kernel<T, kWidth><<<grid_of_slices(blocks, samples), kNormThreads, 0, stream>>>(g, plan);
  } else {
    const auto kernel = g.input_bias ? sums_kernel<T, kWidth, true> : sums_kernel<T, kWidth, false>;
    kernel<<<grid_of_slices(plan.sums.count, samples), kNormThreads, 0, stream>>>(g, plan);
  }
  join_slices_kernel<<<grid_of_slices(divide_up(g.groups, warps), samples), kNormThreads, 0, stream>>>(g, plan);
  const size_t shared = plan.output.channels * (sizeof(GradientMap) + sizeof(float));
  if (const auto error = allow_shared(gradient_kernel<T, kWidth, kPlanar>, shared)) return error;
  const int64_t blocks = plan.output.count + divide_up(g.shape.channels, kWarp);
  gradient_kernel<T, kWidth, kPlanar><<<grid_of_slices(blocks, samples), kNormThreads, shared, stream>>>(g, plan);
  return cudaGetLastError();
}

// A join of no samples writes the zeros that are the parameters' gradients where x is empty.
cudaError_t launch(const AddGroupNormSiluBackward& g, cudaStream_t stream) {
  if (g.shape.channels == 0) return cudaSuccess;
  const Slab slab = slab_for(g);
  int64_t floats;
  const BackwardPlan plan = plan_backward(g, slab.count > 0, floats);
  if (g.shape.samples == 0 || g.shape.plane == 0) {
    AddGroupNormSiluBackward nothing = g;
    nothing.shape.samples = 0;
    join_samples_kernel<<<divide_up(g.shape.channels, kWarp), kNormThreads, 0, stream>>>(nothing, plan);
    return cudaGetLastError();
  }
  if (slab.count > 0) {
    return with_float_type(g.x_type, [&](auto t) { return launch_slab_gradient<decltype(t)>(g, plan, slab, stream); });
  }
  return with_norm_layout(g.x_type, g.shape, g.channels, g.input_bias_stride,
      {g.grad, g.grad_sum, g.x, g.input_bias, g.grad_x, g.grad_skip}, [&](auto t, auto width, auto planar) {
        return launch_backward<decltype(t), decltype(width)::value, decltype(planar)::value>(g, plan, stream);
      });
}

cudaError_t launch(const GroupNormSiluBackward& g, cudaStream_t stream) { return launch(with_additions(g), stream); }

}  // namespace ddpm_fast
