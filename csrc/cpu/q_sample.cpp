#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/q_sample_op.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kGrainSize = 32768;  // elements a thread is worth waking for; ATen's own choice

// A function of its own for the sake of __restrict__, without which the loop is not vectorised.
template <typename T>
void add_noise(Accumulator<T> a, Accumulator<T> s, const T* __restrict__ x_start, const T* __restrict__ noise,
    T* __restrict__ out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = q_sample(a, s, x_start[i], noise[i]);
}

template <typename T>
void run(const QSample<T>& q) {
  for (int64_t n = 0; n < q.samples; ++n) {
    STD_TORCH_CHECK(0 <= q.t[n] && q.t[n] < q.timesteps, "q_sample: t[", n, "] is ", q.t[n],
        ", but rows has T = ", q.timesteps, " timesteps, counted from 0");
  }
  // Threads share the elements, not the samples: a batch of one large image keeps them all busy.
  const int64_t total = q.samples * q.sample_size;
  torch::stable::parallel_for(0, total, kGrainSize, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / q.sample_size;
      const int64_t size = std::min(end, (n + 1) * q.sample_size) - begin;
      const auto* row = q.rows + 2 * q.t[n];
      add_noise(row[0], row[1], q.x_start + begin, q.noise + begin, q.out + begin, size);
      begin += size;
    }
  });
}

Tensor q_sample_cpu(const Tensor& x_start, const Tensor& noise, const Tensor& t, const Tensor& rows) {
  return q_sample_op(x_start, noise, t, rows, [](const auto& q) { run(q); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, library) { library.impl("q_sample", TORCH_BOX(&q_sample_cpu)); }

}  // namespace ddpm_fast
