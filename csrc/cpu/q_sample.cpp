#include "cpu/convert.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace ddpm_fast::cpu {
namespace {

void add_noise(float a, float s, const float* __restrict__ x_start, const float* __restrict__ noise, int64_t size,
    float* __restrict__ out) {
  for (int64_t i = 0; i < size; ++i) out[i] = q_sample(a, s, x_start[i], noise[i]);
}

}  // namespace

void run(const QSample& q) {
  prefer_huge_pages(q.out, size_of(q.shape, q.out_type));
  const Type noise_type = q.x_type == Type::u8 ? Type::f32 : q.x_type;
  const auto key_of = [&](int64_t n) { return q.keys ? q.keys + 2 * n : nullptr; };
  const Sources sources = {{q.x_start, q.x_type}};
  for_each_run(q.shape, key_of, sources, nullptr, [&](int64_t n, int64_t index, int64_t size, const float* noise) {
    alignas(64) float x_buffer[tile_size], noise_buffer[tile_size], out_buffer[tile_size];
    const float* row = q.rows + 2 * q.t[n];
    const float* x = load(q.x_start, q.x_type, index, size, x_buffer);
    if (!noise) noise = load(q.noise, noise_type, index, size, noise_buffer);
    float* out = place(q.out, q.out_type, index, out_buffer);
    add_noise(row[0], row[1], x, noise, size, out);
    if (out == out_buffer) store(out, size, q.out, q.out_type, index);
    return 0.0;
  });
}

}  // namespace ddpm_fast::cpu
