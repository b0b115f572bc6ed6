// The forward process for one element, x_t = a_t x_0 + s_t eps (Ho et al. 2020, eq. 4).
// For the C++ compiler and for nvcc alike.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DDPM_FAST_HOST_DEVICE __host__ __device__
#else
#define DDPM_FAST_HOST_DEVICE
#endif

namespace ddpm_fast {

// The type that values of type T are computed in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A batch whose samples each fill one block of memory, laid out alike in x_start, noise and out.
template <typename T>
struct QSample {
  const T* x_start;            // (samples, sample_size)
  const T* noise;              // (samples, sample_size)
  const int64_t* t;            // (samples,)
  const Accumulator<T>* rows;  // (timesteps, 2): a_t, s_t
  T* out;                      // (samples, sample_size)
  int64_t samples, sample_size, timesteps;
};

template <typename T>
DDPM_FAST_HOST_DEVICE inline T q_sample(Accumulator<T> a, Accumulator<T> s, T x_start, T noise) {
  using Acc = Accumulator<T>;
  return static_cast<T>(a * static_cast<Acc>(x_start) + s * static_cast<Acc>(noise));
}

}  // namespace ddpm_fast
