#include <cmath>

#include "cpu/exponential.h"
#include "cpu/group_norm.h"
#include "cpu/kernels.h"

namespace ddpm_fast::cpu {
namespace {

// What a lane needs to know of its channel.
struct Lanes {
  const float *mean, *factor, *offset;
  const float *of_grad, *of_deviation, *constant;
};

struct Slope {
  float grad, deviation;
};

// The gradient before the silu, and x - mean.
template <bool silu>
inline Slope slope(float grad, float x, float mean, float factor, float offset) {
  const float d = x - mean;
  if constexpr (!silu) return {grad, d};
  const float z = fused(d, factor, offset), e = exponential(-z);
  const float sigmoid = 1.0f / (1.0f + e);
  return {grad * sigmoid * fused(z, e * sigmoid, 1.0f), d};
}

template <bool silu>
void add_sums(const float* __restrict__ grad, const float* __restrict__ x, int64_t rows, int64_t width,
    const float* __restrict__ mean, const float* __restrict__ factor, const float* __restrict__ offset,
    float* __restrict__ sums, float* __restrict__ products) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < width; ++w) {
      const Slope s = slope<silu>(grad[r * width + w], x[r * width + w], mean[w], factor[w], offset[w]);
      sums[w] += s.grad;
      products[w] += s.grad * s.deviation;
    }
  }
}

template <bool silu>
void set_grad_x(const float* __restrict__ grad, const float* __restrict__ x, int64_t rows, int64_t width,
    const float* __restrict__ mean, const float* __restrict__ factor, const float* __restrict__ offset,
    const float* __restrict__ of_grad, const float* __restrict__ of_deviation, const float* __restrict__ constant,
    float* __restrict__ grad_x) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < width; ++w) {
      const Slope s = slope<silu>(grad[r * width + w], x[r * width + w], mean[w], factor[w], offset[w]);
      grad_x[r * width + w] = fused(s.grad, of_grad[w], fused(s.deviation, of_deviation[w], constant[w]));
    }
  }
}

// y = silu((x - mean) factor + offset); grad_x = of_grad g + of_deviation (x - mean) + constant.
enum Column { mean, factor, offset, of_grad, of_deviation, constant, columns };

}  // namespace

void run(const GroupNormSiluBackward& b) {
  const Strips strips(b.shape);
  const int64_t channels = b.shape.channels, per_group = channels / b.groups, sample_tiles = strips.tiles_per_sample();
  const int64_t sample_size = channels * b.shape.plane;
  const std::vector<float> weight = to_floats(b.weight, b.parameter_type, channels);
  const std::vector<float> bias = to_floats(b.bias, b.parameter_type, channels);
  std::vector<double> grad_weight(channels, 0.0), grad_bias(channels, 0.0), partial;
  std::vector<float> table;  // (samples, columns, channels)

  const auto scale_of = [&](int64_t n, int64_t c) {
    float buffer;
    return b.scale ? 1.0f + *load(b.scale, b.x_type, n * channels + c, 1, &buffer) : 1.0f;
  };
  const auto set_affine = [&](int64_t n, float* of_sample) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t group = n * b.groups + c / per_group;
      float shift = 0;
      if (b.shift) shift = *load(b.shift, b.x_type, n * channels + c, 1, &shift);
      of_sample[mean * channels + c] = b.mean[group];
      of_sample[factor * channels + c] = b.rstd[group] * weight[c] * scale_of(n, c);
      of_sample[offset * channels + c] = bias[c] * scale_of(n, c) + shift;
    }
  };
  // From the sums of all tiles to workspace, and from there what the second pass needs.
  const auto combine = [&](int64_t n, const double* tiles, float* of_sample) {
    std::vector<double> sums(channels, 0.0), products(channels, 0.0);
    for (int64_t i = 0; i < strips.tiles; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const double* pair = tiles +
            (strips.strips == 1 ? 2 * i * channels + c : 2 * (c * strips.tiles + i));
        sums[c] += pair[0];
        products[c] += pair[strips.channels];
      }
    }
    const double count = static_cast<double>(per_group * b.shape.plane);
    for (int64_t group = 0; group < b.groups; ++group) {
      const double rstd = b.rstd[n * b.groups + group];
      double mean_grad = 0, mean_product = 0;
      for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
        const double gamma = static_cast<double>(weight[c]) * scale_of(n, c);
        mean_grad += gamma * sums[c] / count;
        mean_product += gamma * rstd * products[c] / count;
      }
      for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
        b.workspace[2 * (n * channels + c)] = static_cast<float>(sums[c]);
        b.workspace[2 * (n * channels + c) + 1] = static_cast<float>(rstd * products[c]);
        of_sample[of_grad * channels + c] = static_cast<float>(rstd * weight[c] * scale_of(n, c));
        of_sample[of_deviation * channels + c] = static_cast<float>(-rstd * rstd * mean_product);
        of_sample[constant * channels + c] = static_cast<float>(-rstd * mean_grad);
      }
    }
  };
  const auto spread = [&](const Tile& tile, Column first, Column last, float* lanes) {
    for (int64_t column = first; column < last; ++column) {
      const float* from = table.data() + (tile.sample * columns + column) * channels + tile.channel;
      std::copy_n(from, strips.channels, lanes + column * strips.lanes());
      strips.spread(lanes + column * strips.lanes());
    }
  };

  for_batches(b.shape, 3 * size_of(b.x_type), [&](int64_t first, int64_t samples) {
    partial.resize(samples * sample_tiles * strips.channels * 2);
    table.resize(samples * columns * channels);
    for (int64_t n = 0; n < samples; ++n) set_affine(first + n, &table[n * columns * channels]);
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      const int64_t width_of_lanes = strips.lanes();
      std::vector<float> x_buffer(strips.room()), grad_buffer(strips.room()), lanes(3 * width_of_lanes);
      std::vector<float> sums(2 * width_of_lanes);
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.pixels * strips.channels;
        spread(tile, mean, of_grad, lanes.data());
        const float* x = load(b.x, b.x_type, index, size, x_buffer.data());
        const float* grad = load(b.grad, b.x_type, index, size, grad_buffer.data());
        std::fill(sums.begin(), sums.end(), 0.0f);
        strips.for_rows(tile.pixels, [&](int64_t at, int64_t rows, int64_t width) {
          const auto function = b.silu ? add_sums<true> : add_sums<false>;
          function(grad + at, x + at, rows, width, &lanes[mean * width_of_lanes], &lanes[factor * width_of_lanes],
              &lanes[offset * width_of_lanes], sums.data(), sums.data() + width_of_lanes);
        });
        double* out = &partial[i * strips.channels * 2];
        strips.fold(sums.data(), out);
        strips.fold(sums.data() + width_of_lanes, out + strips.channels);
      }
    });
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        combine(first + n, partial.data() + n * sample_tiles * strips.channels * 2, &table[n * columns * channels]);
      }
    });
    parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
      const int64_t width_of_lanes = strips.lanes();
      std::vector<float> x_buffer(strips.room()), grad_buffer(strips.room()), lanes(columns * width_of_lanes);
      for (int64_t i = begin; i < end; ++i) {
        const Tile tile = strips.tile(i);
        const int64_t index = first * sample_size + tile.index, size = tile.pixels * strips.channels;
        spread(tile, mean, columns, lanes.data());
        const float* x = load(b.x, b.x_type, index, size, x_buffer.data());
        const float* grad = load(b.grad, b.x_type, index, size, grad_buffer.data());
        std::vector<float> result(strips.room());
        float* out = place(b.grad_x, b.x_type, index, result.data());
        strips.for_rows(tile.pixels, [&](int64_t at, int64_t rows, int64_t width) {
          const auto function = b.silu ? set_grad_x<true> : set_grad_x<false>;
          const auto column = [&](Column which) { return &lanes[which * width_of_lanes]; };
          function(grad + at, x + at, rows, width, column(mean), column(factor), column(offset), column(of_grad),
              column(of_deviation), column(constant), out + at);
        });
        if (out == result.data()) store(out, size, b.grad_x, b.x_type, index);
      }
    });
  });

  for (int64_t n = 0; n < b.shape.samples; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const double sum = b.workspace[2 * (n * channels + c)], product = b.workspace[2 * (n * channels + c) + 1];
      grad_weight[c] += product * scale_of(n, c);
      grad_bias[c] += sum * scale_of(n, c);
      if (b.scale) {
        const float grad_scale = static_cast<float>(product * weight[c] + sum * bias[c]);
        const float grad_shift = static_cast<float>(sum);
        store(&grad_scale, 1, b.grad_scale, b.x_type, n * channels + c);
        store(&grad_shift, 1, b.grad_shift, b.x_type, n * channels + c);
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float of_weight = static_cast<float>(grad_weight[c]), of_bias = static_cast<float>(grad_bias[c]);
    store(&of_weight, 1, b.grad_weight, b.parameter_type, c);
    store(&of_bias, 1, b.grad_bias, b.parameter_type, c);
  }
}

}  // namespace ddpm_fast::cpu
