// Group norm, an affine map and SiLU. Where whole groups of a sample fit into a block, one launch reads x and writes y.
// Otherwise one reads x for the statistics, and another one reads it again and writes y; samples of more than
// kFewSlices slices have a small launch between them. What is added to x first is added by the launch that reads first.
// In the backward pass y is recomputed by the last launch alone.
//
// The statistics are safe where the mean is far larger than the spread: sums are of differences from a value among
// those summed, and parts are joined by their means and their sums of squares about them (Chan et al. 1979). Means are
// kept as differences from the group's first element, which spares them the rounding at their own size.
#include "cuda/group_norm_slab.cuh"
#include "cuda/launch.h"

namespace ddpm_fast {

constexpr int64_t kFewSlices = 16;

struct Moments {
  float mean, squares;  // less the group's origin; about the mean
};

// The first element of a group.
template <typename T>
__device__ __forceinline__ float origin_of(
    const AddGroupNormSilu& g, int64_t group_channels, int64_t sample, int64_t group) {
  const int64_t c = group * group_channels;
  if (g.shape.planar) return to_float(static_cast<const T*>(g.x)[sample * size_of(g.shape) + c * g.shape.plane]);
  Vector<T, 1> first[1];
  Summands<T, 1>(g, sample, c, 0).load(1, 0, first);
  return to_float(first[0].element[0]);
}

struct NormPlan {
  Slices statistics;  // of pixels, or (planar) of a group's elements
  Parts output;
  int64_t group_channels;
};

static NormPlan plan_norm(const Shape& shape, int64_t groups) {
  const int64_t each = shape.channels / groups;
  const Slices statistics = shape.planar ? slices_of(each * shape.plane, 1) : slices_of(shape.plane, shape.channels);
  return {statistics, parts_of(shape), each};
}

// Sums of differences from the first value, for `kLanes` series at once.
template <int kLanes>
struct Shifted {
  float shift[kLanes], sum[kLanes] = {}, squares[kLanes] = {};
  int count = 0;

  __device__ void add(const float (&x)[kLanes]) {
    if (count++ == 0) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) shift[j] = x[j];
    }
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float difference = x[j] - shift[j];
      sum[j] += difference;
      squares[j] = fmaf(difference, difference, squares[j]);
    }
  }

  __device__ Moments moments(int j, float origin) const {
    if (count == 0) return {0.0f, 0.0f};
    const float mean = __fdividef(sum[j], static_cast<float>(count));
    return {shift[j] - origin + mean, fmaxf(fmaf(-mean, sum[j], squares[j]), 0.0f)};
  }
};

// Joins the moments that the threads of a warp have read(i) of, i < count, each of weight(i) values.
template <typename Read, typename Weight>
__device__ __forceinline__ Moments join(int count, float total, const Read& read, const Weight& weight) {
  const int lane = threadIdx.x % kWarp;
  const float origin = read(0).mean;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) sum = fmaf(weight(i), read(i).mean - origin, sum);
  const float shift = __fdividef(warp_sum(sum), total);
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) {
    const Moments m = read(i);
    const float difference = m.mean - origin - shift;
    squares += fmaf(weight(i) * difference, difference, m.squares);
  }
  return {origin + shift, warp_sum(squares)};
}

__device__ __forceinline__ Moments* partial_of(const AddGroupNormSilu& g, const NormPlan& plan, int64_t sample) {
  return reinterpret_cast<Moments*>(g.workspace) + sample * plan.statistics.count * g.groups;
}

template <typename T>
__device__ __forceinline__ void write_statistics(
    const AddGroupNormSilu& g, const NormPlan& plan, int64_t sample, int64_t group, float count, const Moments& m) {
  const int64_t i = sample * g.groups + group;
  g.mean[i] = origin_of<T>(g, plan.group_channels, sample, group) + m.mean;
  g.rstd[i] = rsqrtf(__fdividef(m.squares, count) + g.eps);
}

// A slice's moments of each group. Channels-last: first of each channel, in shared memory.
// kAdds: x is not all that is read; half as many vectors at a time are then as many loads in flight.
template <typename T, int kWidth, bool kAdds>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    statistics_kernel(const __grid_constant__ AddGroupNormSilu g, const __grid_constant__ NormPlan plan) {
  extern __shared__ Moments of_channel[];
  __shared__ Moments of_thread[kNormThreads * kWidth];
  const int64_t sample = sample_of_block(), channels = g.shape.channels;
  if (sample >= g.shape.samples) return;
  const int64_t begin = blockIdx.x * plan.statistics.per_slice;
  const int64_t end = min(begin + plan.statistics.per_slice, g.shape.plane);
  const int pixels = static_cast<int>(end - begin);
  const Seat at = seat(channels / kWidth);
  for (int64_t c = threadIdx.x; c < channels; c += kNormThreads) {
    const auto group = static_cast<uint32_t>(c) / static_cast<uint32_t>(plan.group_channels);
    of_channel[c].mean = origin_of<T>(g, plan.group_channels, sample, group);
  }

  for (int64_t base = 0; base < channels; base += at.columns * kWidth) {
    const int64_t c = base + at.column * kWidth;
    Shifted<kWidth> sums;
    if (c < channels && at.row < at.rows) {
      Summands<T, kWidth> summands(g, sample, c, begin + at.row);
      T* h = static_cast<T*>(g.h) + (sample * g.shape.plane + begin + at.row) * channels + c;
      constexpr int kCount = kAdds ? kInFlight / 2 : kInFlight;
      for (int p = at.row; p < pixels; p += kCount * at.rows) {
        const int count = min((pixels - p + at.rows - 1) / at.rows, kCount);
        Vector<T, kWidth> held[kCount];
        if constexpr (kAdds)
          summands.load(count, at.rows, held);
        else
          summands.read(summands.x, count, at.rows, held);
        summands.advance(kCount * at.rows);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (k >= count) break;
          if (g.h) store(h + (p - at.row + k * at.rows) * channels, held[k]);
          float x[kWidth];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) x[j] = to_float(held[k].element[j]);
          sums.add(x);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      of_thread[j * kNormThreads + threadIdx.x] = sums.moments(j, of_channel[min(c + j, channels - 1)].mean);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < at.columns * kWidth; i += kNormThreads) {
      const int column = i % at.columns, lane = i / at.columns;
      if (base + column * kWidth >= channels) continue;
      const Moments* rows = of_thread + lane * kNormThreads + column;
      const auto weight = [&](int y) { return static_cast<float>((pixels - y + at.rows - 1) / at.rows); };
      const float origin = rows[0].mean;
      float shift = 0.0f, squares = 0.0f;
#pragma unroll 1
      for (int y = 0; y < at.rows; ++y) shift = fmaf(weight(y), rows[y * at.columns].mean - origin, shift);
      shift = __fdividef(shift, static_cast<float>(pixels));
#pragma unroll 1
      for (int y = 0; y < at.rows; ++y) {
        const float difference = rows[y * at.columns].mean - origin - shift;
        squares += fmaf(weight(y) * difference, difference, rows[y * at.columns].squares);
      }
      of_channel[base + column * kWidth + lane] = {origin + shift, squares};
    }
  }
  __syncthreads();
  const auto in_channel = static_cast<float>(pixels), total = in_channel * static_cast<float>(plan.group_channels);
  for (int64_t group = threadIdx.x / kWarp; group < g.groups; group += kNormThreads / kWarp) {
    const Moments* first = of_channel + group * plan.group_channels;
    const Moments m = join(
        static_cast<int>(plan.group_channels), total, [&](int i) { return first[i]; }, [&](int) { return in_channel; });
    if (threadIdx.x % kWarp != 0) continue;
    if (plan.statistics.count == 1)
      write_statistics<T>(g, plan, sample, group, total, m);
    else
      partial_of(g, plan, sample)[blockIdx.x * g.groups + group] = m;
  }
}

// Planar: a group is one run of memory, and a block has a slice of it. x counts slices of groups.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    planar_statistics_kernel(const __grid_constant__ AddGroupNormSilu g, const __grid_constant__ NormPlan plan) {
  __shared__ float scratch[kNormThreads / kWarp + 1];
  const int64_t sample = sample_of_block();
  if (sample >= g.shape.samples) return;
  const auto slices = static_cast<uint32_t>(plan.statistics.count);
  const int64_t group = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t size = plan.group_channels * g.shape.plane, start = sample * size_of(g.shape) + group * size;
  const int64_t begin = slice * plan.statistics.per_slice, end = min(begin + plan.statistics.per_slice, size);
  Shifted<1> sums;
  for (int64_t i = begin + threadIdx.x * kWidth; i < end; i += blockDim.x * kWidth) {
    float x[kWidth];
    load<T>(g.x, start + i, x);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums.add({x[j]});
  }
  const Moments own = sums.moments(0, origin_of<T>(g, plan.group_channels, sample, group));
  const auto count = static_cast<float>(sums.count), total = static_cast<float>(end - begin);
  if (threadIdx.x == 0) scratch[kNormThreads / kWarp] = own.mean;
  __syncthreads();
  const float origin = scratch[kNormThreads / kWarp];
  const float shift = __fdividef(block_sum(count * (own.mean - origin), scratch), total);
  const float difference = own.mean - origin - shift;
  const float squares = block_sum(fmaf(count * difference, difference, own.squares), scratch);
  if (threadIdx.x != 0) return;
  const Moments m{origin + shift, squares};
  if (plan.statistics.count == 1)
    write_statistics<T>(g, plan, sample, group, total, m);
  else
    partial_of(g, plan, sample)[slice * g.groups + group] = m;
}

// The moments of a group from those of its slices, by one warp.
__device__ __forceinline__ Moments join_slices(
    const AddGroupNormSilu& g, const NormPlan& plan, int64_t sample, int64_t group, float& total) {
  const int64_t each = g.shape.planar ? 1 : plan.group_channels;
  const int64_t size = plan.group_channels * g.shape.plane, in_slice = plan.statistics.per_slice * each;
  const int64_t last = size - (plan.statistics.count - 1) * in_slice;
  const Moments* partial = partial_of(g, plan, sample) + group;
  total = static_cast<float>(size);
  return join(
      static_cast<int>(plan.statistics.count), total, [&](int i) { return partial[i * g.groups]; },
      [&](int i) { return static_cast<float>(i + 1 < plan.statistics.count ? in_slice : last); });
}

// A warp a group, where that is too much for every block of the output.
template <typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    join_kernel(const __grid_constant__ AddGroupNormSilu g, const __grid_constant__ NormPlan plan) {
  const int64_t sample = sample_of_block();
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kNormThreads / kWarp) + threadIdx.x / kWarp;
  if (sample >= g.shape.samples || group >= g.groups) return;
  float total;
  const Moments m = join_slices(g, plan, sample, group, total);
  if (threadIdx.x % kWarp == 0) write_statistics<T>(g, plan, sample, group, total, m);
}

template <typename T, int kWidth, bool kPlanar>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    output_kernel(const __grid_constant__ AddGroupNormSilu g, const __grid_constant__ NormPlan plan) {
  extern __shared__ Map maps[];
  const int64_t sample = sample_of_block();
  if (sample >= g.shape.samples) return;
  const Part part = part_of_block(g.shape, plan.output);
  auto* biases = reinterpret_cast<float*>(maps + part.channels);  // of the input, where there are
  if (plan.statistics.count > 1 && plan.statistics.count <= kFewSlices) {
    // Each block joins the slices itself, and keeps the result for the backward pass: they all write the same.
    const auto each = static_cast<uint32_t>(plan.group_channels);
    const int64_t last = static_cast<uint32_t>(part.first_channel + part.channels - 1) / each;
    for (int64_t group = static_cast<uint32_t>(part.first_channel) / each + threadIdx.x / kWarp; group <= last;
        group += kNormThreads / kWarp) {
      float total;
      const Moments m = join_slices(g, plan, sample, group, total);
      if (threadIdx.x % kWarp == 0) write_statistics<T>(g, plan, sample, group, total, m);
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < part.channels; i += kNormThreads) {
    const int64_t c = part.first_channel + i;
    float rstd;
    maps[i] = map_of(g, plan.group_channels, sample, c, rstd);
    if (g.input_bias) biases[i] = load_as(g.input_bias, g.input_bias_type, sample * g.input_bias_stride + c);
  }
  __syncthreads();

  const T* from = static_cast<const T*>(g.x) + sample * size_of(g.shape);
  T* to = static_cast<T*>(g.y) + sample * size_of(g.shape);
  for_vectors<kPlanar, kWidth>(g.shape, part, maps, [&](const Run& run, const Map(&own)[kWidth]) {
    Vector<T, kWidth> held[kInFlight];
    const auto offset = [&](int k) { return run.offset<kPlanar>(g.shape.channels, g.shape.plane, k); };
#pragma unroll
    for (int k = 0; k < kInFlight; ++k)
      if (k < run.count) held[k] = *reinterpret_cast<const Vector<T, kWidth>*>(from + offset(k));
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (k >= run.count) break;
      Vector<T, kWidth> out;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float x = to_float(held[k].element[j]);
        if (g.input_bias) x = to_float(from_float<T>(x + biases[run.channel - part.first_channel + j]));
        const float z = fmaf(x - own[j].mean, own[j].factor, own[j].term);
        out.element[j] = from_float<T>(g.silu ? z * sigmoid(z) : z);
      }
      store(to + offset(k), out);
    }
  });
}

// The whole norm of a slab.
template <typename T, int kHeld>
__global__ void __launch_bounds__(kMostThreads, 1)
    slab_kernel(const __grid_constant__ AddGroupNormSilu g, const __grid_constant__ Slab slab) {
  constexpr int kWidth = 16 / sizeof(T);
  extern __shared__ float slab_sums[];
  const int64_t sample = sample_of_block();
  if (sample >= g.shape.samples) return;
  const SlabSeat at(slab, g.shape, kWidth);
  Vector<T, kWidth> held[kHeld];
  Summands<T, kWidth>(g, sample, at.channel, at.pixel).load(at.count, at.step, held);
  convert_again(held);
  const int64_t first = (sample * g.shape.plane + at.pixel) * g.shape.channels + at.channel;
  const int step = at.step * static_cast<int>(g.shape.channels);
  if (g.h) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (k < at.count) store(static_cast<T*>(g.h) + first + k * step, held[k]);
  }

  float sums[kWidth] = {}, squares[kWidth] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= at.count) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += to_float(held[k].element[j]);
  }
  float mean[2][1] = {};
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < at.split)
      mean[0][0] += sums[j];
    else
      mean[1][0] += sums[j];
  }
  sum_groups(slab, at, kWidth, mean, slab_sums);
  convert_again(held);
  const float count = static_cast<float>(slab.group_channels) * static_cast<float>(g.shape.plane);
#pragma unroll
  for (int s = 0; s < 2; ++s) mean[s][0] = __fdividef(mean[s][0], count);

  // The first mean has the rounding errors of a sum of values: what the differences from it add up to corrects it.
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sums[j] = 0.0f;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= at.count) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float difference = to_float(held[k].element[j]) - (j < at.split ? mean[0][0] : mean[1][0]);
      sums[j] += difference, squares[j] = fmaf(difference, difference, squares[j]);
    }
  }
  float about[2][2] = {};
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < at.split)
      about[0][0] += sums[j], about[0][1] += squares[j];
    else
      about[1][0] += sums[j], about[1][1] += squares[j];
  }
  sum_groups(slab, at, kWidth, about, slab_sums);
  convert_again(held);
  float rstd[2];
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float correction = __fdividef(about[s][0], count);
    const float variance = __fdividef(fmaf(-correction, about[s][0], about[s][1]), count);
    mean[s][0] += correction, rstd[s] = rsqrtf((variance < 0.0f ? 0.0f : variance) + g.eps);
    const int group = at.group + s;
    if (at.warp == 0 && at.row == 0 && at.count > 0 && group < at.groups) {  // those of a column all write the same
      g.mean[sample * g.groups + at.first_group + group] = mean[s][0];
      g.rstd[sample * g.groups + at.first_group + group] = rstd[s];
    }
  }
  float factor[kWidth], term[kWidth];
  load_affine<T>(g, sample, at.channel, factor, term);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) factor[j] *= j < at.split ? rstd[0] : rstd[1];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k >= at.count) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float difference = to_float(held[k].element[j]) - (j < at.split ? mean[0][0] : mean[1][0]);
      const float z = fmaf(difference, factor[j], term[j]);
      held[k].element[j] = from_float<T>(g.silu ? z * sigmoid(z) : z);
    }
    store(static_cast<T*>(g.y) + first + k * step, held[k]);
  }
}

static Slab slab_for(const AddGroupNormSilu& g) {
  const bool fits = g.input_bias_stride % 8 == 0 &&
      aligned({g.x, g.input_bias, g.residual, g.skip, g.weight, g.bias, g.scale, g.shift, g.y, g.h});
  return fits ? slab_of(g.shape, g.channels, g.groups, g.x_type, 8) : Slab{};
}

template <typename T, int kHeld>
static cudaError_t launch_slab(const AddGroupNormSilu& g, const Slab& slab, cudaStream_t stream) {
  const size_t shared = (4 * slab.columns * slab.warps + 2 * slab.channels / slab.group_channels) * sizeof(float);
  slab_kernel<T, kHeld><<<grid_of_slices(slab.count, g.shape.samples), slab.warps * kWarp, shared, stream>>>(g, slab);
  return cudaGetLastError();
}

int64_t workspace_size(const AddGroupNormSilu& g) {
  if (g.shape.samples == 0 || size_of(g.shape) == 0 || slab_for(g).count > 0) return 0;
  const int64_t slices = plan_norm(g.shape, g.groups).statistics.count;
  return slices > 1 ? g.shape.samples * slices * g.groups * 2 : 0;
}

int64_t workspace_size(const GroupNormSilu& g) { return workspace_size(with_additions(g)); }

template <typename T, int kWidth, bool kPlanar>
static cudaError_t launch_output(const AddGroupNormSilu& g, const NormPlan& plan, cudaStream_t stream) {
  const size_t shared = plan.output.channels * (sizeof(Map) + sizeof(float));
  const auto kernel = output_kernel<T, kWidth, kPlanar>;
  if (const auto error = allow_shared(kernel, shared)) return error;
  kernel<<<grid_of_slices(plan.output.count, g.shape.samples), kNormThreads, shared, stream>>>(g, plan);
  return cudaGetLastError();
}

template <typename T, int kWidth, bool kPlanar>
static cudaError_t launch_norm(const AddGroupNormSilu& g, cudaStream_t stream) {
  const NormPlan plan = plan_norm(g.shape, g.groups);
  const int64_t samples = g.shape.samples, slices = plan.statistics.count;
  if constexpr (kPlanar) {
    const int64_t vectors = divide_up(std::min(plan.statistics.per_slice, plan.group_channels * g.shape.plane), kWidth);
    const int64_t warps = std::min<int64_t>(divide_up(vectors, kWarp), kNormThreads / kWarp);
    planar_statistics_kernel<T, kWidth>
        <<<grid_of_slices(slices * g.groups, samples), warps * kWarp, 0, stream>>>(g, plan);
  } else {
    const size_t shared = g.shape.channels * sizeof(Moments);
    const auto kernel = g.h || g.input_bias ? statistics_kernel<T, kWidth, true> : statistics_kernel<T, kWidth, false>;
    if (const auto error = allow_shared(kernel, shared)) return error;
    kernel<<<grid_of_slices(slices, samples), kNormThreads, shared, stream>>>(g, plan);
  }
  if (slices > kFewSlices)
    join_kernel<T>
        <<<grid_of_slices(divide_up(g.groups, kNormThreads / kWarp), samples), kNormThreads, 0, stream>>>(g, plan);
  AddGroupNormSilu added = g;
  if (g.h) {
    added.x = g.h, added.channels = g.shape.channels;
    added.input_bias = added.residual = added.skip = nullptr;
  }
  return launch_output<T, kWidth, kPlanar>(added, plan, stream);
}

cudaError_t launch(const AddGroupNormSilu& g, cudaStream_t stream) {
  if (g.shape.samples == 0 || size_of(g.shape) == 0) return cudaSuccess;
  if (const Slab slab = slab_for(g); slab.count > 0)
    return with_float_type(g.x_type, [&](auto t) {
      return with_held(
          slab.held, [&](auto held) { return launch_slab<decltype(t), decltype(held)::value>(g, slab, stream); });
    });
  return with_norm_layout(g.x_type, g.shape, g.channels, g.input_bias_stride,
      {g.x, g.input_bias, g.residual, g.skip, g.y, g.h}, [&](auto t, auto width, auto planar) {
        return launch_norm<decltype(t), decltype(width)::value, decltype(planar)::value>(g, stream);
      });
}

cudaError_t launch(const GroupNormSilu& g, cudaStream_t stream) { return launch(with_additions(g), stream); }

cudaError_t launch(const RecomputeGroupNormSilu& recompute, cudaStream_t stream) {
  const AddGroupNormSilu g = with_additions(recompute);
  if (g.shape.samples == 0 || size_of(g.shape) == 0) return cudaSuccess;
  NormPlan plan = plan_norm(g.shape, g.groups);
  plan.statistics.count = 1;
  return with_norm_layout(g.x_type, g.shape, g.channels, 0, {g.x, g.y}, [&](auto t, auto width, auto planar) {
    return launch_output<decltype(t), decltype(width)::value, decltype(planar)::value>(g, plan, stream);
  });
}

}  // namespace ddpm_fast
