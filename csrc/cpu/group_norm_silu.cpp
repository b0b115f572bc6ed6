#include <cmath>

#include "cpu/exponential.h"
#include "cpu/group_norm.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/silu_avx512.h"

namespace ddpm_fast::cpu {
namespace {

#ifdef __AVX512F__
void add_deviations_16(
    const Strips& strips, const Tile& tile, const Bf16* x, const float* center, float* sums, float* squares) {
  const int64_t lanes = strips.lanes, half = strips.half;
  for_columns(lanes, tile.rows, tile.left, [=](const auto& column) {
    const int64_t w0 = column.w, w1 = column.w + half;
    const __m512 center0 = column.row_of(center, w0), center1 = column.row_of(center, w1);
    __m512 sum0 = column.row_of(sums, w0), sum1 = column.row_of(sums, w1);
    __m512 square0 = column.row_of(squares, w0), square1 = column.row_of(squares, w1);
    for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
      const __m512i words = column.words(x, at);
      const __m512 a = _mm512_sub_ps(firsts(words), center0), b = _mm512_sub_ps(seconds(words), center1);
      sum0 = _mm512_add_ps(sum0, a), sum1 = _mm512_add_ps(sum1, b);
      square0 = _mm512_fmadd_ps(a, a, square0), square1 = _mm512_fmadd_ps(b, b, square1);
    }
    column.set_row(sums, w0, sum0), column.set_row(sums, w1, sum1);
    column.set_row(squares, w0, square0), column.set_row(squares, w1, square1);
  });
  if (tile.left % 2) {
    const int64_t w = tile.left / 2;
    const float a = from_bf16(x[tile.rows * lanes + tile.left - 1].bits) - center[w];
    sums[w] += a;
    squares[w] += a * a;
  }
}
#endif

template <class T>
void add_deviations(
    const Strips& strips, const Tile& tile, const T* x, const float* center, float* sums, float* squares) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, Bf16>) return add_deviations_16(strips, tile, x, center, sums, squares);
#endif
  const int64_t lanes = strips.lanes, half = strips.half;
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

// Of a tile's elements of each lane: a center, and the sums of the deviations from it and of their squares. The center
// is the mean of the tile's first eighth, so that means far larger than the spread do no harm: at most 8 / 9 of the
// squares is then the center's own error, and is subtracted. Among bfloat16, it is rounded to bfloat16 too: deviations
// from it, and most of their sums, are then exact, where all would lose the same last bits.
template <class T>
void set_moments(const Strips& strips, const Tile& tile, const T* x, float* moments) {
  const int64_t lanes = strips.lanes;
  float* center = moments;
  std::fill(moments, moments + 3 * lanes, 0.0f);
  const int64_t head = std::max<int64_t>(tile.rows / 8, 1);
  for (int64_t r = 0; r < head; ++r) {
    visit(tile.rows ? lanes : tile.left, strips.half, [=](int64_t w, float v) { center[w] += v; }, x + r * lanes);
  }
  for (int64_t w = 0; w < lanes; ++w) {
    center[w] *= 1.0f / static_cast<float>(head);
    if (std::is_same_v<T, Bf16>) center[w] = from_bf16(to_bf16(center[w]));
  }
  add_deviations(strips, tile, x, center, moments + lanes, moments + 2 * lanes);
}

// y = silu(z) of z = (x - mean) factor + offset; the table has z's factor and offset in `argument_unit`s. For bfloat16
// the mean is part of the offset, which adds one rounding error of mean / std, no more than that of the mean itself.
enum Column { mean, factor, offset, columns };

#ifdef __AVX512F__
template <bool silu>
void normalise_16(
    const Strips& strips, const Tile& tile, const Bf16* x, const float* factors, const float* offsets, Bf16* y) {
  const int64_t lanes = strips.lanes, half = strips.half;
  const auto value_of = [](__m512 t) { return silu ? silu_of_exponent(t) : t; };
  for_columns(lanes, tile.rows, tile.left, [=](const auto& column) {
    const int64_t w = column.w;
    const __m512 factor0 = column.row_of(factors, w), factor1 = column.row_of(factors, w + half);
    const __m512 offset0 = column.row_of(offsets, w), offset1 = column.row_of(offsets, w + half);
    for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
      const __m512i words = column.words(x, at);
      const __m512 first = value_of(_mm512_fmadd_ps(firsts(words), factor0, offset0));
      const __m512 second = value_of(_mm512_fmadd_ps(seconds(words), factor1, offset1));
      column.set_words(y, at, words_of(first, second));
    }
  });
  if (tile.left % 2) {
    const int64_t last = tile.rows * lanes + tile.left - 1, w = tile.left / 2;
    const __m512 t = _mm512_set1_ps(fused(from_bf16(x[last].bits), factors[w], offsets[w]));
    y[last].bits = to_bf16(_mm512_cvtss_f32(value_of(t)));
  }
}
#endif

template <bool silu, class T>
void normalise(const Strips& strips, const Tile& tile, const T* x, const float* means, const float* factors,
    const float* offsets, T* y) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, Bf16>) {
    return normalise_16<silu>(strips, tile, x, factors, offsets, y);
  }
#endif
  const auto value = [=](int64_t w, float v) {
    const float z = fused(std::is_same_v<T, Bf16> ? v : v - means[w], factors[w], offsets[w]);
    // -z with SiLU, of which 88 stands for all that is more: SiLU is 0 there.
    return silu ? (88.0f < z ? 88.0f : z) / (-1.0f - exponential(z)) : z;
  };
  strips.for_rows(
      tile, [=, half = strips.half](int64_t at, int64_t width) { map(width, half, y + at, value, x + at); });
}

template <class T>
void normalise_exactly(
    const Strips& strips, const Tile& tile, bool silu, const ExactChannels& channels, const T* x, T* y) {
  strips.for_elements(tile, [&](int64_t i, int64_t c) {
    const double z = channels[c].affine(channels[c].normalised(value_of(x, i)));
    set_value(y, i, static_cast<float>(silu ? z / (1.0 + std::exp(-z)) : z));
  });
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
  std::vector<ExactChannels> exact;  // of each sample
  const double unit = argument_unit<T>(g.silu);

  const auto set_affine = [&](int64_t first, int64_t n, const std::vector<double>& means,
                              const std::vector<double>& rstds) {
    const std::vector<float> scale = to_floats(g.scale, g.x_type, (first + n) * channels, channels);
    const std::vector<float> shift = to_floats(g.shift, g.x_type, (first + n) * channels, channels);
    std::vector<float> of_channels[columns];
    for (auto& values : of_channels) values.resize(channels);
    float *mean_c = of_channels[mean].data(), *factor_c = of_channels[factor].data(),
          *offset_c = of_channels[offset].data();
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      mean_c[c] = std::is_same_v<T, Bf16> ? 0.0f : static_cast<float>(means[c]);
      factor_c[c] = static_cast<float>(unit * rstds[c] * weight[c] * (1.0 + scale[c]));
      // The rounding error of the mean is added to the offset.
      const double lost = means[c] - mean_c[c];
      offset_c[c] = static_cast<float>(unit * (bias[c] * (1.0 + scale[c]) + shift[c]) - lost * factor_c[c]);
    }
    for (int64_t i = 0; i < columns; ++i) table.set(n, i, of_channels[i].data());
    exact[n].clear();
    if (all_finite(of_channels[factor]) && all_finite(of_channels[offset])) return;
    for (int64_t c = 0; c < channels; ++c) {
      exact[n].push_back({means[c], rstds[c], weight[c], bias[c], 1.0 + scale[c], shift[c], 0.0, 0.0});
    }
  };

  // From the moments of all lanes and tiles of a sample to those of its groups: first of each channel, about a center
  // of one of its lanes.
  const auto combine = [&](int64_t first, int64_t n) {
    std::vector<double> of_lanes(3 * lanes), centers(channels), sums(channels, 0.0), squares(channels, 0.0);
    double *centers_w = of_lanes.data(), *sums_w = centers_w + lanes, *squares_w = sums_w + lanes;
    for (int64_t strip = 0; strip < strips.strips; ++strip) {
      const float* m = &moments[(n * strips.strips + strip) * strips.tiles * 3 * lanes];
      for (int64_t w = 0; w < lanes; ++w) centers[strip + strips.channel_of[w]] = m[w];
      for (int64_t w = 0; w < lanes; ++w) centers_w[w] = centers[strip + strips.channel_of[w]];
      std::fill(sums_w, sums_w + 2 * lanes, 0.0);
      for (int64_t i = 0; i < strips.tiles; ++i, m += 3 * lanes) {
        const double* counts = strips.counts(i);
#pragma GCC ivdep
        for (int64_t w = 0; w < lanes; ++w) {
          const double shift = m[w] - centers_w[w], sum = m[w + lanes], square = m[w + 2 * lanes];
          sums_w[w] += sum + counts[w] * shift;
          squares_w[w] += square + shift * (2.0 * sum + counts[w] * shift);
        }
      }
      for (int64_t w = 0; w < lanes; ++w) {
        sums[strip + strips.channel_of[w]] += sums_w[w];
        squares[strip + strips.channel_of[w]] += squares_w[w];
      }
    }

    const double plane = static_cast<double>(g.shape.plane), count = plane * static_cast<double>(per_group);
    std::vector<double> means(channels), rstds(channels);
    for (int64_t begin = 0; begin < channels; begin += per_group) {
      double group_mean = 0, square = 0;
      for (int64_t c = begin; c < begin + per_group; ++c) group_mean += sums[c] + plane * centers[c];
      group_mean /= count;
      for (int64_t c = begin; c < begin + per_group; ++c) {
        const double d = centers[c] - group_mean;
        square += squares[c] + d * (2.0 * sums[c] + plane * d);
      }
      const double group_rstd = 1.0 / std::sqrt(square / count + g.eps);
      std::fill_n(&means[begin], per_group, group_mean);
      std::fill_n(&rstds[begin], per_group, group_rstd);
      const int64_t group = (first + n) * g.groups + begin / per_group;
      g.mean[group] = static_cast<float>(group_mean);
      g.rstd[group] = static_cast<float>(group_rstd);
    }
    set_affine(first, n, means, rstds);
  };

  for_batches(g.shape, 2 * size_of(g.x_type), [&](int64_t first, int64_t samples) {
    moments.resize(samples * sample_tiles * 3 * lanes);
    table.resize(samples);
    exact.resize(samples);
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      const Scratch buffer = make_scratch(strips.room());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.rows * lanes + tile.left;
        set_moments(strips, tile, load_as<T>(g.x, g.x_type, index, size, buffer.get()), &moments[i * 3 * lanes]);
      }
    });
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) combine(first, n);
    });
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      const Scratch buffer = make_scratch(strips.room()), result = make_scratch(strips.room()),
                    scratch = make_scratch(table.room());
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.rows * lanes + tile.left;
        const T* x = load_as<T>(g.x, g.x_type, index, size, buffer.get());
        T* y = place_as<T>(g.y, g.x_type, index, result.get());
        const float* means = table.get(tile, mean, scratch.get());
        const float* factors = table.get(tile, factor, scratch.get());
        const float* offsets = table.get(tile, offset, scratch.get());
        const auto function = g.silu ? normalise<true, T> : normalise<false, T>;
        if (exact[tile.sample].empty()) {
          function(strips, tile, x, means, factors, offsets, y);
        } else {
          normalise_exactly(strips, tile, g.silu, exact[tile.sample], x, y);
        }
        if (static_cast<void*>(y) == result.get()) store(result.get(), size, g.y, g.x_type, index);
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
