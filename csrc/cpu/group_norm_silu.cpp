#include <cmath>

#include "cpu/exponential.h"
#include "cpu/group_norm.h"
#include "cpu/kernels.h"

namespace ddpm_fast::cpu {
namespace {

void add_up(const float* __restrict__ x, int64_t rows, int64_t width, float* __restrict__ sums) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < width; ++w) sums[w] += x[r * width + w];
  }
}

void add_moments(const float* __restrict__ x, int64_t rows, int64_t width, const float* __restrict__ center,
    float* __restrict__ sums, float* __restrict__ squares) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* row = x + r * width;
    for (int64_t w = 0; w < width; ++w) {
      const float a = row[w] - center[w], b = row[width + w] - center[w];
      const float c = row[2 * width + w] - center[w], d = row[3 * width + w] - center[w];
      sums[w] += (a + b) + (c + d);
      squares[w] += fused(a, a, b * b) + fused(c, c, d * d);
    }
  }
  for (; r < rows; ++r) {
    for (int64_t w = 0; w < width; ++w) {
      const float d = x[r * width + w] - center[w];
      sums[w] += d;
      squares[w] += d * d;
    }
  }
}

template <bool silu>
void normalise(const float* __restrict__ x, int64_t rows, int64_t width, const float* __restrict__ mean,
    const float* __restrict__ factor, const float* __restrict__ offset, float* __restrict__ y) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < width; ++w) {
      const float z = fused(x[r * width + w] - mean[w], factor[w], offset[w]);
      y[r * width + w] = silu ? z / (1.0f + exponential(-z)) : z;
    }
  }
}

// The count, the mean and the sum of squared deviations from it, of one channel in one tile.
struct Moments {
  double mean, squares;
};

// Deviations are taken from the mean of a tile's first eighth, so that means far larger than the spread do no harm:
// at most 8 / 9 of the squares is then the center's own error, and is subtracted.
void tile_moments(const Strips& strips, const float* x, int64_t pixels, float* scratch, double* folded, Moments* out) {
  const int64_t lanes = strips.lanes(), channels = strips.channels, first = std::max<int64_t>(pixels / 8, 1);
  float *center = scratch, *sums = scratch + lanes, *squares = scratch + 2 * lanes;
  std::fill(scratch, scratch + 3 * lanes, 0.0f);
  strips.for_rows(first, [&](int64_t i, int64_t rows, int64_t width) { add_up(x + i, rows, width, center); });
  strips.fold(center, folded);
  for (int64_t c = 0; c < channels; ++c) center[c] = static_cast<float>(folded[c] / static_cast<double>(first));
  strips.spread(center);
  strips.for_rows(pixels,
      [&](int64_t i, int64_t rows, int64_t width) { add_moments(x + i, rows, width, center, sums, squares); });
  strips.fold(sums, folded);
  strips.fold(squares, folded + channels);
  const double count = static_cast<double>(pixels);
  for (int64_t c = 0; c < channels; ++c) {
    const double shift = folded[c] / count;
    out[c] = {center[c] + shift, folded[channels + c] - folded[c] * shift};
  }
}

}  // namespace

void run(const GroupNormSilu& g) {
  const Strips strips(g.shape);
  const int64_t channels = g.shape.channels, per_group = channels / g.groups, sample_tiles = strips.tiles_per_sample();
  const int64_t sample_size = channels * g.shape.plane;
  const std::vector<float> weight = to_floats(g.weight, g.parameter_type, channels);
  const std::vector<float> bias = to_floats(g.bias, g.parameter_type, channels);
  std::vector<Moments> moments;
  std::vector<Affine> affine;

  // Of all channels and tiles of a group.
  const auto combine = [&](int64_t n, const Moments* tiles, Affine& a) {
    std::vector<double> mean(channels, 0.0), squares(channels, 0.0);
    const auto for_tiles = [&](auto f) {
      for (int64_t i = 0; i < strips.tiles; ++i) {
        const double count = static_cast<double>(std::min(strips.tile_pixels, strips.plane - i * strips.tile_pixels));
        for (int64_t c = 0; c < channels; ++c) {
          f(c, count, tiles[strips.strips == 1 ? i * channels + c : c * strips.tiles + i]);
        }
      }
    };
    const double group_size = static_cast<double>(per_group * g.shape.plane);
    for_tiles([&](int64_t c, double count, const Moments& m) { mean[c] += count * m.mean; });
    for (int64_t group = 0; group < g.groups; ++group) {
      double total = 0;
      for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) total += mean[c];
      std::fill_n(mean.begin() + group * per_group, per_group, total / group_size);
    }
    for_tiles([&](int64_t c, double count, const Moments& m) {
      squares[c] += m.squares + count * (m.mean - mean[c]) * (m.mean - mean[c]);
    });
    for (int64_t group = 0; group < g.groups; ++group) {
      double total = 0;
      for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) total += squares[c];
      const double exact = mean[group * per_group], rstd = 1.0 / std::sqrt(total / group_size + g.eps);
      g.mean[n * g.groups + group] = static_cast<float>(exact);
      g.rstd[n * g.groups + group] = static_cast<float>(rstd);
      for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
        float scale = 0, shift = 0;
        if (g.scale) scale = *load(g.scale, g.x_type, n * channels + c, 1, &scale);
        if (g.shift) shift = *load(g.shift, g.x_type, n * channels + c, 1, &shift);
        a.mean[c] = static_cast<float>(exact);
        const double factor = rstd * weight[c] * (1.0 + scale);
        a.factor[c] = static_cast<float>(factor);
        // What the mean lost in rounding is in the offset.
        a.offset[c] = static_cast<float>(bias[c] * (1.0 + scale) + shift + (a.mean[c] - exact) * factor);
      }
    }
  };

  for_batches(g.shape, 2 * size_of(g.x_type), [&](int64_t first, int64_t samples) {
    moments.resize(samples * sample_tiles * strips.channels);
    affine.resize(samples, Affine(channels));
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(strips.room()), scratch(3 * strips.lanes());
      std::vector<double> folded(2 * strips.channels);
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index;
        const float* x = load(g.x, g.x_type, index, tile.pixels * strips.channels, buffer.data());
        tile_moments(strips, x, tile.pixels, scratch.data(), folded.data(), &moments[i * strips.channels]);
      }
    });
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        combine(first + n, moments.data() + n * sample_tiles * strips.channels, affine[n]);
      }
    });
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(strips.room()), result(strips.room()), lanes(3 * strips.lanes());
      float *mean = lanes.data(), *factor = mean + strips.lanes(), *offset = factor + strips.lanes();
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.pixels * strips.channels;
        const Affine& a = affine[tile.sample];
        std::copy_n(a.mean.begin() + tile.channel, strips.channels, mean);
        std::copy_n(a.factor.begin() + tile.channel, strips.channels, factor);
        std::copy_n(a.offset.begin() + tile.channel, strips.channels, offset);
        strips.spread(mean), strips.spread(factor), strips.spread(offset);
        const float* x = load(g.x, g.x_type, index, size, buffer.data());
        float* y = place(g.y, g.x_type, index, result.data());
        strips.for_rows(tile.pixels, [&](int64_t at, int64_t rows, int64_t width) {
          const auto function = g.silu ? normalise<true> : normalise<false>;
          function(x + at, rows, width, mean, factor, offset, y + at);
        });
        if (y == result.data()) store(y, size, g.y, g.x_type, index);
      }
    });
  });
}

}  // namespace ddpm_fast::cpu
