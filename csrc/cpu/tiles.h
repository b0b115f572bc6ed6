// Samples are cut into tiles, and tiles are distributed over threads, so that even one large image occupies all
// threads.
//
// Where tiles begin and end depends on the sample's shape alone, and so does the order of sums.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "common/arguments.h"
#include "cpu/convert.h"
#include "cpu/noise.h"

namespace ddpm_fast::cpu {

constexpr int64_t tile_size = 2048;    // elements; a few arrays of this size fit in the first-level cache
constexpr int64_t fetch_size = 256;    // elements between two rounds of prefetching
constexpr int64_t grain_size = 16384;  // least number of elements for a thread

// The sum of an array whose memory is padded to a multiple of 16 elements. It has 16 partial sums whatever the vector
// width, so that all instruction sets add in the same order.
inline double sum(float* __restrict__ values, int64_t size) {
  typedef float Lanes __attribute__((vector_size(64)));
  std::fill(values + size, values + round_up(size, 16), 0.0f);
  Lanes total = {};
  for (int64_t i = 0; i < size; i += 16) {
    Lanes part;
    __builtin_memcpy(&part, values + i, sizeof part);
    total += part;
  }
  double result = 0;
  for (int lane = 0; lane < 16; ++lane) result += total[lane];
  return result;
}

// out[c * pixels + p] = in[p * channels + c]
inline void transpose(const float* __restrict__ in, int64_t channels, int64_t pixels, float* __restrict__ out) {
  if (channels == 3) {
    for (int64_t p = 0; p < pixels; ++p) {
      out[p] = in[3 * p];
      out[pixels + p] = in[3 * p + 1];
      out[2 * pixels + p] = in[3 * p + 2];
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) out[c * pixels + p] = in[p * channels + c];
  }
}

// A tensor that a loop body will read. It is prefetched while the tile's noise is computed, which needs no memory. (If
// `fetch` is not inlined, the compiler removes it as a function without effects.)
struct Source {
  const void* data;
  Type type;
};
using Sources = std::initializer_list<Source>;

[[gnu::always_inline]] inline void fetch(const Sources& sources, int64_t index, int64_t size) {
  for (const Source& source : sources) {
    if (!source.data) continue;
    const char* from = static_cast<const char*>(at(source.data, source.type, index));
    for (int64_t byte = 0; byte < size * size_of(source.type); byte += 64) __builtin_prefetch(from + byte);
  }
}

// Calls body(sample, index, size, noise) for runs of at most tile_size elements, which begin `index` elements into the
// tensor, and adds up what it returns into sums, one a sample, if not null. key_of(sample) is null if there are no
// keys, and so is noise.
template <class KeyOf, class Body>
void for_each_run(const Shape& shape, const KeyOf& key_of, const Sources& sources, double* sums, const Body& body) {
  const int64_t size = shape.channels * shape.plane;
  const bool with_noise = key_of(0) != nullptr;
  // Noise is counted by pixels: a tile of a planar sample is some pixels of all channels.
  const bool by_pixels = with_noise && shape.planar;
  const int64_t extent = by_pixels ? shape.plane : size, width = by_pixels ? shape.channels : 1;
  const int64_t step = std::max<int64_t>(tile_size / width / 4 * 4, 4);
  const int64_t tiles = (extent + step - 1) / step;
  std::vector<double> partial(sums ? shape.samples * tiles : 0);

  const int64_t grain = std::max<int64_t>(grain_size / std::max<int64_t>(std::min(step, extent) * width, 1), 1);
  torch::stable::parallel_for(0, shape.samples * tiles, grain, [&](int64_t begin, int64_t end) {
    const int64_t room = with_noise ? round_up(step * width, noise_step) : 0;
    std::vector<float> noise(room), planes(by_pixels ? room : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / tiles, first = i % tiles * step, count = std::min(step, extent - first);
      for (int64_t j = 0; with_noise && j < count * width; j += fetch_size) {
        const int64_t some = std::min(fetch_size, count * width - j);
        for (int64_t c = 0; c < width; ++c) fetch(sources, n * size + c * extent + first + j / width, some / width);
        make_noise(key_of(n), first * width + j, some, noise.data() + j);
      }
      double total = 0;
      if (by_pixels) {
        transpose(noise.data(), width, count, planes.data());
        for (int64_t c = 0; c < width; ++c) {
          total += body(n, n * size + c * extent + first, count, planes.data() + c * count);
        }
      } else {
        total = body(n, n * size + first, count, with_noise ? noise.data() : nullptr);
      }
      if (sums) partial[i] = total;
    }
  });
  for (int64_t n = 0; sums && n < shape.samples; ++n) {
    sums[n] = 0;
    for (int64_t i = 0; i < tiles; ++i) sums[n] += partial[n * tiles + i];
  }
}

// The same without noise from keys.
template <class Body>
void for_each_run(const Shape& shape, double* sums, const Body& body) {
  for_each_run(shape, [](int64_t) { return static_cast<const int64_t*>(nullptr); }, {}, sums, body);
}

}  // namespace ddpm_fast::cpu
