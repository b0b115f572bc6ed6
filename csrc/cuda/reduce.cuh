// Sums within a warp and a block, in an order that does not change.
#pragma once

namespace ddpm_fast {

constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The sum over a block of whole warps, for all its threads. `scratch` holds a float for each warp.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  const int thread = threadIdx.x, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  __syncthreads();  // an earlier sum may still be read
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < warps; ++i) value += scratch[i];
  return value;
}

}  // namespace ddpm_fast
