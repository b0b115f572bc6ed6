// Kernels whose global loads in flight are known.
__device__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// kLoads in a round, and a remainder of one each.
template <int kLoads>
__device__ float4 sum(const float4 *x, int n) {
  float4 total = {};
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (kLoads - 1) * blockDim.x < n; i += kLoads * blockDim.x) {
    float4 values[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) values[j] = x[i + j * blockDim.x];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) total = total + values[j];
  }
#pragma unroll 1
  for (; kLoads > 1 && i < n; i += blockDim.x) total = total + x[i];
  return total;
}

extern "C" __global__ void one_at_a_time(const float4 *x, float4 *y, int n) { y[threadIdx.x] = sum<1>(x, n); }

extern "C" __global__ void four_and_a_remainder(const float4 *x, float4 *y, int n) {
  y[threadIdx.x] = sum<4>(x, n);
}

extern "C" __global__ void four_then_one(const float4 *x, float4 *y, int n) {
  __shared__ float4 s[32];
  s[threadIdx.x] = sum<4>(x, n);
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x] + sum<1>(x, n);
}

extern "C" __global__ void two_wide_then_one_narrow(const float4 *x, const float *a, float4 *y, int n) {
  __shared__ float4 s[32];
  s[threadIdx.x] = sum<2>(x, n);
  __syncthreads();
  float4 total = s[31 - threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; ++i) total.x += a[i];
  y[threadIdx.x] = total;
}

// Narrow loads around the loop with wide ones.
extern "C" __global__ void rows(const float4 *x, const float *a, const float *b, float *y, int count, int n) {
#pragma unroll 1
  for (int row = 0; row < count; ++row) {
    float4 total = sum<2>(x + row * n, n);
    y[row] = a[row] * total.x + b[row] * total.y + a[row + count] * total.z + b[row + count] * total.w;
  }
}

extern "C" __global__ void chase(const int *next, int *out, int n) {
  int i = threadIdx.x;
#pragma unroll 1
  for (int k = 0; k < n; ++k) i = next[i];
  out[threadIdx.x] = i;
}

extern "C" __global__ void straight(const float *a, const float *b, const float *c, float *out) {
  int i = threadIdx.x;
  out[i] = a[i] * b[i] + c[i];
}

extern "C" __global__ void no_loads(float *out) { out[threadIdx.x] = 1; }
