#include <cmath>

#include "cpu/convert.h"
#include "cpu/exponential.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace ddpm_fast::cpu {
namespace {

struct Row {
  float u, w, A, B, C, sigma;
};

// x_next may be x. A bound that is NaN makes all NaN, as in torch.maximum; comparisons alone would ignore it.
void set_means(const Row& row, float low, float high, const float* x, const float* pred, int64_t size, float* x_start,
    float* x_next) {
  const float u = low == low && high == high ? row.u : low + high;
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    x_start[i] = clip(u * x[i] + row.w * pred[i], low, high);
    x_next[i] = row.A * x[i] + row.B * x_start[i];
  }
}

void add(float factor, const float* __restrict__ term, int64_t size, float* __restrict__ x_next) {
  for (int64_t i = 0; i < size; ++i) x_next[i] = x_next[i] + factor * term[i];
}

// With sigma^2 (v + 1) / 2 of the way from the lower to the upper variance, in the log.
void add_learned(float lower, float upper, const float* __restrict__ variance, const float* __restrict__ noise,
    int64_t size, float* __restrict__ x_next) {
  for (int64_t i = 0; i < size; ++i) {
    const float fraction = (variance[i] + 1.0f) * 0.5f;
    const float log_sigma = 0.5f * (lower + fraction * (upper - lower));
    x_next[i] = x_next[i] + exponential_or_infinite(log_sigma) * noise[i];
  }
}

}  // namespace

void run(const ReverseStep& r) {
  prefer_huge_pages(r.x_next, size_of(r.shape, r.x_type));
  prefer_huge_pages(r.x_start, size_of(r.shape, r.x_type));
  prefer_huge_pages(r.model_input, size_of(r.shape, r.pred_type));
  const auto step_of = [&](int64_t n) { return r.step[r.step_is_shared ? 0 : n]; };
  const auto key_of = [&](int64_t n) -> const int64_t* {
    if (!r.keys) return nullptr;
    return r.keys + 2 * (r.key_steps == 1 ? n : step_of(n) * r.shape.samples + n);
  };
  const Sources sources = {
      {r.x, r.x_type}, {r.pred, r.pred_type}, {r.x_start_prev, r.x_type}, {r.variance, r.pred_type}};
  for_each_run(r.shape, key_of, sources, nullptr, [&](int64_t n, int64_t index, int64_t size, const float* noise) {
    alignas(64) float x_buffer[tile_size], pred_buffer[tile_size], x_start_buffer[tile_size], buffer[tile_size];
    const float* columns = r.rows + r.columns * step_of(n);
    const Row& row = reinterpret_cast<const Row&>(*columns);
    const float low = r.bounds ? r.bounds[2 * n] : r.low, high = r.bounds ? r.bounds[2 * n + 1] : r.high;
    const float* x = load(r.x, r.x_type, index, size, x_buffer);
    const float* pred = load(r.pred, r.pred_type, index, size, pred_buffer);
    const bool in_place = r.x_start && r.x_start != r.x_start_prev;
    float* x_start = in_place ? place(r.x_start, r.x_type, index, x_start_buffer) : x_start_buffer;
    float* x_next = place(r.x_next, r.x_type, index, buffer);
    set_means(row, low, high, x, pred, size, x_start, x_next);
    if (r.x_start_prev) add(row.C, load(r.x_start_prev, r.x_type, index, size, x_buffer), size, x_next);
    if (r.x_start && x_start == x_start_buffer) store(x_start, size, r.x_start, r.x_type, index);
    if (r.noise) noise = load(r.noise, r.x_type, index, size, x_buffer);
    if (noise && r.variance) {
      if (row.sigma > 0) {
        const float* variance = load(r.variance, r.pred_type, index, size, pred_buffer);
        add_learned(columns[6], columns[7], variance, noise, size, x_next);
      } else {
        add(0.0f, noise, size, x_next);  // NaN where the noise is not finite
      }
    } else if (noise) {
      add(row.sigma, noise, size, x_next);
    }
    if (x_next == buffer) store(x_next, size, r.x_next, r.x_type, index);
    if (r.model_input) store(x_next, size, r.model_input, r.pred_type, index);
    return 0.0;
  });
}

}  // namespace ddpm_fast::cpu
