#include <cmath>

#include "cpu/exponential.h"
#include "cpu/group_norm.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/silu_avx512.h"

namespace ddpm_fast::cpu {
namespace {

// Of a tile's elements of each lane: a center, and the sums of the deviations from it and of their squares. The center
// is the mean of the tile's first eighth, so that means far larger than the spread do no harm: at most 8 / 9 of the
// squares is then the center's own error, and is subtracted.
template <class T>
void set_moments(const Strips& strips, const Tile& tile, const T* x, float* moments) {
  const int64_t lanes = strips.lanes, half = strips.half;
  float *center = moments, *sums = moments + lanes, *squares = moments + 2 * lanes;
  std::fill(moments, moments + 3 * lanes, 0.0f);
  const int64_t head = std::max<int64_t>(tile.rows / 8, 1);
  for (int64_t r = 0; r < head; ++r) {
    visit(tile.rows ? lanes : tile.left, half, [=](int64_t w, float v) { center[w] += v; }, x + r * lanes);
  }
  for (int64_t w = 0; w < lanes; ++w) center[w] *= 1.0f / static_cast<float>(head);

  int64_t r = 0;
  for (; r + 4 <= tile.rows; r += 4) {
    const T* row = x + r * lanes;
    const auto add_four = [=](int64_t w, float a, float b, float c, float d) {
      a -= center[w], b -= center[w], c -= center[w], d -= center[w];
      sums[w] += (a + b) + (c + d);
      squares[w] += fused(a, a, b * b) + fused(c, c, d * d);
    };
    visit(lanes, half, add_four, row, row + lanes, row + 2 * lanes, row + 3 * lanes);
  }
  const auto add_one = [=](int64_t w, float a) {
    a -= center[w];
    sums[w] += a;
    squares[w] += a * a;
  };
  for (; r < tile.rows; ++r) visit(lanes, half, add_one, x + r * lanes);
  if (tile.left) visit(tile.left, half, add_one, x + r * lanes);
}

// y = silu((x - mean) factor + offset); the table holds -factor and -offset, which spares a sign.
enum Column { mean, factor, offset, columns };

#ifdef __AVX512F__
template <bool silu>
void normalise_16(const Strips& strips, const Tile& tile, const Bf16* x, const float* means, const float* factors,
    const float* offsets, Bf16* y) {
  const int64_t lanes = strips.lanes, half = strips.half;
  const auto value_of = [](__m512 minus_z) {
    return silu ? silu_of_minus(minus_z) : _mm512_xor_ps(minus_z, _mm512_set1_ps(-0.0f));
  };
  for_columns(lanes, tile.rows, tile.left, [=](const Column16& column) {
    const int64_t w = column.w;
    const __m512 mean0 = column.row_of(means, w), mean1 = column.row_of(means, w + half);
    const __m512 factor0 = column.row_of(factors, w), factor1 = column.row_of(factors, w + half);
    const __m512 offset0 = column.row_of(offsets, w), offset1 = column.row_of(offsets, w + half);
    for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
      const __m512i words = column.words(x, at);
      const __m512 first = _mm512_fmadd_ps(_mm512_sub_ps(firsts(words), mean0), factor0, offset0);
      const __m512 second = _mm512_fmadd_ps(_mm512_sub_ps(seconds(words), mean1), factor1, offset1);
      column.set_words(y, at, words_of(value_of(first), value_of(second)));
    }
  });
  if (tile.left % 2) {
    const int64_t last = tile.rows * lanes + tile.left - 1, w = tile.left / 2;
    const float minus_z = fused(from_bf16(x[last].bits) - means[w], factors[w], offsets[w]);
    y[last].bits = to_bf16(_mm512_cvtss_f32(value_of(_mm512_set1_ps(minus_z))));
  }
}
#endif

template <bool silu, class T>
void normalise(const Strips& strips, const Tile& tile, const T* x, const float* means, const float* factors,
    const float* offsets, T* y) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, Bf16>) {
    return normalise_16<silu>(strips, tile, x, means, factors, offsets, y);
  }
#endif
  const auto value = [=](int64_t w, float v) {
    const float z = fused(v - means[w], factors[w], offsets[w]);  // -z
    return silu ? z / (-1.0f - exponential(z)) : -z;
  };
  strips.for_rows(
      tile, [=, half = strips.half](int64_t at, int64_t width) { map(width, half, y + at, value, x + at); });
}

template <class T>
void run_as(const GroupNormSilu& g) {
  const Strips strips(g.shape, std::is_same_v<T, Bf16>);
  const int64_t channels = g.shape.channels, per_group = channels / g.groups, sample_tiles = strips.tiles_per_sample();
  const int64_t sample_size = channels * g.shape.plane, lanes = strips.lanes;
  const std::vector<float> weight = to_floats(g.weight, g.parameter_type, 0, channels);
  const std::vector<float> bias = to_floats(g.bias, g.parameter_type, 0, channels);
  std::vector<float> moments;  // (samples, strips, tiles, 3, lanes)
  LaneTable table(strips, columns, channels);

  // From the moments of all lanes and tiles of a sample to those of its groups.
  const auto combine = [&](int64_t first, int64_t n) {
    std::vector<double> of_lanes(lanes), means(channels, 0.0), squares(channels, 0.0);
    const auto for_tiles = [&](std::vector<double>& of_channels, auto f) {
      for (int64_t strip = 0; strip < strips.strips; ++strip) {
        std::fill(of_lanes.begin(), of_lanes.end(), 0.0);
        for (int64_t i = 0; i < strips.tiles; ++i) {
          const float* m = &moments[((n * strips.strips + strip) * strips.tiles + i) * 3 * lanes];
          const double* counts = strips.counts(i);
          double* to = of_lanes.data();
#pragma GCC ivdep
          for (int64_t w = 0; w < lanes; ++w) to[w] += f(w, strip, counts[w], m[w], m[w + lanes], m[w + 2 * lanes]);
        }
        for (int64_t w = 0; w < lanes; ++w) of_channels[strip + strips.channel_of[w]] += of_lanes[w];
      }
    };
    const double group_size = static_cast<double>(per_group * g.shape.plane);
    const auto spread_over_groups = [&](std::vector<double>& of_channels) {
      for (auto c = of_channels.begin(); c != of_channels.end(); c += per_group) {
        std::fill_n(c, per_group, std::accumulate(c, c + per_group, 0.0) / group_size);
      }
    };
    for_tiles(
        means, [](int64_t, int64_t, double count, double center, double sum, double) { return count * center + sum; });
    spread_over_groups(means);
    for_tiles(squares, [&](int64_t w, int64_t strip, double count, double center, double sum, double square) {
      const double shift = center - means[strip + strips.channel_of[w]];
      return square + shift * (2.0 * sum + count * shift);
    });
    spread_over_groups(squares);

    const std::vector<float> scale = to_floats(g.scale, g.x_type, (first + n) * channels, channels);
    const std::vector<float> shift = to_floats(g.shift, g.x_type, (first + n) * channels, channels);
    std::vector<float> column[columns];
    for (auto& values : column) values.resize(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double rstd = 1.0 / std::sqrt(squares[c] + g.eps);
      column[mean][c] = static_cast<float>(means[c]);
      column[factor][c] = static_cast<float>(-rstd * weight[c] * (1.0 + scale[c]));
      // What the mean lost in rounding is in the offset.
      const double lost = means[c] - column[mean][c];
      column[offset][c] = static_cast<float>(-bias[c] * (1.0 + scale[c]) - shift[c] - lost * column[factor][c]);
      if (c % per_group == 0) {
        const int64_t group = (first + n) * g.groups + c / per_group;
        g.mean[group] = column[mean][c];
        g.rstd[group] = static_cast<float>(rstd);
      }
    }
    for (int64_t i = 0; i < columns; ++i) table.set(n, i, column[i].data());
  };

  for_batches(g.shape, 2 * size_of(g.x_type), [&](int64_t first, int64_t samples) {
    moments.resize(samples * sample_tiles * 3 * lanes);
    table.resize(samples);
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(strips.room());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.rows * lanes + tile.left;
        set_moments(strips, tile, load_as<T>(g.x, g.x_type, index, size, buffer.data()), &moments[i * 3 * lanes]);
      }
    });
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) combine(first, n);
    });
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(strips.room()), result(strips.room()), scratch(table.room());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.rows * lanes + tile.left;
        const T* x = load_as<T>(g.x, g.x_type, index, size, buffer.data());
        T* y = place_as<T>(g.y, g.x_type, index, result.data());
        const float* means = table.get(tile, mean, scratch.data());
        const float* factors = table.get(tile, factor, scratch.data());
        const float* offsets = table.get(tile, offset, scratch.data());
        const auto function = g.silu ? normalise<true, T> : normalise<false, T>;
        function(strips, tile, x, means, factors, offsets, y);
        if (static_cast<void*>(y) == result.data()) store(result.data(), size, g.y, g.x_type, index);
      }
    });
  });
}

}  // namespace

void run(const GroupNormSilu& g) {
  prefer_huge_pages(g.y, size_of(g.shape, g.x_type));
  g.x_type == Type::bf16 ? run_as<Bf16>(g) : run_as<float>(g);
}

}  // namespace ddpm_fast::cpu
