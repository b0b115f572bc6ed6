#include "cpu/convert.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace ddpm_fast::cpu {
namespace {

// One of x_start and noise may be null.
void set_errors(const float* __restrict__ pred, float p, const float* __restrict__ x_start, float q,
    const float* __restrict__ noise, int64_t size, float* __restrict__ error) {
  if (!noise) {
    for (int64_t i = 0; i < size; ++i) error[i] = pred[i] - p * x_start[i];
  } else if (!x_start) {
    for (int64_t i = 0; i < size; ++i) error[i] = pred[i] - q * noise[i];
  } else {
    for (int64_t i = 0; i < size; ++i) error[i] = pred[i] - (p * x_start[i] + q * noise[i]);
  }
}

// Leaves the losses where the errors were; grad may be null.
template <LossType type>
void set_losses(float* __restrict__ error, float factor, int64_t size, float* __restrict__ grad) {
  if (!grad) {
    for (int64_t i = 0; i < size; ++i) error[i] = loss_of<type>(error[i]).value;
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const Loss loss = loss_of<type>(error[i]);
    error[i] = loss.value;
    grad[i] = loss.slope * factor;
  }
}

}  // namespace

void run(const WeightedLoss& w) {
  prefer_huge_pages(w.grad, size_of(w.shape, w.pred_type));
  const float sample_size = static_cast<float>(w.shape.channels * w.shape.plane);
  const Type x_type = w.x_is_bytes ? Type::u8 : w.data_type;
  const auto key_of = [&](int64_t n) { return w.keys ? w.keys + 2 * n : nullptr; };
  std::vector<double> sums(w.shape.samples);
  const Sources sources = {{w.pred, w.pred_type}, {w.x_start, x_type}};
  for_each_run(w.shape, key_of, sources, sums.data(), [&](int64_t n, int64_t index, int64_t size, const float* noise) {
    alignas(64) float pred_buffer[tile_size], x_buffer[tile_size], noise_buffer[tile_size], error[tile_size];
    const auto [p, q, weight] = reinterpret_cast<const float (&)[3]>(w.rows[3 * w.t[n]]);
    const float* pred = load(w.pred, w.pred_type, index, size, pred_buffer);
    const float* x_start = nullptr;
    if (w.x_start) x_start = load(w.x_start, x_type, index, size, x_buffer);
    if (w.noise) noise = load(w.noise, w.data_type, index, size, noise_buffer);
    set_errors(pred, p, x_start, q, noise, size, error);
    float* grad = w.grad ? place(w.grad, w.pred_type, index, pred_buffer) : nullptr;
    const float factor = (w.upstream ? w.scale * w.upstream[n] : w.scale) * weight / sample_size;
    switch (w.loss_type) {
      case LossType::l2:
        set_losses<LossType::l2>(error, factor, size, grad);
        break;
      case LossType::l1:
        set_losses<LossType::l1>(error, factor, size, grad);
        break;
      case LossType::huber:
        set_losses<LossType::huber>(error, factor, size, grad);
        break;
    }
    if (grad == pred_buffer) store(grad, size, w.grad, w.pred_type, index);
    return sum(error, size);
  });
  for (int64_t n = 0; n < w.shape.samples; ++n) {
    const double weight = w.rows[3 * w.t[n] + 2];
    w.loss[n] = static_cast<float>(w.scale * weight * sums[n] / static_cast<double>(sample_size));
  }
}

}  // namespace ddpm_fast::cpu
