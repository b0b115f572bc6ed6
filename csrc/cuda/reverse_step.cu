#include "cuda/launch.h"
#include "cuda/reverse_step.cuh"

namespace ddpm_fast {

// The blocks that a multiprocessor must have registers for; 0 leaves it to ptxas. For scalar tiles, ptxas then takes
// the same 80 registers on sm_120, but spills two.
template <class Tile>
constexpr int kStepBlocks = std::is_same_v<Tile, ScalarTile<8>> ? 6 : 0;

template <typename X, typename Pred, class Tile>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Tile>)
    reverse_step_kernel(const __grid_constant__ ReverseStep r, int64_t tiles, int64_t tiles_per_block) {
  step_tiles<X, Pred, Tile>(r, tiles, tiles_per_block);
}

cudaError_t launch(const ReverseStep& r, cudaStream_t stream) {
  if (r.shape.samples == 0 || size_of(r.shape) == 0) return cudaSuccess;
  const auto tensors = {r.x, r.pred, r.noise, r.x_start_prev, r.variance, static_cast<const void*>(r.x_next),
      static_cast<const void*>(r.x_start), static_cast<const void*>(r.model_input)};
  return with_wide_and_type(r.x_type, r.pred_type, [&](auto x, auto pred) {
    with_tile<false>(r.shape, r.keys && r.shape.planar, tensors, [&](auto tag) {
      using Tile = typename decltype(tag)::type;
      const Grid grid = grid_of_tiles(r.shape.samples, divide_up(size_of(r.shape), Tile::kSize));
      reverse_step_kernel<decltype(x), decltype(pred), Tile>
          <<<grid.blocks, grid.threads, 0, stream>>>(r, grid.tiles, grid.tiles_per_block);
    });
    return cudaGetLastError();
  });
}

}  // namespace ddpm_fast
