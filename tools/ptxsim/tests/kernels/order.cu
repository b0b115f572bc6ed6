// Kernels that give one result in every order if kRight, and otherwise one that depends on the order.
// Blocks of 256 threads; out has an element for each thread.
constexpr int kThreads = 256, kWarps = kThreads / 32;

// A read of what another warp writes.
template <bool kRight>
__global__ void reversed(const float *x, float *out) {
  __shared__ float s[kThreads];
  int first = blockIdx.x * kThreads, i = threadIdx.x;
  s[i] = x[first + i];
  if (kRight) __syncthreads();
  out[first + i] = s[kThreads - 1 - i];
}
template __global__ void reversed<false>(const float *, float *);
template __global__ void reversed<true>(const float *, float *);

// A write over what another warp still reads.
template <bool kRight>
__global__ void reused(const float *x, float *out) {
  __shared__ float s[kThreads];
  int first = blockIdx.x * kThreads, i = threadIdx.x;
  float value = x[first + i];
  for (int round = 0; round < 4; ++round) {
    s[i] = value;
    __syncthreads();
    value += s[(i + 32) % kThreads];
    if (kRight) __syncthreads();
  }
  out[first + i] = value;
}
template __global__ void reused<false>(const float *, float *);
template __global__ void reused<true>(const float *, float *);

__device__ float sum_of_warp(float value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Sums of warps that go through shared memory.
template <bool kRight>
__global__ void sum_of_block(const float *x, float *out) {
  __shared__ float sums[kWarps];
  int i = blockIdx.x * kThreads + threadIdx.x;
  float sum = sum_of_warp(x[i]);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (kRight) __syncthreads();
  sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  out[i] = sum;
}
template __global__ void sum_of_block<false>(const float *, float *);
template __global__ void sum_of_block<true>(const float *, float *);

// The block that is done last adds up what all have written. Wrong: it counts without atomics, or before all its warps
// have written.
enum Count { kAtomic, kPlain, kEarly };

template <Count kCount>
__global__ void sum_by_last_block(const float *x, volatile float *sums, volatile unsigned *counter, float *out) {
  __shared__ bool last;
  float sum = sum_of_warp(x[blockIdx.x * kThreads + threadIdx.x]);
  if (threadIdx.x % 32 == 0) sums[blockIdx.x * kWarps + threadIdx.x / 32] = sum;
  __threadfence();
  if (kCount != kEarly) __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    if (kCount == kPlain) {
      before = *counter;
      *counter = before + 1;
    } else {
      before = atomicAdd((unsigned *)counter, 1u);
    }
    last = before == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x) return;
  sum = 0;
  for (int i = 0; i < gridDim.x * kWarps; ++i) sum += sums[i];
  *out = sum;
}
template __global__ void sum_by_last_block<kAtomic>(const float *, volatile float *, volatile unsigned *, float *);
template __global__ void sum_by_last_block<kPlain>(const float *, volatile float *, volatile unsigned *, float *);
template __global__ void sum_by_last_block<kEarly>(const float *, volatile float *, volatile unsigned *, float *);

// Atomic additions: of floats, which round otherwise in another order, or of integers.
template <typename T>
__global__ void add_atomically(const T *x, T *out) {
  atomicAdd(out, x[blockIdx.x * kThreads + threadIdx.x]);
}
template __global__ void add_atomically<float>(const float *, float *);
template __global__ void add_atomically<int>(const int *, int *);

// The place of each block in the order in which blocks come.
extern "C" __global__ void places(int *counter, int *out) {
  if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(counter, 1);
}

// A warp waits for a value of the next one, and block b for block b + 1.
extern "C" __global__ void wait_for_the_next(volatile int *flags, volatile int *out) {
  int warp = blockIdx.x * kWarps + threadIdx.x / 32;
  while (warp + 1 < gridDim.x * kWarps && flags[warp + 1] == 0) {}
  if (threadIdx.x % 32 == 0) {
    out[warp] = warp + 1 < gridDim.x * kWarps ? out[warp + 1] + 1 : 0;
    __threadfence();
    flags[warp] = 1;
  }
}

// All warps store to one place: the same, which is harmless, or each its own.
template <bool kAgree>
__global__ void store_together(const float *x, float *out) {
  __shared__ float value;
  value = x[kAgree ? 0 : threadIdx.x / 32];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = value;
}
template __global__ void store_together<true>(const float *, float *);
template __global__ void store_together<false>(const float *, float *);
