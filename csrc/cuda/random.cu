// Keys and stored noise: philox, and writes.
#include "cuda/launch.h"
#include "cuda/noise.cuh"
#include "cuda/tile.cuh"

namespace ddpm_fast {

__global__ void __launch_bounds__(kThreads) fold_in_kernel(const __grid_constant__ FoldIn f) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= f.count) return;
  const Key key = load_key(f.keys, i);
  const Words w = philox(key.seed, key.offset + static_cast<uint64_t>(f.data[i]));
  *reinterpret_cast<uint4*>(f.out + 2 * i) = make_uint4(w.w0, w.w1, w.w2, w.w3);
}

cudaError_t launch(const FoldIn& f, cudaStream_t stream) {
  if (f.count == 0) return cudaSuccess;
  fold_in_kernel<<<static_cast<unsigned>(divide_up(f.count, kThreads)), kThreads, 0, stream>>>(f);
  return cudaGetLastError();
}

template <class Tile>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(const __grid_constant__ Normal n, int64_t tiles, int64_t tiles_per_block) {
  const int64_t row = sample_of_thread();
  if (row >= n.count) return;
  const Key key = load_key(n.keys, row);
  for_tiles(tiles, tiles_per_block, [&](int64_t index) {
    const Tile tile({n.count, 1, n.size, false}, false, {row, index});
    float out[Tile::kSize];
    normals(key, index * (Tile::kSize / 4), out);
    tile.template store<float>(n.out, out);
  });
}

cudaError_t launch(const Normal& n, cudaStream_t stream) {
  if (n.count == 0 || n.size == 0) return cudaSuccess;
  with_linear_tile(n.size, {n.out}, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    const Grid grid = grid_of_tiles(n.count, divide_up(n.size, Tile::kSize));
    normal_kernel<Tile><<<grid.blocks, grid.threads, 0, stream>>>(n, grid.tiles, grid.tiles_per_block);
  });
  return cudaGetLastError();
}

}  // namespace ddpm_fast
