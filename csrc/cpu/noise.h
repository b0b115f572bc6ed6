#pragma once

#include <cstdint>

namespace ddpm_fast::cpu {

constexpr int64_t noise_step = 64;  // normals are made by so many

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// The normals first ... first + size - 1 of a key's stream; first is a multiple of 4. Writes round_up(size, noise_step)
// of them.
void make_noise(const int64_t* key, int64_t first, int64_t size, float* out);

}  // namespace ddpm_fast::cpu
