// A tile is what one thread works on: a few elements of one sample, consecutive in the order in which noise is counted.
//
// Values are float32 in registers, in that order. A tile's `load` and `store` map them to memory; `exchange` loads
// values and stores others in their place, where `to` may be null or equal to `from`. All loops over a tile are
// unrolled, so that the arrays are registers.
#pragma once

#include "common/steps.h"
#include "cuda/dispatch.h"

namespace ddpm_fast {

struct Place {
  int64_t sample, tile;
};

__device__ __forceinline__ int64_t sample_of_thread() {
  const int64_t row = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  return row * blockDim.y + threadIdx.y;
}

// Calls f with each tile of this thread.
template <typename F>
__device__ __forceinline__ void for_tiles(int64_t tiles, int64_t tiles_per_block, const F& f) {
  const int64_t begin = blockIdx.x * tiles_per_block;
  const int64_t end = begin + tiles_per_block < tiles ? begin + tiles_per_block : tiles;
#pragma unroll 1
  for (int64_t tile = begin + threadIdx.x; tile < end; tile += blockDim.x) f(tile);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return from_byte(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}

// Like clip, in two instructions where there are such. It returns NaN if x or a bound is NaN.
__device__ __forceinline__ float device_clip(float x, float low, float high) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
#else
  const float clipped = clip(x, low, high);
  return low <= high || high <= low ? clipped : low + high;  // NaN where a bound is
#endif
}

// 16 bytes is the most that one instruction moves: more become several.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T element[kCount];
};

// Vectors of kPixels elements: one, or (planar) one in each of kChannels channels. Sizes and addresses must allow it.
template <int kPixels, int kChannels>
struct WideTile {
  static constexpr int kSize = kPixels * kChannels;
  int64_t first;   // in the order of noise
  int64_t offset;  // from the tensor's beginning
  int64_t stride;  // from channel to channel

  __device__ WideTile(const Shape& shape, bool, Place at) : first(at.tile * kSize), stride(shape.plane) {
    offset = at.sample * size_of(shape) + at.tile * kPixels;
  }

  __device__ bool has(int) const { return true; }

  template <typename T>
  __device__ void load(const void* data, float (&out)[kSize]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const auto v = *reinterpret_cast<const Vector<T, kPixels>*>(static_cast<const T*>(data) + offset + c * stride);
#pragma unroll
      for (int p = 0; p < kPixels; ++p) out[p * kChannels + c] = to_float(v.element[p]);
    }
  }

  template <typename T>
  __device__ void store(void* data, const float (&values)[kSize]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      Vector<T, kPixels> v;
#pragma unroll
      for (int p = 0; p < kPixels; ++p) v.element[p] = from_float<T>(values[p * kChannels + c]);
      *reinterpret_cast<Vector<T, kPixels>*>(static_cast<T*>(data) + offset + c * stride) = v;
    }
  }

  template <typename T>
  __device__ void exchange(const void* from, void* to, float (&values)[kSize]) const {
    float loaded[kSize];
    load<T>(from, loaded);
    if (to) store<T>(to, values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] = loaded[j];
  }
};

// Element by element, for sizes and addresses that do not allow vectors, and planar tensors of any number of channels.
template <int kElements>
struct ScalarTile {
  static constexpr int kSize = kElements;
  int64_t first;
  int valid;
  int64_t offsets[kSize];

  __device__ ScalarTile(const Shape& shape, bool planar, Place at) : first(at.tile * kSize) {
    const int64_t size = size_of(shape), start = at.sample * size;
    valid = static_cast<int>(size - first < kSize ? size - first : kSize);
    if (!planar) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) offsets[j] = start + first + j;
      return;
    }
    // One division a tile, in 32 bits where they do.
    int64_t pixel = (first | shape.channels) >> 32
        ? first / shape.channels
        : static_cast<uint32_t>(first) / static_cast<uint32_t>(shape.channels);
    int64_t channel = first - pixel * shape.channels, offset = start + channel * shape.plane + pixel;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      offsets[j] = offset;
      offset += shape.plane;
      if (++channel == shape.channels) channel = 0, offset = start + ++pixel;
    }
  }

  __device__ bool has(int j) const { return j < valid; }

  template <typename T>
  __device__ void load(const void* data, float (&out)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) out[j] = has(j) ? to_float(static_cast<const T*>(data)[offsets[j]]) : 0.0f;
  }

  template <typename T>
  __device__ void store(void* data, const float (&values)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (has(j)) static_cast<T*>(data)[offsets[j]] = from_float<T>(values[j]);
  }

  // One element at a time, since registers are scarce here.
  template <typename T>
  __device__ void exchange(const void* from, void* to, float (&values)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float loaded = has(j) ? to_float(static_cast<const T*>(from)[offsets[j]]) : 0.0f;
      if (to && has(j)) static_cast<T*>(to)[offsets[j]] = from_float<T>(values[j]);
      values[j] = loaded;
    }
  }
};

template <typename T>
struct Tag {
  using type = T;
};

// Calls f with the tile for tensors that may be walked as they lie in memory.
template <typename F>
void with_linear_tile(int64_t sample_size, std::initializer_list<const void*> tensors, const F& f) {
  constexpr int kWidth = 8;  // 128 bits of the narrower floating types
  sample_size % kWidth == 0 && aligned(tensors) ? f(Tag<WideTile<kWidth, 1>>{}) : f(Tag<ScalarTile<kWidth>>{});
}

// The same, or, if planar, for planar tensors that must be walked in the order of noise. kOrdered: elements are shared
// out alike whether the tensors are aligned or not.
template <bool kOrdered, typename F>
void with_tile(const Shape& shape, bool planar, std::initializer_list<const void*> tensors, const F& f) {
  if (!planar) return with_linear_tile(size_of(shape), tensors, f);
  if (shape.channels != 3) return f(Tag<ScalarTile<8>>{});
  if (shape.plane % 4 == 0 && aligned(tensors)) return f(Tag<WideTile<4, 3>>{});
  f(Tag<ScalarTile<kOrdered ? 12 : 8>>{});
}

}  // namespace ddpm_fast
