// Maps run-time types and sizes to template arguments and grids, for all launchers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>

#include "common/arguments.h"

namespace ddpm_fast {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kThreads = 128;  // of a block

template <typename F>
cudaError_t with_float_type(Type type, const F& f) {
  switch (type) {
    case Type::f32:
      return f(float{});
    case Type::bf16:
      return f(bfloat16{});
    case Type::f16:
      return f(float16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Two types of which the first is the second, or float32.
template <typename F>
cudaError_t with_wide_and_type(Type wide, Type type, const F& f) {
  return with_float_type(type, [&](auto t) {
    using T = decltype(t);
    if (wide == type) return f(T{}, T{});
    return wide == Type::f32 ? f(float{}, T{}) : cudaErrorInvalidValue;
  });
}

__host__ __device__ inline int64_t size_of(const Shape& shape) { return shape.channels * shape.plane; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(
      pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

struct Grid {
  dim3 blocks, threads;
  int64_t tiles, tiles_per_block;  // of a sample
};

// The grid for non-empty tensors: x counts the tiles of a sample and y (and z, beyond 65535) the samples, so that no
// thread divides. Samples of few tiles share a block. Where there is more than enough for all multiprocessors, a thread
// has up to four tiles, for which it looks up the sample's row and key once.
inline Grid grid_of_tiles(int64_t samples, int64_t tiles) {
  const int64_t rounds = std::clamp<int64_t>(samples * divide_up(tiles, kThreads) / 4096, 1, 4);
  const int64_t blocks = divide_up(tiles, rounds * kThreads), each = divide_up(tiles, blocks);
  const int64_t threads = divide_up(each, divide_up(each, kThreads));
  const int64_t together = std::min(samples, kThreads / threads), rows = divide_up(samples, together);
  const int64_t layers = divide_up(rows, 65535);
  return {dim3(blocks, divide_up(rows, layers), layers), dim3(threads, together), tiles, each};
}

}  // namespace ddpm_fast
