// Shared by the forward and the backward pass of group_norm_silu.
//
// A sample is cut in slices whose size depends on its shape alone, so that sums over a sample are in one order whatever
// the batch. In channels-last tensors a slice is some pixels with all channels, and a thread keeps its channels; in
// planar ones it is a piece of a contiguous run.
#pragma once

#include <type_traits>

#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"

namespace ddpm_fast {

constexpr int kNormThreads = 256;
constexpr int kNormBlocks = 2;  // blocks a multiprocessor must hold; without this bound ptxas aims for more and spills
constexpr int64_t kSliceElements = 16384;

// A sum over some pixels or elements, `per_slice` of them in each slice.
struct Slices {
  int64_t per_slice, count;
};

inline Slices slices_of(int64_t total, int64_t width) {
  const int64_t per_slice = std::max<int64_t>(kSliceElements / width, 1);
  return {per_slice, divide_up(total, per_slice)};
}

// One slice of one sample for each block: x counts slices.
inline dim3 grid_of_slices(int64_t slices, int64_t samples) {
  const int64_t layers = divide_up(samples, 65535);
  return dim3(slices, divide_up(samples, layers), layers);
}

__device__ __forceinline__ int64_t sample_of_block() {
  return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
}

// The struct with additions, of one without.
inline AddGroupNormSilu with_additions(const GroupNormSilu& g) {
  AddGroupNormSilu a{};
  a.x = g.x, a.weight = g.weight, a.bias = g.bias, a.scale = g.scale, a.shift = g.shift;
  a.y = g.y, a.mean = g.mean, a.rstd = g.rstd;
  a.shape = g.shape, a.channels = g.shape.channels, a.groups = g.groups;
  a.eps = g.eps, a.silu = g.silu, a.x_type = g.x_type, a.parameter_type = g.parameter_type, a.workspace = g.workspace;
  return a;
}

// Where there are no slices to join, the kernel of the output reads the statistics and does not write them.
inline AddGroupNormSilu with_additions(const RecomputeGroupNormSilu& g) {
  AddGroupNormSilu a{};
  a.x = g.x, a.input_bias = g.input_bias, a.weight = g.weight, a.bias = g.bias;
  a.y = g.y, a.mean = const_cast<float*>(g.mean), a.rstd = const_cast<float*>(g.rstd);
  a.shape = g.shape, a.channels = g.shape.channels, a.input_bias_stride = g.input_bias_stride, a.groups = g.groups;
  a.silu = g.silu, a.x_type = g.x_type, a.parameter_type = g.parameter_type, a.input_bias_type = g.input_bias_type;
  return a;
}

inline AddGroupNormSiluBackward with_additions(const GroupNormSiluBackward& g) {
  AddGroupNormSiluBackward a{};
  a.grad = g.grad, a.x = g.x, a.mean = g.mean, a.rstd = g.rstd;
  a.weight = g.weight, a.bias = g.bias, a.scale = g.scale, a.shift = g.shift;
  a.grad_x = g.grad_x, a.grad_weight = g.grad_weight, a.grad_bias = g.grad_bias;
  a.grad_scale = g.grad_scale, a.grad_shift = g.grad_shift;
  a.shape = g.shape, a.channels = g.shape.channels, a.groups = g.groups;
  a.silu = g.silu, a.x_type = g.x_type, a.parameter_type = g.parameter_type, a.workspace = g.workspace;
  return a;
}

// Calls f with the element type, the vectors' width and the layout as constants.
template <typename F>
cudaError_t with_norm_layout(Type type, const Shape& shape, int64_t channels, int64_t bias_stride,
    std::initializer_list<const void*> tensors, const F& f) {
  return with_float_type(type, [&](auto t) {
    constexpr int kWide = 16 / sizeof(t);
    using Wide = std::integral_constant<int, kWide>;
    using Narrow = std::integral_constant<int, 1>;
    const bool fits = shape.planar ? shape.plane % kWide == 0
                                   : shape.channels % kWide == 0 && channels % kWide == 0 && bias_stride % 8 == 0;
    const bool wide = fits && aligned(tensors);
    if (shape.planar) return wide ? f(t, Wide{}, std::true_type{}) : f(t, Narrow{}, std::true_type{});
    return wide ? f(t, Wide{}, std::false_type{}) : f(t, Narrow{}, std::false_type{});
  });
}

// The place of a thread among rows of `columns` vectors; a thread whose row is not less than `rows` has no place.
struct Seat {
  int columns, rows, column, row;
};

__device__ __forceinline__ Seat seat(int64_t vectors_in_row) {
  const auto columns = static_cast<uint32_t>(min(vectors_in_row, static_cast<int64_t>(kNormThreads)));
  const uint32_t row = threadIdx.x / columns;
  return {static_cast<int>(columns), static_cast<int>(kNormThreads / columns),
      static_cast<int>(threadIdx.x - row * columns), static_cast<int>(row)};
}

// More than 48 KiB of shared memory, as some thousand channels need, must be asked for.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 32 * 1024) return cudaSuccess;  // with 16 KiB that a kernel has besides
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

__device__ __forceinline__ float load_as(const void* data, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(data)[i];
  if (type == Type::bf16) return to_float(static_cast<const bfloat16*>(data)[i]);
  return to_float(static_cast<const float16*>(data)[i]);
}

__device__ __forceinline__ void store_as(void* data, Type type, int64_t i, float value) {
  if (type == Type::f32) static_cast<float*>(data)[i] = value;
  if (type == Type::bf16) static_cast<bfloat16*>(data)[i] = from_float<bfloat16>(value);
  if (type == Type::f16) static_cast<float16*>(data)[i] = from_float<float16>(value);
}

template <typename T, int kWidth>
__device__ __forceinline__ void load(const void* data, int64_t i, float (&out)[kWidth]) {
  const auto v = *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(data) + i);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) out[j] = to_float(v.element[j]);
}

// A vector of 16 or 32 bytes is stored 16 at a time, which the compiler does not always find out by itself.
template <typename T, int kWidth>
__device__ __forceinline__ void store(T* to, const Vector<T, kWidth>& v) {
  if constexpr (sizeof(v) % 16 == 0) {
    const size_t address = __cvta_generic_to_global(to);
#pragma unroll
    for (size_t k = 0; k < sizeof(v) / 16; ++k) {
      const uint4 words = reinterpret_cast<const uint4*>(&v)[k];
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
          :
          : "l"(address + 16 * k), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
    }
  } else {
    *reinterpret_cast<Vector<T, kWidth>*>(to) = v;
  }
}

// kWidth values from i on, of T or float32; where there are several, they begin at a multiple of 16 bytes.
template <typename T, int kWidth>
__device__ __forceinline__ void load_parameter(const void* data, Type type, int64_t i, float (&out)[kWidth]) {
  if constexpr (kWidth == 1) {
    out[0] = load_as(data, type, i);
  } else if (type == Type::f32) {
#pragma unroll
    for (int j = 0; j < kWidth; j += 4) {
      const auto v = *reinterpret_cast<const Vector<float, 4>*>(static_cast<const float*>(data) + i + j);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[j + k] = v.element[k];
    }
  } else {
    load<T>(data, i, out);
  }
}

// kWidth channels from c on of h = cat([x + input_bias + residual, skip]), from a pixel of a channels-last sample on.
template <typename T, int kWidth>
struct Summands {
  const T* x;
  const T* residual = nullptr;
  int stride;  // elements from one pixel to the next
  float bias[kWidth];
  bool adds = false;

  __device__ __forceinline__ Summands(const AddGroupNormSilu& g, int64_t sample, int64_t c, int64_t pixel) {
    if (c >= g.channels) {
      stride = static_cast<int>(g.shape.channels - g.channels);
      x = static_cast<const T*>(g.skip) + (sample * g.shape.plane + pixel) * stride + (c - g.channels);
      return;
    }
    set_x(g, g.channels, sample, c, pixel, true);
    if (!g.residual) return;
    residual = static_cast<const T*>(g.residual) + (sample * g.shape.plane + pixel) * stride + c;
    if (!adds) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) bias[j] = 0.0f;
    }
    adds = true;
  }

  // In the backward pass h was kept, or is x + input_bias.
  __device__ __forceinline__ Summands(const AddGroupNormSiluBackward& g, int64_t sample, int64_t c, int64_t pixel) {
    set_x(g, g.shape.channels, sample, c, pixel, !g.kept);
  }

  template <class Arguments>
  __device__ __forceinline__ void set_x(
      const Arguments& g, int64_t channels, int64_t sample, int64_t c, int64_t pixel, bool with_bias) {
    stride = static_cast<int>(channels);
    x = static_cast<const T*>(g.x) + (sample * g.shape.plane + pixel) * stride + c;
    if (!with_bias || !g.input_bias) return;
    adds = true;
    load_parameter<T>(g.input_bias, g.input_bias_type, sample * g.input_bias_stride + c, bias);
  }

  // The first `count` of kCount vectors, `step` pixels apart: all are read before the first is used. The sum is rounded
  // once. What follows after `count` vectors means nothing.
  template <int kCount>
  __device__ __forceinline__ void load(int count, int step, Vector<T, kWidth> (&out)[kCount]) const {
    read(x, count, step, out);
    if (!adds) return;
    constexpr int kMore = kCount < 4 ? kCount : 4;  // at a time, which spares registers
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kMore) {
      Vector<T, kWidth> more[kMore];
      if (residual) read(residual + begin * step * stride, count - begin, step, more);
#pragma unroll
      for (int k = 0; k < kMore; ++k) {
        Vector<T, kWidth>& v = out[begin + k];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          float value = to_float(v.element[j]) + bias[j];
          if (residual) value += to_float(more[k].element[j]);
          v.element[j] = from_float<T>(value);
        }
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ void read(const T* from, int count, int step, Vector<T, kWidth> (&out)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      out[k] = {};
      if (k < count) out[k] = *reinterpret_cast<const Vector<T, kWidth>*>(from + k * step * stride);
    }
  }

  __device__ __forceinline__ void advance(int pixels) {
    x += static_cast<int64_t>(pixels) * stride;
    if (residual) residual += static_cast<int64_t>(pixels) * stride;
  }
};

// 1 / (1 + exp(-z)), to 2^-21 and better.
__device__ __forceinline__ float sigmoid(float z) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}

// The affine map of channel c of a sample after the norm, x_hat factor + term; and with the norm, where the factor
// contains rstd: (x - mean) factor + term. (Folding the mean into the term would cancel where it is large.)
struct Affine {
  float factor, term;
};

struct Map {
  float mean, factor, term;
};

template <class Arguments>
__device__ __forceinline__ Affine affine(const Arguments& g, int64_t sample, int64_t c) {
  const float weight = load_as(g.weight, g.parameter_type, c), bias = load_as(g.bias, g.parameter_type, c);
  if (!g.scale) return {weight, bias};
  const int64_t i = sample * g.shape.channels + c;
  const float scale = 1.0f + load_as(g.scale, g.x_type, i);
  return {weight * scale, fmaf(bias, scale, load_as(g.shift, g.x_type, i))};
}

template <class Arguments>
__device__ __forceinline__ Map map_of(
    const Arguments& g, int64_t group_channels, int64_t sample, int64_t c, float& rstd) {
  const int64_t group = sample * g.groups + static_cast<uint32_t>(c) / static_cast<uint32_t>(group_channels);
  const Affine a = affine(g, sample, c);
  rstd = g.rstd[group];
  return {g.mean[group], rstd * a.factor, a.term};
}

// The part of a sample that a block of the last launch writes: channels of some pixels, or (planar) some channels with
// their planes, or with a piece of them if planes are large.
struct Part {
  int64_t first_channel, channels, begin, end;  // begin and end within the plane
};

struct Parts {
  int64_t channels, per_piece, pieces, count;  // a part's channels and pixels; pieces of a plane; parts of a sample
};

constexpr int64_t kMostChannels = 1024;  // of a part, which has something in shared memory for each of them

inline Parts parts_of(const Shape& shape) {
  const int64_t most = std::min(shape.channels, kMostChannels);
  const int64_t channels = shape.planar ? std::clamp<int64_t>(kSliceElements / shape.plane, 1, most) : most;
  const int64_t per_piece = std::max<int64_t>(kSliceElements / (shape.planar ? 1 : channels), 1);
  const int64_t pieces = divide_up(shape.plane, per_piece);
  return {channels, per_piece, pieces, divide_up(shape.channels, channels) * pieces};
}

__device__ __forceinline__ Part part_of_block(const Shape& shape, const Parts& parts) {
  const auto pieces = static_cast<uint32_t>(parts.pieces);
  const uint32_t group = blockIdx.x / pieces, piece = blockIdx.x - group * pieces;
  const int64_t first = group * parts.channels, begin = piece * parts.per_piece;
  return {first, min(parts.channels, shape.channels - first), begin, min(begin + parts.per_piece, shape.plane)};
}

constexpr int kInFlight = 4;  // vectors that a thread reads before it uses the first

// Vectors of a thread that begin with one channel, `step` pixels apart.
struct Run {
  int64_t pixel;
  int channel, step, count;  // count: up to kInFlight

  template <bool kPlanar>
  __device__ __forceinline__ int64_t offset(int64_t channels, int64_t plane, int k) const {
    return kPlanar ? channel * plane + pixel + k * step : (pixel + k * step) * channels + channel;
  }
};

// Calls f(run, what `of_channel` holds for each element) for the vectors of this thread; of_channel begins with the
// part's first channel.
template <bool kPlanar, int kWidth, typename PerChannel, typename F>
__device__ __forceinline__ void for_vectors(
    const Shape& shape, const Part& part, const PerChannel* of_channel, const F& f) {
  PerChannel own[kWidth];
  const auto runs = [&](int64_t channel, int64_t begin, int step) {
    const int pixels = static_cast<int>(part.end - part.begin);
    for (int i = static_cast<int>(begin - part.begin); i < pixels; i += kInFlight * step) {
      const int count = min((pixels - i + step - 1) / step, kInFlight);
      f(Run{part.begin + i, static_cast<int>(channel), step, count}, own);
    }
  };
  if constexpr (kPlanar) {
    const Seat at = seat((part.end - part.begin + kWidth - 1) / kWidth);
    for (int64_t c = at.row; c < part.channels && at.row < at.rows; c += at.rows) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) own[j] = of_channel[c];
      runs(part.first_channel + c, part.begin + at.column * kWidth, at.columns * kWidth);
    }
  } else {
    const Seat at = seat(part.channels / kWidth);
    for (int64_t c = at.column * kWidth; c < part.channels && at.row < at.rows; c += at.columns * kWidth) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) own[j] = of_channel[c + j];
      runs(part.first_channel + c, part.begin + at.row, at.rows);
    }
  }
}

}  // namespace ddpm_fast
