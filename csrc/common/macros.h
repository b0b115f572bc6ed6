#pragma once

#ifdef __CUDACC__
#define DDPM_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DDPM_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif
