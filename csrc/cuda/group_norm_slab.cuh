// Group norm in one launch: a block holds some whole groups of a sample with all their pixels, a slab, in registers.
//
// A thread has kHeld vectors of one column, that is of the same channels, and all of its loads are in flight at once.
// Memory is read once and written once, and the sums over a group are of values that are held already: first for the
// mean, then about it.
#pragma once

#include <numeric>

#include "cuda/group_norm.cuh"

namespace ddpm_fast {

constexpr int kMostThreads = 512;  // with more, a thread would have 64 registers, which are too few
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr int kMostParts = 256;  // columns x warps, of which each has a part of every sum

struct Slab {
  int channels, columns, rows, warps;  // of a block: its channels, vectors of a pixel, pixels of a warp at a time
  int held;                            // vectors of a thread: 4, or 8 where the slab is large
  int group_channels;
  int64_t count;  // slabs of a sample; 0: a slab does not fit into a block
};

// How a sample is cut, a thread having up to `most_held` vectors. A slab has 64 bytes of each pixel where that fits,
// and at least a sector of 32.
inline Slab slab_of(const Shape& shape, int64_t first_channels, int64_t groups, Type type, int most_held) {
  const int64_t size = type == Type::f32 ? 4 : 2, width = 16 / size, each = shape.channels / groups;
  const int64_t unit = std::lcm(each, width);  // whole groups and whole vectors
  Slab slab{};
  if (shape.planar || shape.channels % width || first_channels % width || unit > kWarp * width) return slab;
  if (shape.channels * shape.plane >= INT32_MAX) return slab;
  for (int64_t c = 0; c < unit; c += width)
    if ((c + width - 1) / each - c / each > 1) return slab;  // a vector is part of two groups at most
  const int64_t most = std::min(divide_up(64 / size, unit) * unit, shape.channels);
  const int64_t least = std::min<int64_t>(32 / size, shape.channels);
  for (int held = 4; held <= most_held; held *= 2) {
    for (int64_t channels = most; channels >= least && channels > 0; channels -= unit) {
      const int64_t columns = channels / width, rows = kWarp / columns;
      if (columns > kWarp) continue;
      const int64_t warps = divide_up(shape.plane, rows * held);
      if (warps > kMostWarps || columns * warps > kMostParts) continue;
      slab.channels = static_cast<int>(channels), slab.columns = static_cast<int>(columns);
      slab.rows = static_cast<int>(rows), slab.warps = static_cast<int>(warps), slab.held = held;
      slab.group_channels = static_cast<int>(each), slab.count = divide_up(shape.channels, channels);
      return slab;
    }
  }
  return slab;
}

// The place of a thread: a column, and the first of its pixels; the others follow in steps of `step`.
struct SlabSeat {
  int lane, warp, column, row, first_channel, first_group, groups;  // groups of the block
  int group, split;  // of this thread's channels: the group of the first one in the block, and how many are of it
  int channel, pixel, step, count;  // of the thread's vectors, `step` pixels apart, `count` in number

  __device__ __forceinline__ SlabSeat(const Slab& slab, const Shape& shape, int width)
      : lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp) {
    row = static_cast<uint32_t>(lane) / static_cast<uint32_t>(slab.columns);
    column = lane - row * slab.columns;
    first_channel = blockIdx.x * slab.channels;
    first_group = static_cast<uint32_t>(first_channel) / static_cast<uint32_t>(slab.group_channels);
    const int channels = min(slab.channels, static_cast<int>(shape.channels) - first_channel);
    groups = static_cast<uint32_t>(channels) / static_cast<uint32_t>(slab.group_channels);
    const int offset = column * width;
    group = static_cast<uint32_t>(offset) / static_cast<uint32_t>(slab.group_channels);
    split = (group + 1) * slab.group_channels - offset;
    const bool has_place = row < slab.rows && offset < channels;
    channel = first_channel + (has_place ? offset : 0);
    pixel = warp * slab.rows + row;
    step = slab.warps * slab.rows;
    const int left = static_cast<int>(shape.plane) - pixel;
    count = has_place && left > 0 ? (left + step - 1) / step : 0;
  }
};

// Keeps the compiler from keeping what it has computed from the vectors: converted to float32, they would take twice
// the registers, and to convert them again is one instruction each.
template <typename T, int kWidth, int kHeld>
__device__ __forceinline__ void convert_again(Vector<T, kWidth> (&held)[kHeld]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      auto words = *reinterpret_cast<uint4*>(&held[k]);
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
      held[k] = *reinterpret_cast<Vector<T, kWidth>*>(&words);
    }
  }
}

// Adds up the values of the lanes of each column; the result is in the lanes of row 0.
__device__ __forceinline__ float column_sum(float value, const Slab& slab, int row) {
  for (int rows = slab.rows; rows > 1;) {
    const int half = (rows + 1) / 2;
    const float other = __shfl_down_sync(~0u, value, half * slab.columns);
    if (row + half < rows) value += other;
    rows = half;
  }
  return value;
}

// Calls f with the number of vectors of a thread as a constant.
template <typename F>
cudaError_t with_held(int held, const F& f) {
  return held == 4 ? f(std::integral_constant<int, 4>{}) : f(std::integral_constant<int, 8>{});
}

// Sums over the block for each of its groups. own[0] is of the thread's first group, own[1] of the next one; on return
// both are those of the whole block. `shared` has room for 2 floats for each group, and after them for 2 kValues for
// each column and warp: the results of one call may still be read when the next one begins.
template <int kValues>
__device__ __forceinline__ void sum_groups(
    const Slab& slab, const SlabSeat& at, int width, float (&own)[2][kValues], float* totals) {
  const int parts = slab.columns * slab.warps;
  float* shared = totals + 2 * slab.channels / slab.group_channels;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const float sum = column_sum(own[s][v], slab, at.row);
      if (at.lane < slab.columns) shared[(s * kValues + v) * parts + at.column * slab.warps + at.warp] = sum;
    }
  }
  __syncthreads();
  for (int group = at.warp; group < at.groups; group += slab.warps) {
    const uint32_t begin = group * slab.group_channels, end = begin + slab.group_channels - 1;
    float sum[kValues] = {};
    for (int column = begin / width; column <= end / width; ++column) {
      const bool starts_before = static_cast<uint32_t>(column * width) < begin;
      const float* part = shared + (starts_before ? kValues * parts : 0) + column * slab.warps;
#pragma unroll
      for (int v = 0; v < kValues; ++v) sum[v] += at.lane < slab.warps ? part[v * parts + at.lane] : 0.0f;
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      sum[v] = warp_sum(sum[v]);
      if (at.lane == 0) totals[group * kValues + v] = sum[v];
    }
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) own[s][v] = totals[min(at.group + s, at.groups - 1) * kValues + v];
  }
}

// The affine maps of a thread's channels, as `affine` has that of one.
template <typename T, int kWidth, class Arguments>
__device__ __forceinline__ void load_affine(
    const Arguments& g, int64_t sample, int64_t c, float (&factor)[kWidth], float (&term)[kWidth]) {
  load_parameter<T>(g.weight, g.parameter_type, c, factor);
  load_parameter<T>(g.bias, g.parameter_type, c, term);
  if (!g.scale) return;
  float more[kWidth];
  load<T>(g.scale, sample * g.shape.channels + c, more);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) factor[j] *= 1.0f + more[j], term[j] *= 1.0f + more[j];
  load<T>(g.shift, sample * g.shape.channels + c, more);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) term[j] += more[j];
}

}  // namespace ddpm_fast
