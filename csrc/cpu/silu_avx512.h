// Group norm's inner loops for bfloat16, thirty-two elements at a time: compilers clamp, divide and look for NaN in
// twice as many instructions, and add up in memory.
//
// Sixteen words of two bfloat16 are the lanes w ... w + 15 (their first elements) and half + w ... (their second ones).
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

#include <cstdint>

namespace ddpm_fast::cpu {

inline __m512 firsts(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline __m512 seconds(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
}

// To nearest, ties to even, in the upper halves. NaN stays NaN as long as its lower half is zero, which it is of all
// that arithmetic makes and of all that was a bfloat16.
inline __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}
inline __m512i words_of(__m512 first, __m512 second) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(rounded(first), 16), rounded(second));
}

// 1 / (1 + e^x) and e^x, to 1e-6 where |x| < 16; no more than e^87.
struct Sigmoid {
  __m512 of_minus, exponential;
};
inline Sigmoid sigmoid_of_minus(__m512 x) {
  const __m512 t = _mm512_mul_ps(_mm512_min_ps(x, _mm512_set1_ps(87.0f)), _mm512_set1_ps(1.44269504f));
  // 2^t = 2^floor(t) 2^f; minimax on [0, 1), 9e-8.
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0018775766948238015f), _mm512_set1_ps(0.00898933969438076f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05582631751894951f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24015361070632935f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931530833244324f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999999403953552f));
  const __m512 e = _mm512_scalef_ps(p, t);  // which takes the floor of t
  const __m512 d = _mm512_add_ps(e, _mm512_set1_ps(1.0f));
  const __m512 guess = _mm512_rcp14_ps(d);
  const __m512 error = _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(1.0f));
  return {_mm512_fmadd_ps(guess, error, guess), e};
}

// silu(-x)
inline __m512 silu_of_minus(__m512 x) {
  const __m512 minus_x = _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
  return _mm512_mul_ps(minus_x, sigmoid_of_minus(x).of_minus);
}

// The slope of silu at -x: s (1 - x (1 - s)) with s = 1 / (1 + e^x).
inline __m512 silu_slope_of_minus(__m512 x) {
  const Sigmoid s = sigmoid_of_minus(x);
  const __m512 complement = _mm512_mul_ps(s.exponential, s.of_minus);
  return _mm512_mul_ps(s.of_minus, _mm512_fnmadd_ps(x, complement, _mm512_set1_ps(1.0f)));
}

// A column of a tile: sixteen words of each of some rows.
struct Column16 {
  int64_t at, w, rows;  // the offset of the first row in the tile, and the lane of the first word
  __mmask16 mask;

  __m512 row_of(const float* table, int64_t lane) const { return _mm512_maskz_loadu_ps(mask, table + lane); }
  void set_row(float* table, int64_t lane, __m512 values) const { _mm512_mask_storeu_ps(table + lane, mask, values); }
  __m512i words(const void* tile, int64_t offset) const {
    return _mm512_maskz_loadu_epi32(mask, static_cast<const uint16_t*>(tile) + offset + 2 * w);
  }
  void set_words(void* tile, int64_t offset, __m512i words) const {
    _mm512_mask_storeu_epi32(static_cast<uint16_t*>(tile) + offset + 2 * w, mask, words);
  }
};

// Calls f with all columns of a tile, of a few rows at a time: tables stay in registers, and memory is read in order.
// What is left is the last element of an odd last row.
template <class F>
void for_columns(int64_t lanes, int64_t rows, int64_t left, const F& f) {
  constexpr int64_t few = 8;
  const auto of_rows = [&](int64_t first, int64_t count, int64_t words) {
    for (int64_t w = 0; w < words; w += 16) {
      const auto mask = static_cast<__mmask16>(w + 16 <= words ? 0xFFFF : (1 << (words - w)) - 1);
      f(Column16{first * lanes, w, count, mask});
    }
  };
  for (int64_t r = 0; r < rows; r += few) of_rows(r, rows - r < few ? rows - r : few, lanes / 2);
  if (left > 1) of_rows(rows, 1, left / 2);
}

}  // namespace ddpm_fast::cpu
#endif
