// The reverse step as samplers mostly call it: noise from keys, and no optional tensor. Where the compiler knows that,
// what it makes is what runs, and can be counted.
#include "cuda/reverse_step.cuh"

namespace ddpm_fast {

template <typename X, typename Pred>
__global__ void __launch_bounds__(kThreads)
    plain_step_kernel(const __grid_constant__ ReverseStep given, int64_t tiles, int64_t tiles_per_block) {
  ReverseStep r = given;
  r.noise = r.x_start_prev = r.variance = nullptr;
  r.bounds = nullptr;
  r.x_start = r.model_input = nullptr;
  if (!r.keys) return;
  step_tiles<X, Pred, WideTile<8, 1>>(r, tiles, tiles_per_block);
}

template __global__ void plain_step_kernel<float, float>(const __grid_constant__ ReverseStep, int64_t, int64_t);
template __global__ void plain_step_kernel<float, bfloat16>(const __grid_constant__ ReverseStep, int64_t, int64_t);
template __global__ void plain_step_kernel<bfloat16, bfloat16>(const __grid_constant__ ReverseStep, int64_t, int64_t);
template __global__ void plain_step_kernel<float, float16>(const __grid_constant__ ReverseStep, int64_t, int64_t);
template __global__ void plain_step_kernel<float16, float16>(const __grid_constant__ ReverseStep, int64_t, int64_t);

}  // namespace ddpm_fast
