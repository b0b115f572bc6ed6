// Runs of elements to and from float32.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "common/arguments.h"
#include "common/box_muller.h"
#include "common/steps.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace ddpm_fast::cpu {

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::u8 ? 1 : 2; }
inline int64_t size_of(const Shape& shape, Type type) {
  return shape.samples * shape.channels * shape.plane * size_of(type);
}

inline const void* at(const void* base, Type type, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(type);
}
inline void* at(void* base, Type type, int64_t index) { return static_cast<char*>(base) + index * size_of(type); }

inline float from_bf16(uint16_t value) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(value) << 16)); }

// Rounds to the nearest bfloat16, ties to even. The result is the upper half of the word; the lower half is to be
// dropped.
inline uint32_t rounded_bf16(float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  return x != x ? 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
}
inline uint16_t to_bf16(float x) { return static_cast<uint16_t>(rounded_bf16(x) >> 16); }

inline void widen_bf16(const uint16_t* __restrict__ from, int64_t size, float* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] = from_bf16(from[i]);
}

inline void narrow_bf16(const float* __restrict__ from, int64_t size, uint16_t* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] = to_bf16(from[i]);
}

inline void widen_bytes(const uint8_t* __restrict__ from, int64_t size, float* __restrict__ to) {
  for (int64_t i = 0; i < size; ++i) to[i] = from_byte(from[i]);
}

inline void widen_f16(const uint16_t* __restrict__ from, int64_t size, float* __restrict__ to) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= size; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < size; ++i) to[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i]);
}

inline void narrow_f16(const float* __restrict__ from, int64_t size, uint16_t* __restrict__ to) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= size; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
#endif
  for (; i < size; ++i) to[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(from[i]);
}

// Elements index ... index + size - 1 in float32: a pointer to the tensor itself if it is float32, else to the buffer,
// into which they are converted.
inline const float* load(const void* base, Type type, int64_t index, int64_t size, float* buffer) {
  const void* from = at(base, type, index);
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(from);
    case Type::bf16:
      widen_bf16(static_cast<const uint16_t*>(from), size, buffer);
      break;
    case Type::f16:
      widen_f16(static_cast<const uint16_t*>(from), size, buffer);
      break;
    case Type::u8:
      widen_bytes(static_cast<const uint8_t*>(from), size, buffer);
      break;
  }
  return buffer;
}

inline void store(const float* values, int64_t size, void* base, Type type, int64_t index) {
  void* to = at(base, type, index);
  switch (type) {
    case Type::f32:
      std::memcpy(to, values, size * sizeof(float));
      break;
    case Type::bf16:
      narrow_bf16(values, size, static_cast<uint16_t*>(to));
      break;
    case Type::f16:
      narrow_f16(values, size, static_cast<uint16_t*>(to));
      break;
    case Type::u8:
      break;  // no op has a result in bytes
  }
}

// Where to write results: the tensor itself if it is float32, else the buffer, which `store` converts afterwards.
inline float* place(void* base, Type type, int64_t index, float* buffer) {
  return type == Type::f32 ? static_cast<float*>(base) + index : buffer;
}

}  // namespace ddpm_fast::cpu
