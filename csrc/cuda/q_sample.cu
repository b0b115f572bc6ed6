// Reads x_start (and the noise, unless it comes from keys) once, and writes x_t once.
#include <torch/headeronly/macros/Macros.h>

#include "cuda/launch.h"
#include "cuda/noise.cuh"
#include "cuda/tile.cuh"

namespace ddpm_fast {

template <typename X, typename Out, class Tile>
__global__ void __launch_bounds__(kThreads)
    q_sample_kernel(const __grid_constant__ QSample q, int64_t tiles, int64_t tiles_per_block) {
  const int64_t sample = sample_of_thread();
  if (sample >= q.shape.samples) return;
  const int64_t t = q.t[sample];
  const bool known = static_cast<uint64_t>(t) < static_cast<uint64_t>(q.timesteps);
  const float* row = q.rows + (known ? 2 * t : 0);
  const float a = row[0], s = row[1];
  Key key{};
  if (q.keys) key = load_key(q.keys, sample);

  for_tiles(tiles, tiles_per_block, [&](int64_t index) {
    const Tile tile(q.shape, q.keys && q.shape.planar, {sample, index});
    float x[Tile::kSize], noise[Tile::kSize];
    tile.template load<X>(q.x_start, x);
    if (q.keys) {
      normals(key, index * (Tile::kSize / 4), noise);
    } else {
      using Noise = std::conditional_t<std::is_same_v<X, uint8_t>, float, X>;
      tile.template load<Noise>(q.noise, noise);
    }
#pragma unroll
    for (int j = 0; j < Tile::kSize; ++j) x[j] = q_sample(a, s, x[j], noise[j]);
    tile.template store<Out>(q.out, x);
  });
  // As in ATen's indexing, an index that is out of range stops the kernel: if it were clamped, the result would look
  // right. The assertion is at the end, where no registers are live that its call would have to save.
  CUDA_KERNEL_ASSERT(known && "q_sample: t is outside [0, T)");
}

cudaError_t launch(const QSample& q, cudaStream_t stream) {
  if (q.shape.samples == 0 || size_of(q.shape) == 0) return cudaSuccess;
  return with_float_type(q.out_type, [&](auto out) {
    using Out = decltype(out);
    const auto run = [&](auto x) {
      using X = decltype(x);
      with_tile<false>(q.shape, q.keys && q.shape.planar, {q.x_start, q.noise, q.out}, [&](auto tag) {
        using Tile = typename decltype(tag)::type;
        const Grid grid = grid_of_tiles(q.shape.samples, divide_up(size_of(q.shape), Tile::kSize));
        q_sample_kernel<X, Out, Tile><<<grid.blocks, grid.threads, 0, stream>>>(q, grid.tiles, grid.tiles_per_block);
      });
      return cudaGetLastError();
    };
    if (q.x_type == Type::u8) return run(uint8_t{});
    if (q.x_type == Type::f32) return run(float{});
    return q.x_type == q.out_type ? run(Out{}) : cudaErrorInvalidValue;
  });
}

}  // namespace ddpm_fast
