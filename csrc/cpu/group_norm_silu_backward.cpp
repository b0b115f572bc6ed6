#include <cmath>

#include "cpu/exponential.h"
#include "cpu/group_norm.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/silu_avx512.h"

namespace ddpm_fast::cpu {
namespace {

// y = silu((x - mean) factor + offset), with g the gradient before the silu; the table has -factor and -offset.
// grad_x = of_grad g + of_deviation (x - mean) + constant.
enum Column { mean, factor, offset, of_grad, of_deviation, constant, columns };

// Both passes need g. The second finds it kept by the first where that is still in the cache; from memory it would come
// later than it is made again.
enum class Gradient { no_silu, again, kept };

inline float before_silu(float grad, float deviation, float minus_factor, float minus_offset) {
  const float z = fused(deviation, minus_factor, minus_offset), e = exponential(z);  // -z
  const float sigmoid = 1.0f / (1.0f + e);
  return grad * (sigmoid * fused(-z, e * sigmoid, 1.0f));
}

#ifdef __AVX512F__
// The gradient before the silu, and the deviation it belongs to.
struct Before {
  __m512 g, deviation;
};
inline Before before_silu(__m512 grad, __m512 x, __m512 mean, __m512 minus_factor, __m512 minus_offset) {
  const __m512 deviation = _mm512_sub_ps(x, mean);
  const __m512 minus_z = _mm512_fmadd_ps(deviation, minus_factor, minus_offset);
  return {_mm512_mul_ps(grad, silu_slope_of_minus(minus_z)), deviation};
}

template <bool keep>
void add_sums_16(const Strips& strips, const Tile& tile, const Bf16* grad, const Bf16* x, const float* const* lane,
    float* kept, float* sums, float* products) {
  const int64_t lanes = strips.lanes, half = strips.half;
  for_columns(lanes, tile.rows, tile.left, [=](const Column16& column) {
    for (int64_t second = 0; second < 2; ++second) {
      const int64_t w = column.w + second * half;
      const __m512 mean_w = column.row_of(lane[mean], w);
      const __m512 factor_w = column.row_of(lane[factor], w), offset_w = column.row_of(lane[offset], w);
      __m512 sum = column.row_of(sums, w), product = column.row_of(products, w);
      for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
        const __m512i grads = column.words(grad, at), values = column.words(x, at);
        const Before b = before_silu(second ? seconds(grads) : firsts(grads), second ? seconds(values) : firsts(values),
            mean_w, factor_w, offset_w);
        if (keep) column.set_row(kept + at, w, b.g);
        sum = _mm512_add_ps(sum, b.g);
        product = _mm512_fmadd_ps(b.g, b.deviation, product);
      }
      column.set_row(sums, w, sum);
      column.set_row(products, w, product);
    }
  });
  if (tile.left % 2) {
    const int64_t at = tile.rows * lanes, w = tile.left / 2;
    const float d = from_bf16(x[at + tile.left - 1].bits) - lane[mean][w];
    const float g = before_silu(from_bf16(grad[at + tile.left - 1].bits), d, lane[factor][w], lane[offset][w]);
    if (keep) kept[at + w] = g;
    sums[w] += g;
    products[w] += g * d;
  }
}

template <bool kept_before>
void set_grad_x_16(const Strips& strips, const Tile& tile, const Bf16* grad, const Bf16* x, const float* const* lane,
    const float* kept, Bf16* grad_x) {
  const int64_t lanes = strips.lanes, half = strips.half;
  for_columns(lanes, tile.rows, tile.left, [=](const Column16& column) {
    struct Table {
      __m512 mean, factor, offset, of_grad, of_deviation, constant;
    };
    const auto table_of = [&](int64_t w) {
      return Table{column.row_of(lane[mean], w), column.row_of(lane[factor], w), column.row_of(lane[offset], w),
          column.row_of(lane[of_grad], w), column.row_of(lane[of_deviation], w), column.row_of(lane[constant], w)};
    };
    const Table first = table_of(column.w), second = table_of(column.w + half);
    const auto gradient = [=](const Table& t, __m512 grad_y, __m512 v, const float* of_row) {
      Before b;
      if (kept_before) {
        b = {column.row_of(of_row, 0), _mm512_sub_ps(v, t.mean)};
      } else {
        b = before_silu(grad_y, v, t.mean, t.factor, t.offset);
      }
      return _mm512_fmadd_ps(b.g, t.of_grad, _mm512_fmadd_ps(b.deviation, t.of_deviation, t.constant));
    };
    for (int64_t r = 0, at = column.at; r < column.rows; ++r, at += lanes) {
      const __m512i values = column.words(x, at);
      const __m512i grads = kept_before ? values : column.words(grad, at);  // not needed where g was kept
      const float* of_row = kept_before ? kept + at + column.w : nullptr;
      const __m512 a = gradient(first, firsts(grads), firsts(values), of_row);
      const __m512 b = gradient(second, seconds(grads), seconds(values), kept_before ? of_row + half : nullptr);
      column.set_words(grad_x, at, words_of(a, b));
    }
  });
  if (tile.left % 2) {
    const int64_t at = tile.rows * lanes, w = tile.left / 2, last = at + tile.left - 1;
    const float d = from_bf16(x[last].bits) - lane[mean][w];
    const float g =
        kept_before ? kept[at + w] : before_silu(from_bf16(grad[last].bits), d, lane[factor][w], lane[offset][w]);
    const float rest = fused(d, lane[of_deviation][w], lane[constant][w]);
    grad_x[last].bits = to_bf16(fused(g, lane[of_grad][w], rest));
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

template <class T>
void run_as(const GroupNormSiluBackward& b) {
  const Strips strips(b.shape, std::is_same_v<T, Bf16>);
  const int64_t channels = b.shape.channels, per_group = channels / b.groups, sample_tiles = strips.tiles_per_sample();
  const int64_t sample_size = channels * b.shape.plane, lanes = strips.lanes;
  const std::vector<float> weight = to_floats(b.weight, b.parameter_type, 0, channels);
  const std::vector<float> bias = to_floats(b.bias, b.parameter_type, 0, channels);
  std::vector<float> partial;  // (samples, strips, tiles, 2, lanes)
  LaneTable table(strips, columns, channels);

  const auto set_affine = [&](int64_t first, int64_t n) {
    const std::vector<float> scale = to_floats(b.scale, b.x_type, (first + n) * channels, channels);
    const std::vector<float> shift = to_floats(b.shift, b.x_type, (first + n) * channels, channels);
    std::vector<float> means(channels), factors(channels), offsets(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t group = (first + n) * b.groups + c / per_group;
      means[c] = b.mean[group];
      factors[c] = -(b.rstd[group] * weight[c] * (1.0f + scale[c]));
      offsets[c] = -(bias[c] * (1.0f + scale[c]) + shift[c]);
    }
    table.set(n, mean, means.data());
    table.set(n, factor, factors.data());
    table.set(n, offset, offsets.data());
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
      }
    }
    table.set(n, of_grad, of_grads.data());
    table.set(n, of_deviation, of_deviations.data());
    table.set(n, constant, constants.data());
  };

  const int64_t bytes = 3 * size_of(b.x_type) + sizeof(float);
  const bool keep = b.silu && sample_size * bytes <= 2 * cache_size();
  std::vector<float> kept;
  for_batches(b.shape, bytes, [&](int64_t first, int64_t samples) {
    if (keep) kept.resize(samples * sample_tiles * strips.room_of_lanes());
    partial.resize(samples * sample_tiles * 2 * lanes);
    table.resize(samples);
    for (int64_t n = 0; n < samples; ++n) set_affine(first, n);

    // What both passes have in common; f gets a tile's gradient and x, its lanes and its number.
    const auto for_tiles = [&](Column last, const auto& f) {
      parallel_tiles(strips, samples, [&](int64_t begin, int64_t end) {
        std::vector<float> grad_buffer(strips.room()), x_buffer(strips.room()), scratch(table.room());
        const float* lane[columns];
        for (int64_t i = begin; i < end; ++i) {
          const Tile tile = strips.tile(i);
          const int64_t index = first * sample_size + tile.index, size = tile.rows * lanes + tile.left;
          const T* grad = load_as<T>(b.grad, b.x_type, index, size, grad_buffer.data());
          const T* x = load_as<T>(b.x, b.x_type, index, size, x_buffer.data());
          for (int64_t column = 0; column < last; ++column) lane[column] = table.get(tile, column, scratch.data());
          f(tile, i, index, grad, x, lane);
        }
      });
    };
    const auto kept_of = [&](int64_t i) { return keep ? kept.data() + i * strips.room_of_lanes() : nullptr; };
    const auto sum = keep ? add_sums<Gradient::kept, T>
        : b.silu          ? add_sums<Gradient::again, T>
                          : add_sums<Gradient::no_silu, T>;
    for_tiles(of_grad, [&](const Tile& tile, int64_t i, int64_t, const T* grad, const T* x, const float* const* lane) {
      float* out = &partial[i * 2 * lanes];
      std::fill_n(out, 2 * lanes, 0.0f);
      sum(strips, tile, grad, x, lane, kept_of(i), out, out + lanes);
    });
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) combine(first, n);
    });
    const auto set = keep ? set_grad_x<Gradient::kept, T>
        : b.silu          ? set_grad_x<Gradient::again, T>
                          : set_grad_x<Gradient::no_silu, T>;
    for_tiles(
        columns, [&](const Tile& tile, int64_t i, int64_t index, const T* grad, const T* x, const float* const* lane) {
          // In half precision, the result may take the place of what it was made from.
          float* buffer = const_cast<float*>(reinterpret_cast<const float*>(x));
          T* out = place_as<T>(b.grad_x, b.x_type, index, buffer);
          set(strips, tile, grad, x, lane, kept_of(i), out);
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
