// A number summed over each sample, in an order that depends on the sample's size alone: threads add up their tiles, a
// block its threads, and, where a sample has several blocks, a second kernel the blocks.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/tile.cuh"

namespace ddpm_fast {

constexpr int kSumThreads = 256;

struct SumPlan {
  int64_t segments, tiles_per_segment;  // a segment is a block's part of a sample
  int threads;                          // for one segment
};

// Up to four tiles a thread go in one block, and one launch. Larger samples are divided finely, so that a single one
// fills the machine, up to some hundred blocks.
inline SumPlan plan_sum(int64_t tiles) {
  const int64_t rounds = tiles <= 4 * kSumThreads ? 4 : std::clamp<int64_t>(tiles / (128 * kSumThreads), 1, 4);
  const int64_t segments = std::max<int64_t>(divide_up(tiles, rounds * kSumThreads), 1);
  const int64_t each = std::max<int64_t>(divide_up(tiles, segments), 1);
  const int64_t threads = divide_up(each, divide_up(each, kSumThreads));
  return {segments, each, static_cast<int>(divide_up(threads, kWarp) * kWarp)};
}

inline Grid grid_of_segments(int64_t samples, const SumPlan& plan) {
  const int64_t together = plan.segments > 1 ? 1 : std::min<int64_t>(samples, kSumThreads / plan.threads);
  const int64_t rows = divide_up(samples, together), layers = divide_up(rows, 65535);
  return {dim3(plan.segments, divide_up(rows, layers), layers), dim3(plan.threads, together)};
}

// The sum over the threads of a row of the block, for its first thread. All threads must call it.
__device__ __forceinline__ float row_sum(float value) {
  __shared__ float sums[kSumThreads / kWarp];
  const int warps = blockDim.x / kWarp, first = threadIdx.y * warps, warp = threadIdx.x / kWarp;
  value = warp_sum(value);
  if (warps == 1) return value;
  if (threadIdx.x % kWarp == 0) sums[first + warp] = value;
  __syncthreads();
  if (threadIdx.x != 0) return 0.0f;
  for (int i = 1; i < warps; ++i) value += sums[first + i];
  return value;
}

// Adds up what the blocks of each sample left: partial is (samples, segments).
void sum_segments(const float* partial, float* out, int64_t samples, int64_t segments, cudaStream_t stream);

}  // namespace ddpm_fast
