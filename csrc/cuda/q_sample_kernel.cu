// Moves the least there is, 3 * sizeof(T) bytes an element, 16 bytes at a time.
// It knows no tensors, which spares nvcc the parsing of PyTorch's headers, once for each architecture. It has
// no anonymous namespace, in which nvcc would give kernels another name in every build.
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/q_sample.h"

namespace ddpm_fast {

constexpr int kThreads = 256;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

// One thread, one vector: a grid holds 2^31 - 1 blocks, more than any memory has vectors for.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(QSample<T> q) {
  using Vec = Vector<T, kWidth>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (i >= q.samples * q.sample_size) return;

  const int64_t t = q.t[static_cast<uint64_t>(i) / static_cast<uint64_t>(q.sample_size)];
  const Vec x_start = *reinterpret_cast<const Vec*>(q.x_start + i);
  const Vec noise = *reinterpret_cast<const Vec*>(q.noise + i);
  // Like ATen's own indexing, it stops rather than clamp: an image of the wrong t looks like a right one.
  CUDA_KERNEL_ASSERT(0 <= t && t < q.timesteps && "q_sample: t is outside [0, T)");
  const auto a = q.rows[2 * t], s = q.rows[2 * t + 1];

  Vec out;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) out.element[j] = q_sample(a, s, x_start.element[j], noise.element[j]);
  *reinterpret_cast<Vec*>(q.out + i) = out;
}

template <typename T, int kWidth>
void launch(const QSample<T>& q, cudaStream_t stream) {
  const int64_t vectors = q.samples * q.sample_size / kWidth;
  const auto blocks = static_cast<unsigned>((vectors + kThreads - 1) / kThreads);
  q_sample_kernel<T, kWidth><<<blocks, kThreads, 0, stream>>>(q);
}

template <typename T>
cudaError_t launch_q_sample(const QSample<T>& q, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);  // 128 bits
  const auto is_aligned = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (q.sample_size % kWidth == 0 && is_aligned(q.x_start) && is_aligned(q.noise) && is_aligned(q.out)) {
    launch<T, kWidth>(q, stream);
  } else {
    launch<T, 1>(q, stream);
  }
  return cudaGetLastError();
}

template cudaError_t launch_q_sample(const QSample<float>&, cudaStream_t);
template cudaError_t launch_q_sample(const QSample<double>&, cudaStream_t);
template cudaError_t launch_q_sample(const QSample<c10::Half>&, cudaStream_t);
template cudaError_t launch_q_sample(const QSample<c10::BFloat16>&, cudaStream_t);

}  // namespace ddpm_fast
