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

// silu(-x) = -x / (1 + e^x), to 1e-6 where |x| < 16; -0 above 87.
inline __m512 silu_of_minus(__m512 x) {
  const __m512 t = _mm512_mul_ps(_mm512_min_ps(x, _mm512_set1_ps(87.0f)), _mm512_set1_ps(1.44269504f));
  // 2^t = 2^floor(t) 2^f; minimax on [0, 1), 9e-8.
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0018775766948238015f), _mm512_set1_ps(0.00898933969438076f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05582631751894951f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24015361070632935f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931530833244324f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999999403953552f));
  const __m512 d = _mm512_add_ps(_mm512_scalef_ps(p, t), _mm512_set1_ps(1.0f));  // scalef takes the floor of t
  const __m512 guess = _mm512_rcp14_ps(d);
  const __m512 error = _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(1.0f));
  return _mm512_mul_ps(x, _mm512_fnmsub_ps(guess, error, guess));
}

}  // namespace ddpm_fast::cpu
#endif
