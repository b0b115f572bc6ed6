// How group norm walks over memory, forwards and backwards, in either layout.
//
// A sample is one strip of all its channels, or, planar, one strip for each channel. A strip is cut into tiles of whole
// pixels, and these into rows of `pixels_per_row` pixels, so that even few channels fill vectors: lane w of a row holds
// channel w % channels. Sums are kept a lane apiece in float32 over a tile, and from then on in float64.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/arguments.h"
#include "cpu/convert.h"

namespace ddpm_fast::cpu {

struct Tile {
  int64_t sample, channel, index, pixels;  // its first channel; where it begins in the tensor
  int64_t number;                          // within its strip
};

class Strips {
 public:
  static constexpr int64_t tile_elements = 4096;

  explicit Strips(const Shape& shape)
      : strips(shape.planar ? shape.channels : 1),
        channels(shape.planar ? 1 : shape.channels),
        plane(shape.plane),
        pixels_per_row(1) {
    if (channels < 64) pixels_per_row = 16 / std::gcd<int64_t>(16, channels);
    while (pixels_per_row * channels < 64) pixels_per_row *= 2;
    const int64_t rows = std::max<int64_t>(tile_elements / (pixels_per_row * channels), 1);
    tile_pixels = rows * pixels_per_row;
    tiles = (plane + tile_pixels - 1) / tile_pixels;
  }

  int64_t lanes() const { return pixels_per_row * channels; }
  int64_t tiles_per_sample() const { return strips * tiles; }
  int64_t room() const { return tile_pixels * channels; }  // of a tile, in elements

  Tile tile(int64_t i) const {
    const int64_t strip = i / tiles, number = i % tiles, first = number * tile_pixels;
    const int64_t index = (strip * plane + first) * channels;
    return {strip / strips, strip % strips, index, std::min(tile_pixels, plane - first), number};
  }

  // Calls f(index, rows, width) for the rows of so many pixels, and for what is left, a shorter row.
  template <class F>
  void for_rows(int64_t pixels, const F& f) const {
    const int64_t rows = pixels / pixels_per_row, left = pixels % pixels_per_row;
    if (rows) f(0, rows, lanes());
    if (left) f(rows * lanes(), 1, left * channels);
  }

  // A value of each channel from those of its lanes, and back.
  void fold(const float* values, double* sums) const {
    for (int64_t c = 0; c < channels; ++c) sums[c] = values[c];
    for (int64_t p = 1; p < pixels_per_row; ++p) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += values[p * channels + c];
    }
  }
  void spread(float* values) const {
    for (int64_t w = channels; w < lanes(); ++w) values[w] = values[w - channels];
  }

  int64_t strips, channels, plane, pixels_per_row, tile_pixels, tiles;
};

// Calls f(first sample, samples) for as many samples at once as the threads' caches hold.
template <class F>
void for_batches(const Shape& shape, int64_t bytes_per_element, const F& f) {
  const int64_t cache = (1 << 20) * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t bytes = shape.channels * shape.plane * bytes_per_element;
  const int64_t batch = std::max<int64_t>(cache / std::max<int64_t>(bytes, 1), 1);
  for (int64_t n = 0; n < shape.samples; n += batch) f(n, std::min(batch, shape.samples - n));
}

template <class F>
void parallel_tiles(const Strips& strips, int64_t samples, const F& f) {
  const int64_t elements = std::max<int64_t>(std::min(strips.tile_pixels, strips.plane) * strips.channels, 1);
  const int64_t grain = std::max<int64_t>(16384 / elements, 1);
  torch::stable::parallel_for(0, samples * strips.tiles_per_sample(), grain, f);
}

// A (channels,) or (samples, channels) parameter in float32.
inline std::vector<float> to_floats(const void* values, Type type, int64_t size) {
  std::vector<float> out(size);
  const float* from = load(values, type, 0, size, out.data());
  if (from != out.data()) std::copy(from, from + size, out.begin());
  return out;
}

// y = silu((x - mean) factor + offset), of each channel of a sample.
struct Affine {
  std::vector<float> mean, factor, offset;

  explicit Affine(int64_t channels) : mean(channels), factor(channels), offset(channels) {}
};

}  // namespace ddpm_fast::cpu
