#include <cmath>

#include "cpu/exponential.h"
#include "cpu/group_norm.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/silu_avx512.h"

namespace ddpm_fast::cpu {
namespace {

// y = silu((x - mean) factor + offset), with g the gradient before the silu; factor and offset in `argument_unit`s.
// grad_x = of_grad g + of_deviation (x - mean) + constant.
enum Column { mean, factor, offset, of_grad, of_deviation, constant, columns };

// Both passes need g. The first stores it for the second if it fits in the cache; reading it from memory would take
// longer than computing it again.
enum class Gradient { no_silu, again, kept };

inline float before_silu(float grad, float deviation, float minus_factor, float minus_offset) {
  const float minus_z = fused(deviation, minus_factor, minus_offset);
  // 88 stands for all that is more: the slope is 0 there, which the limited exponential alone times z would not be.
  const float z = 88.0f < minus_z ? 88.0f : minus_z, e = exponential(z);
  const float sigmoid = 1.0f / (1.0f + e);
  return grad * (sigmoid * fused(-z, e * sigmoid, 1.0f));
}

#ifdef __AVX512F__
// The tables' values for sixteen lanes.
struct Lanes16 {
  template <bool whole>
  Lanes16(const Column16<whole>& column, const float* const* lane, int64_t w)
      : mean_w(column.row_of(lane[mean], w)),
        factor_w(column.row_of(lane[factor], w)),
        offset_w(column.row_of(lane[offset], w)) {}

  __m512 deviation(__m512 x) const { return _mm512_sub_ps(x, mean_w); }
  __m512 before_silu(__m512 grad, __m512 deviation) const {
    return _mm512_mul_ps(grad, silu_slope_of_exponent(_mm512_fmadd_ps(deviation, factor_w, offset_w)));
  }

  __m512 mean_w, factor_w, offset_w;
};

// What grad_x takes besides.
struct GradLanes16 : Lanes16 {
  template <bool whole>
  GradLanes16(const Column16<whole>& column, const float* const* lane, int64_t w)
      : Lanes16(column, lane, w),
        of_grad_w(column.row_of(lane[of_grad], w)),
        of_deviation_w(column.row_of(lane[of_deviation], w)),
        constant_w(column.row_of(lane[constant], w)) {}

  __m512 grad_x(__m512 g, __m512 deviation) const {
    return _mm512_fmadd_ps(g, of_grad_w, _mm512_fmadd_ps(deviation, of_deviation_w, constant_w));
  }

  __m512 of_grad_w, of_deviation_w, constant_w;
};

// The gradient before the silu, of one element.
inline float before_silu_of_last(Bf16 grad, float deviation, const float* const* lane, int64_t w) {
  const __m512 t = _mm512_set1_ps(fused(deviation, lane[factor][w], lane[offset][w]));
  return from_bf16(grad.bits) * _mm512_cvtss_f32(silu_slope_of_exponent(t));
}

template <bool keep>
void add_sums_16(const Strips& strips, const Tile& tile, const Bf16* grad, const Bf16* x, const float* const* lane,
    float* kept, float* sums, float* products) {
  const int64_t lanes = strips.lanes, half = strips.half;
  for_columns(lanes, tile.rows, tile.left, [=](const auto& column) {
    const int64_t w0 = column.w, w1 = column.w + half;
    const Lanes16 lanes0(column, lane, w0), lanes1(column, lane, w1);
    __m512 sum0 = column.row_of(sums, w0), sum1 = column.row_of(sums, w1);
    __m512 product0 = column.row_of(products, w0), product1 = column.row_of(products, w1);
    for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
      const __m512i grads = column.words(grad, at), values = column.words(x, at);
      const __m512 d0 = lanes0.deviation(firsts(values)), d1 = lanes1.deviation(seconds(values));
      const __m512 g0 = lanes0.before_silu(firsts(grads), d0), g1 = lanes1.before_silu(seconds(grads), d1);
      if (keep) column.set_row(kept + at, w0, g0), column.set_row(kept + at, w1, g1);
      sum0 = _mm512_add_ps(sum0, g0), sum1 = _mm512_add_ps(sum1, g1);
      product0 = _mm512_fmadd_ps(g0, d0, product0), product1 = _mm512_fmadd_ps(g1, d1, product1);
    }
    column.set_row(sums, w0, sum0), column.set_row(sums, w1, sum1);
    column.set_row(products, w0, product0), column.set_row(products, w1, product1);
  });
  if (tile.left % 2) {
    const int64_t at = tile.rows * lanes, w = tile.left / 2, last = at + tile.left - 1;
    const float d = from_bf16(x[last].bits) - lane[mean][w], g = before_silu_of_last(grad[last], d, lane, w);
    if (keep) kept[at + w] = g;
    sums[w] += g;
    products[w] += g * d;
  }
}

template <bool kept_before>
void set_grad_x_16(const Strips& strips, const Tile& tile, const Bf16* grad, const Bf16* x, const float* const* lane,
    const float* kept, Bf16* grad_x) {
  const int64_t lanes = strips.lanes, half = strips.half;
  for_columns(lanes, tile.rows, tile.left, [=](const auto& column) {
    const int64_t w0 = column.w, w1 = column.w + half;
    const GradLanes16 lanes0(column, lane, w0), lanes1(column, lane, w1);
    for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
      const __m512i values = column.words(x, at);
      const __m512 d0 = lanes0.deviation(firsts(values)), d1 = lanes1.deviation(seconds(values));
      __m512 g0, g1;
      if (kept_before) {
        g0 = column.row_of(kept + at, w0), g1 = column.row_of(kept + at, w1);
      } else {
        const __m512i grads = column.words(grad, at);
        g0 = lanes0.before_silu(firsts(grads), d0), g1 = lanes1.before_silu(seconds(grads), d1);
      }
      column.set_words(grad_x, at, words_of(lanes0.grad_x(g0, d0), lanes1.grad_x(g1, d1)));
    }
  });
  if (tile.left % 2) {
    const int64_t at = tile.rows * lanes, w = tile.left / 2, last = at + tile.left - 1;
    const float d = from_bf16(x[last].bits) - lane[mean][w];
    const float g = kept_before ? kept[at + w] : before_silu_of_last(grad[last], d, lane, w);
    grad_x[last].bits = to_bf16(fused(g, lane[of_grad][w], fused(d, lane[of_deviation][w], lane[constant][w])));
  }
}
#endif

template <Gradient from, class T>
void add_sums(const Strips& strips, const Tile& tile, const T* grad, const T* x, const float* const* lane, float* kept,
    float* sums, float* products) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, Bf16> && from != Gradient::no_silu) {
    return add_sums_16<from == Gradient::kept>(strips, tile, grad, x, lane, kept, sums, products);
  }
#endif
  const float *means = lane[mean], *factors = lane[factor], *offsets = lane[offset];
  strips.for_rows(tile, [=, half = strips.half](int64_t at, int64_t width) {
    const auto add = [=](int64_t w, float grad_y, float v) {
      const float d = v - means[w];
      const float g = from == Gradient::no_silu ? grad_y : before_silu(grad_y, d, factors[w], offsets[w]);
      if constexpr (from == Gradient::kept) kept[at + w] = g;
      sums[w] += g;
      products[w] += g * d;
    };
    visit(width, half, add, grad + at, x + at);
  });
}

template <Gradient from, class T>
void set_grad_x(const Strips& strips, const Tile& tile, const T* grad, const T* x, const float* const* lane,
    const float* kept, T* grad_x) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, Bf16> && from != Gradient::no_silu) {
    return set_grad_x_16<from == Gradient::kept>(strips, tile, grad, x, lane, kept, grad_x);
  }
#endif
  const float *means = lane[mean], *factors = lane[factor], *offsets = lane[offset];
  const float *of_grads = lane[of_grad], *of_deviations = lane[of_deviation], *constants = lane[constant];
  strips.for_rows(tile, [=, half = strips.half](int64_t at, int64_t width) {
    const auto gradient = [=](int64_t w, float g, float d) {
      return fused(g, of_grads[w], fused(d, of_deviations[w], constants[w]));
    };
    if constexpr (from == Gradient::kept) {
      const auto from_kept = [=](int64_t w, float v) { return gradient(w, kept[at + w], v - means[w]); };
      map(width, half, grad_x + at, from_kept, x + at);
    } else {
      const auto from_both = [=](int64_t w, float grad_y, float v) {
        const float d = v - means[w];
        return gradient(w, from == Gradient::no_silu ? grad_y : before_silu(grad_y, d, factors[w], offsets[w]), d);
      };
      map(width, half, grad_x + at, from_both, grad + at, x + at);
    }
  });
}

// The gradient before the silu, of one element.
inline double exact_before_silu(double grad, double z, bool silu) {
  if (!silu) return grad;
  const double sigmoid = 1.0 / (1.0 + std::exp(-z));
  return grad * sigmoid * (1.0 + z * (1.0 - sigmoid));
}

template <class T>
void add_sums_exactly(const Strips& strips, const Tile& tile, bool silu, const ExactChannels& channels, const T* grad,
    const T* x, float* sums, float* products) {
  strips.for_elements(tile, [&](int64_t i, int64_t c) {
    const ExactChannel& channel = channels[c];
    const double z = channel.affine(channel.normalised(value_of(x, i)));
    const double g = exact_before_silu(value_of(grad, i), z, silu);
    const int64_t w = strips.lane_of(i % strips.lanes, std::is_same_v<T, Bf16>);
    sums[w] += static_cast<float>(g);
    products[w] += static_cast<float>(g * (value_of(x, i) - channel.mean));
  });
}

template <class T>
void set_grad_x_exactly(const Strips& strips, const Tile& tile, bool silu, const ExactChannels& channels, const T* grad,
    const T* x, T* grad_x) {
  strips.for_elements(tile, [&](int64_t i, int64_t c) {
    const ExactChannel& channel = channels[c];
    const double x_hat = channel.normalised(value_of(x, i));
    const double g = exact_before_silu(value_of(grad, i), channel.affine(x_hat), silu);
    const double gamma = channel.weight * channel.one_and_scale;
    const double result = channel.rstd * (g * gamma - channel.mean_grad - x_hat * channel.mean_product);
    set_value(grad_x, i, static_cast<float>(result));
  });
}

template <class T>
void run_as(const GroupNormSiluBackward& b) {
  const Strips strips(b.shape, std::is_same_v<T, Bf16>);
  const int64_t channels = b.shape.channels, per_group = channels / b.groups, sample_tiles = strips.tiles_per_sample();
  const int64_t sample_size = channels * b.shape.plane, lanes = strips.lanes;
  const std::vector<float> weight = to_floats(b.weight, b.parameter_type, 0, channels);
  const std::vector<float> bias = to_floats(b.bias, b.parameter_type, 0, channels);
  std::vector<float> partial;  // (samples, strips, tiles, 2, lanes)
  LaneTable table(strips, columns, channels);
  std::vector<ExactChannels> exact;  // of each sample
  const auto unit = static_cast<float>(argument_unit<T>(b.silu));

  const auto set_affine = [&](int64_t first, int64_t n) {
    const std::vector<float> scale = to_floats(b.scale, b.x_type, (first + n) * channels, channels);
    const std::vector<float> shift = to_floats(b.shift, b.x_type, (first + n) * channels, channels);
    std::vector<float> means(channels), factors(channels), offsets(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t group = (first + n) * b.groups + c / per_group;
      means[c] = b.mean[group];
      factors[c] = unit * (b.rstd[group] * weight[c] * (1.0f + scale[c]));
      offsets[c] = unit * (bias[c] * (1.0f + scale[c]) + shift[c]);
    }
    table.set(n, mean, means.data());
    table.set(n, factor, factors.data());
    table.set(n, offset, offsets.data());
    exact[n].clear();
    if (all_finite(means) && all_finite(factors) && all_finite(offsets)) return;
    for (int64_t c = 0; c < channels; ++c) {
      const double rstd = b.rstd[(first + n) * b.groups + c / per_group];
      exact[n].push_back({means[c], rstd, weight[c], bias[c], 1.0 + scale[c], shift[c], 0.0, 0.0});
    }
  };

  // From the sums of all lanes and tiles of a sample to its part of the workspace, and to what the second pass needs.
  const auto combine = [&](int64_t first, int64_t n) {
    std::vector<double> of_lanes(2 * lanes), sums(channels, 0.0), products(channels, 0.0);
    for (int64_t strip = 0; strip < strips.strips; ++strip) {
      std::fill(of_lanes.begin(), of_lanes.end(), 0.0);
      for (int64_t i = 0; i < strips.tiles; ++i) {
        const float* of_tile = &partial[((n * strips.strips + strip) * strips.tiles + i) * 2 * lanes];
        for (int64_t w = 0; w < 2 * lanes; ++w) of_lanes[w] += of_tile[w];
      }
      for (int64_t w = 0; w < lanes; ++w) {
        sums[strip + strips.channel_of[w]] += of_lanes[w];
        products[strip + strips.channel_of[w]] += of_lanes[w + lanes];
      }
    }
    const std::vector<float> scale = to_floats(b.scale, b.x_type, (first + n) * channels, channels);
    const double count = static_cast<double>(per_group * b.shape.plane);
    std::vector<float> of_grads(channels), of_deviations(channels), constants(channels);
    for (int64_t begin = 0; begin < channels; begin += per_group) {
      const double rstd = b.rstd[(first + n) * b.groups + begin / per_group];
      double mean_grad = 0, mean_product = 0;
      for (int64_t c = begin; c < begin + per_group; ++c) {
        const double gamma = weight[c] * (1.0 + scale[c]);
        products[c] *= rstd;
        mean_grad += gamma * sums[c] / count;
        mean_product += gamma * products[c] / count;
        of_grads[c] = static_cast<float>(rstd * gamma);
        b.workspace[2 * ((first + n) * channels + c)] = static_cast<float>(sums[c]);
        b.workspace[2 * ((first + n) * channels + c) + 1] = static_cast<float>(products[c]);
      }
      for (int64_t c = begin; c < begin + per_group; ++c) {
        of_deviations[c] = static_cast<float>(-rstd * rstd * mean_product);
        constants[c] = static_cast<float>(-rstd * mean_grad);
        if (!exact[n].empty()) exact[n][c].mean_grad = mean_grad, exact[n][c].mean_product = mean_product;
      }
    }
    table.set(n, of_grad, of_grads.data());
    table.set(n, of_deviation, of_deviations.data());
    table.set(n, constant, constants.data());
  };

  const int64_t bytes = 3 * size_of(b.x_type) + sizeof(float);
  const bool keep = b.silu && sample_size * bytes <= 2 * cache_size();
  Scratch kept;
  int64_t kept_size = 0;
  for_batches(b.shape, bytes, [&](int64_t first, int64_t samples) {
    // The first batch is the largest.
    if (keep && !kept) {
      kept_size = samples * sample_tiles * strips.room_of_lanes();
      kept = make_scratch(kept_size);
    }
    partial.resize(samples * sample_tiles * 2 * lanes);
    table.resize(samples);
    exact.resize(samples);
    for (int64_t n = 0; n < samples; ++n) set_affine(first, n);

    // What both passes have in common; f gets a tile's gradient and x, its lanes and its number.
    const auto for_tiles = [&](Column last, const auto& f) {
      parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
        const Scratch grad_buffer = make_scratch(strips.room()), x_buffer = make_scratch(strips.room()),
                      scratch = make_scratch(table.room());
        const float* lane[columns];
        for (int64_t i = begin; i < end; ++i) {
          const Tile tile = strips.tile(i);
          const int64_t index = first * sample_size + tile.index, size = tile.rows * lanes + tile.left;
          const T* grad = load_as<T>(b.grad, b.x_type, index, size, grad_buffer.get());
          const T* x = load_as<T>(b.x, b.x_type, index, size, x_buffer.get());
          for (int64_t column = 0; column < last; ++column) lane[column] = table.get(tile, column, scratch.get());
          f(tile, i, index, grad, x, lane);
        }
      });
    };
    const auto kept_of = [&](int64_t i) -> float* {
      if (!keep) return nullptr;
      STD_TORCH_CHECK((i + 1) * strips.room_of_lanes() <= kept_size, "group_norm_silu_backward: no room for tile ", i);
      return kept.get() + i * strips.room_of_lanes();
    };
    const auto sum = keep ? add_sums<Gradient::kept, T>
        : b.silu          ? add_sums<Gradient::again, T>
                          : add_sums<Gradient::no_silu, T>;
    for_tiles(of_grad, [&](const Tile& tile, int64_t i, int64_t, const T* grad, const T* x, const float* const* lane) {
      float* out = &partial[i * 2 * lanes];
      std::fill_n(out, 2 * lanes, 0.0f);
      const ExactChannels& of_sample = exact[tile.sample];
      if (of_sample.empty()) {
        sum(strips, tile, grad, x, lane, kept_of(i), out, out + lanes);
      } else {
        add_sums_exactly(strips, tile, b.silu, of_sample, grad, x, out, out + lanes);
      }
    });
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) combine(first, n);
    });
    const auto set = keep ? set_grad_x<Gradient::kept, T>
        : b.silu          ? set_grad_x<Gradient::again, T>
                          : set_grad_x<Gradient::no_silu, T>;
    for_tiles(
        columns, [&](const Tile& tile, int64_t i, int64_t index, const T* grad, const T* x, const float* const* lane) {
          // In half precision, the result overwrites the converted x that it was computed from.
          float* buffer = const_cast<float*>(reinterpret_cast<const float*>(x));
          T* out = place_as<T>(b.grad_x, b.x_type, index, buffer);
          const ExactChannels& of_sample = exact[tile.sample];
          if (of_sample.empty()) {
            set(strips, tile, grad, x, lane, kept_of(i), out);
          } else {
            set_grad_x_exactly(strips, tile, b.silu, of_sample, grad, x, out);
          }
          if (static_cast<void*>(out) == buffer) {
            store(buffer, tile.rows * lanes + tile.left, b.grad_x, b.x_type, index);
          }
        });
  });

  std::vector<double> grad_weight(channels, 0.0), grad_bias(channels, 0.0);
  std::vector<float> row(2 * channels);
  for (int64_t n = 0; n < b.shape.samples; ++n) {
    const std::vector<float> scale = to_floats(b.scale, b.x_type, n * channels, channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double sum = b.workspace[2 * (n * channels + c)], product = b.workspace[2 * (n * channels + c) + 1];
      grad_bias[c] += sum * (1.0 + scale[c]);
      grad_weight[c] += product * (1.0 + scale[c]);
      row[c] = static_cast<float>(product * weight[c] + sum * bias[c]);
      row[channels + c] = static_cast<float>(sum);
    }
    if (!b.scale) continue;
    store(row.data(), channels, b.grad_scale, b.x_type, n * channels);
    store(row.data() + channels, channels, b.grad_shift, b.x_type, n * channels);
  }
  std::copy(grad_weight.begin(), grad_weight.end(), row.begin());
  std::copy(grad_bias.begin(), grad_bias.end(), row.begin() + channels);
  store(row.data(), channels, b.grad_weight, b.parameter_type, 0);
  store(row.data() + channels, channels, b.grad_bias, b.parameter_type, 0);
}

}  // namespace

void run(const GroupNormSiluBackward& b) {
  prefer_huge_pages(b.grad_x, size_of(b.shape, b.x_type));
  b.x_type == Type::bf16 ? run_as<Bf16>(b) : run_as<float>(b);
}

}  // namespace ddpm_fast::cpu
