// How the forward and the backward pass of group norm traverse memory, in either layout.
//
// A sample is one strip of all its channels, or, planar, one strip for each channel. A strip is cut into tiles of whole
// pixels, and these into rows of `row_pixels` pixels, so that even few channels fill vectors. Each lane of
// a row has a sum of its own, in float32 within a tile and in float64 across tiles.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/arguments.h"
#include "cpu/convert.h"
#include "cpu/lanes.h"

namespace ddpm_fast::cpu {

struct Tile {
  int64_t sample, strip;
  int64_t index;       // of its first element in the tensor
  int64_t rows, left;  // full rows, and the elements of a last, short one
};

class Strips {
 public:
  // in_pairs: the order of lanes is that of bfloat16, see lanes.h.
  Strips(const Shape& shape, bool in_pairs)
      : strips(shape.planar ? shape.channels : 1),
        channels(shape.planar ? 1 : shape.channels),
        plane(shape.plane),
        row_pixels(channels < 64 ? 16 / std::gcd<int64_t>(16, channels) : 1 + channels % 2) {
    while (row_pixels * channels < 64) row_pixels *= 2;
    lanes = row_pixels * channels;
    half = lanes / 2;
    // bfloat16 is read in place; other types are converted in float32 buffers that fit in the first-level cache.
    tile_pixels = std::max<int64_t>((in_pairs ? 32768 : 8192) / lanes, 1) * row_pixels;
    tiles = (plane + tile_pixels - 1) / tile_pixels;

    const int64_t last = plane - std::max<int64_t>(tiles - 1, 0) * tile_pixels;
    channel_of.resize(lanes), last_counts.resize(lanes);
    for (int64_t element = 0; element < lanes; ++element) {
      const int64_t lane = lane_of(element, in_pairs);
      channel_of[lane] = element % channels;
      last_counts[lane] = static_cast<double>(last / row_pixels + (element < last % row_pixels * channels));
    }
    full_counts.assign(lanes, static_cast<double>(tile_pixels / row_pixels));
  }

  int64_t lane_of(int64_t element, bool in_pairs) const {
    return in_pairs ? element / 2 + element % 2 * half : element;
  }

  int64_t tiles_per_sample() const { return strips * tiles; }
  int64_t room() const { return tile_pixels * channels; }  // of a tile, in elements
  // The same for a buffer ordered by lanes, in which a short last row leaves gaps.
  int64_t room_of_lanes() const { return (tile_pixels / row_pixels + 1) * lanes; }

  Tile tile(int64_t i) const {
    const int64_t strip = i / tiles, first = i % tiles * tile_pixels;
    const int64_t pixels = std::min(tile_pixels, plane - first);
    return {strip / strips, strip % strips, (strip * plane + first) * channels, pixels / row_pixels,
        pixels % row_pixels * channels};
  }

  // How many elements each lane has in a tile of a strip.
  const double* counts(int64_t tile) const { return (tile + 1 < tiles ? full_counts : last_counts).data(); }

  // Calls f(index, width) for each row of a tile.
  template <class F>
  void for_rows(const Tile& tile, const F& f) const {
    for (int64_t r = 0; r < tile.rows; ++r) f(r * lanes, lanes);
    if (tile.left) f(tile.rows * lanes, tile.left);
  }

  // Calls f(i, channel) for each element of a tile, in memory's order.
  template <class F>
  void for_elements(const Tile& tile, const F& f) const {
    for (int64_t i = 0; i < tile.rows * lanes + tile.left; ++i) f(i, strips == 1 ? i % channels : tile.strip);
  }

  int64_t strips, channels, plane, row_pixels, lanes, half, tile_pixels, tiles;
  std::vector<int64_t> channel_of;  // of a lane; planar, it is the strip's
  std::vector<double> full_counts, last_counts;
};

// Bytes that the threads' own caches hold together.
inline int64_t cache_size() { return (1 << 20) * static_cast<int64_t>(torch::stable::get_num_threads()); }

// Calls f(first sample, samples) for as many samples at once as the threads' caches hold.
template <class F>
void for_batches(const Shape& shape, int64_t bytes_per_element, const F& f) {
  const int64_t bytes = shape.channels * shape.plane * bytes_per_element;
  const int64_t batch = std::max<int64_t>(cache_size() / std::max<int64_t>(bytes, 1), 1);
  for (int64_t n = 0; n < shape.samples; n += batch) f(n, std::min(batch, shape.samples - n));
}

template <class F>
void parallel_tiles(const Strips& strips, int64_t samples, const F& f) {
  const int64_t elements = std::max<int64_t>(std::min(strips.tile_pixels, strips.plane) * strips.channels, 1);
  const int64_t grain = std::max<int64_t>(16384 / elements, 1);
  torch::stable::parallel_for(0, samples * strips.tiles_per_sample(), grain, f);
}

// `columns` values for each channel of each sample, expanded to the lanes of a tile. (For planar samples, the expansion
// takes place when a tile begins, since the table would otherwise be 64 times as large.)
class LaneTable {
 public:
  LaneTable(const Strips& strips, int64_t columns, int64_t channels)
      : strips_(strips), columns_(columns), channels_(channels), width_(strips.strips == 1 ? strips.lanes : channels) {}

  void resize(int64_t samples) { values_.resize(samples * columns_ * width_); }

  void set(int64_t sample, int64_t column, const float* of_channels) {
    float* to = &values_[(sample * columns_ + column) * width_];
    for (int64_t i = 0; i < width_; ++i) to[i] = of_channels[strips_.strips == 1 ? strips_.channel_of[i] : i];
  }

  // A column for a tile; the scratch has room for all of them.
  const float* get(const Tile& tile, int64_t column, float* scratch) const {
    const float* from = &values_[(tile.sample * columns_ + column) * width_];
    if (strips_.strips == 1) return from;
    return std::fill_n(scratch + column * strips_.lanes, strips_.lanes, from[tile.strip]) - strips_.lanes;
  }
  int64_t room() const { return columns_ * strips_.lanes; }

 private:
  const Strips& strips_;
  int64_t columns_, channels_, width_;
  std::vector<float> values_;
};

// The loops over tiles assume that tables of factors and offsets are finite: they limit exponents, which would make
// SiLU(-inf) 0 where PyTorch has NaN, and a table's factor times a mean can be infinity minus infinity. A sample with
// an entry that is not finite (a parameter of such a network, or a statistic of such an input) is computed element by
// element instead, in double and in the order of the reference, from one of these for each channel.
struct ExactChannel {
  double mean, rstd, weight, bias, one_and_scale, shift;
  double mean_grad, mean_product;  // of the channel's group; for the backward pass

  double normalised(double x) const { return (x - mean) * rstd; }
  double affine(double x_hat) const { return (x_hat * weight + bias) * one_and_scale + shift; }
};
using ExactChannels = std::vector<ExactChannel>;  // empty where the tables are finite

inline bool all_finite(const std::vector<float>& values) {
  int32_t largest = 0;
  for (const float value : values) largest = std::max(largest, bits_of(value) & INT32_MAX);
  return largest < 0x7F800000;
}

inline float value_of(const Bf16* x, int64_t i) { return from_bf16(x[i].bits); }
inline float value_of(const float* x, int64_t i) { return x[i]; }
inline void set_value(Bf16* x, int64_t i, float value) { x[i].bits = to_bf16(value); }
inline void set_value(float* x, int64_t i, float value) { x[i] = value; }

// Uninitialised memory for floats.
using Scratch = std::unique_ptr<float[]>;
inline Scratch make_scratch(int64_t size) { return Scratch(new float[size]); }

// A tile's elements as T: bfloat16 in place, all other types in float32.
template <class T>
const T* load_as(const void* base, Type type, int64_t index, int64_t size, float* buffer) {
  if constexpr (std::is_same_v<T, Bf16>)
    return static_cast<const Bf16*>(at(base, type, index));
  else
    return load(base, type, index, size, buffer);
}
template <class T>
T* place_as(void* base, Type type, int64_t index, float* buffer) {
  if constexpr (std::is_same_v<T, Bf16>)
    return static_cast<Bf16*>(at(base, type, index));
  else
    return place(base, type, index, buffer);
}

// (channels,) or (samples, channels) parameters in float32; `otherwise` where there are none.
inline std::vector<float> to_floats(const void* values, Type type, int64_t index, int64_t size, float otherwise = 0) {
  std::vector<float> out(size, otherwise);
  if (!values) return out;
  const float* from = load(values, type, index, size, out.data());
  if (from != out.data()) std::copy(from, from + size, out.begin());
  return out;
}

}  // namespace ddpm_fast::cpu
