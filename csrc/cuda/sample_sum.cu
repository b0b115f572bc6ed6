#include "cuda/sample_sum.cuh"

namespace ddpm_fast {

// A warp a sample.
__global__ void __launch_bounds__(kThreads)
    sum_segments_kernel(const float* partial, float* out, int64_t samples, int64_t segments) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (sample >= samples) return;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < segments; i += kWarp) sum += partial[sample * segments + i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) out[sample] = sum;
}

void sum_segments(const float* partial, float* out, int64_t samples, int64_t segments, cudaStream_t stream) {
  const dim3 threads(kWarp, kThreads / kWarp);
  const auto blocks = static_cast<unsigned>(divide_up(samples, threads.y));
  sum_segments_kernel<<<blocks, threads, 0, stream>>>(partial, out, samples, segments);
}

}  // namespace ddpm_fast
