#include <cstring>

#include "common/philox.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace ddpm_fast::cpu {

void run(const FoldIn& f) {
  for (int64_t i = 0; i < f.count; ++i) {
    const uint64_t seed = static_cast<uint64_t>(f.keys[2 * i]), offset = static_cast<uint64_t>(f.keys[2 * i + 1]);
    const Words w = philox(seed, offset + static_cast<uint64_t>(f.data[i]));
    f.out[2 * i] = static_cast<int64_t>(w.w0 | static_cast<uint64_t>(w.w1) << 32);
    f.out[2 * i + 1] = static_cast<int64_t>(w.w2 | static_cast<uint64_t>(w.w3) << 32);
  }
}

void run(const Normal& r) {
  prefer_huge_pages(r.out, r.count * r.size * 4);
  const Shape shape{r.count, 1, r.size, false};
  const auto key_of = [&](int64_t n) { return r.keys + 2 * n; };
  for_each_run(shape, key_of, {}, nullptr, [&](int64_t, int64_t index, int64_t size, const float* noise) {
    std::memcpy(r.out + index, noise, size * sizeof(float));
    return 0.0;
  });
}

}  // namespace ddpm_fast::cpu
