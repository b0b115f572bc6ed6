// Group norm's inner loops for bfloat16 with AVX-512 intrinsics, 32 elements at a time. Compilers take twice as many
// instructions to clamp, divide and test for NaN, and keep sums in memory.
//
// Sixteen words of two bfloat16 are the lanes w ... w + 15 (their first elements) and half + w ... (their second ones).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/lanes.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ddpm_fast::cpu {

constexpr double log2_e = 1.4426950408889634;

// The factor by which tables multiply SiLU's argument z: -1, since the exponential is of -z; with AVX-512 -log2 e,
// since it is a power of two; 1 without SiLU.
template <class T>
constexpr double argument_unit(bool silu) {
#ifdef __AVX512F__
  if (silu && std::is_same_v<T, Bf16>) return -log2_e;
#endif
  return silu ? -1.0 : 1.0;
}

#ifdef __AVX512F__

inline __m512 firsts(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline __m512 seconds(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
}

// Rounds to the nearest bfloat16, and ties away from zero: rounding them to even, as the scalar conversion does, would
// take more instructions. (Of SiLU's results, which have an error of 2^-13 here, none is a tie but by chance.)
// AVX512-BF16's conversion takes as long, and leaves the elements in another order. NaN stays NaN if its lower half is
// zero, which is so for every NaN that arithmetic creates or that was a bfloat16.
inline __m512i words_of(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_add_epi32(_mm512_castps_si512(second), half));
}

// SiLU and its slope at z, from t = -z log2 e, which is what the tables give: z is then t / -log2 e, and the division
// is one with that of the sigmoid. 1 / (1 + 2^t) is right to 2^-12.8, where bfloat16 keeps 2^-8: the reciprocal to
// 2^-14, and the series, minimax on [0, 1), to 2^-13.7.
struct Exponential {
  __m512 e, d_inverse;  // -log2 e 2^t and 1 / (-log2 e (1 + 2^t))
};
inline Exponential exponential_of(__m512 t) {
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(-0.11256559193134308f), _mm512_set1_ps(-0.3261459767818451f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.0038756132125854f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.44258713722229f));
  const __m512 e = _mm512_scalef_ps(p, t);  // which takes the floor of t
  return {e, _mm512_rcp14_ps(_mm512_sub_ps(e, _mm512_set1_ps(static_cast<float>(log2_e))))};
}

// 2^t may be infinite: SiLU of what is less than -88 is -0.
inline __m512 silu_of_exponent(__m512 t) { return _mm512_mul_ps(t, exponential_of(t).d_inverse); }

// s (1 + z (1 - s)) with s = 1 / (1 + 2^t).
inline __m512 silu_slope_of_exponent(__m512 t) {
  const __m512 limited = _mm512_min_ps(_mm512_set1_ps(126.0f), t);  // NaN stays
  const Exponential x = exponential_of(limited);
  const __m512 complement = _mm512_mul_ps(x.e, x.d_inverse);
  const __m512 rest = _mm512_fmadd_ps(limited, complement, _mm512_set1_ps(static_cast<float>(-log2_e)));
  return _mm512_mul_ps(x.d_inverse, rest);
}

// A column of a tile: sixteen words of each of some rows, or as many as the mask says; a mask costs an instruction.
template <bool whole>
struct Column16 {
  int64_t at, w, rows;  // the offset of the first row in the tile, and the lane of the first word
  __mmask16 mask;

  __m512 row_of(const float* table, int64_t lane) const {
    return whole ? _mm512_loadu_ps(table + lane) : _mm512_maskz_loadu_ps(mask, table + lane);
  }
  void set_row(float* table, int64_t lane, __m512 values) const {
    whole ? _mm512_storeu_ps(table + lane, values) : _mm512_mask_storeu_ps(table + lane, mask, values);
  }
  __m512i words(const Bf16* tile, int64_t offset) const {
    const Bf16* from = tile + offset + 2 * w;
    // The hardware prefetcher stops at page boundaries.
    _mm_prefetch(reinterpret_cast<const char*>(from + 2048), _MM_HINT_T0);
    return whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(mask, from);
  }
  void set_words(Bf16* tile, int64_t offset, __m512i words) const {
    void* to = tile + offset + 2 * w;
    whole ? _mm512_storeu_si512(to, words) : _mm512_mask_storeu_epi32(to, mask, words);
  }
};

// Calls f with all columns of a tile, of a few rows at a time: tables stay in registers, and memory is read in order.
// What is left is the last element of an odd last row.
template <class F>
void for_columns(int64_t lanes, int64_t rows, int64_t left, const F& f) {
  constexpr int64_t few = 16;
  const auto of_rows = [&](int64_t first, int64_t count, int64_t words) {
    int64_t w = 0;
    for (; w + 16 <= words; w += 16) f(Column16<true>{first * lanes, w, count, 0xFFFF});
    if (w < words) f(Column16<false>{first * lanes, w, count, static_cast<__mmask16>((1 << (words - w)) - 1)});
  };
  for (int64_t r = 0; r < rows; r += few) of_rows(r, rows - r < few ? rows - r : few, lanes / 2);
  if (left > 1) of_rows(rows, 1, left / 2);
}

#endif
}  // namespace ddpm_fast::cpu
