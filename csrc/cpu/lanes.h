// Loops over the elements of a row, each in a lane of its own, with float32 values in their bodies.
//
// A 32-bit word holds two bfloat16 numbers, and one instruction converts either of them to float32. Therefore the even
// elements of a row are its first lanes, and the odd ones are the lanes from `half` on.
#pragma once

#include <cstdint>

#include "cpu/convert.h"

namespace ddpm_fast::cpu {

struct Bf16 {
  uint16_t bits;
};
typedef uint32_t Bf16Pair __attribute__((may_alias, aligned(2)));

inline float first_of(Bf16Pair pair) { return float_of(static_cast<int32_t>(pair << 16)); }
inline float second_of(Bf16Pair pair) { return float_of(static_cast<int32_t>(pair & 0xFFFF0000u)); }
inline const Bf16Pair* pairs(const Bf16* row) { return reinterpret_cast<const Bf16Pair*>(row); }

// f(lane, element of each row)
template <class F, class... Rows>
inline void visit(int64_t width, int64_t, const F& f, const float* first, const Rows*... rows) {
#pragma GCC ivdep
  for (int64_t w = 0; w < width; ++w) f(w, first[w], rows[w]...);
}

template <class F, class... Rows>
inline void visit(int64_t width, int64_t half, const F& f, const Bf16* first, const Rows*... rows) {
#pragma GCC ivdep
  for (int64_t w = 0; w < width / 2; ++w) {
    f(w, first_of(pairs(first)[w]), first_of(pairs(rows)[w])...);
    f(w + half, second_of(pairs(first)[w]), second_of(pairs(rows)[w])...);
  }
  if (width % 2) f(width / 2, from_bf16(first[width - 1].bits), from_bf16(rows[width - 1].bits)...);
}

// out = f(lane, element of each row)
template <class F, class... Rows>
inline void map(int64_t width, int64_t, float* out, const F& f, const Rows*... rows) {
#pragma GCC ivdep
  for (int64_t w = 0; w < width; ++w) out[w] = f(w, rows[w]...);
}

template <class F, class... Rows>
inline void map(int64_t width, int64_t half, Bf16* out, const F& f, const Rows*... rows) {
  Bf16Pair* words = reinterpret_cast<Bf16Pair*>(out);
#pragma GCC ivdep
  for (int64_t w = 0; w < width / 2; ++w) {
    const float a = f(w, first_of(pairs(rows)[w])...), b = f(w + half, second_of(pairs(rows)[w])...);
    words[w] = rounded_bf16(a) >> 16 | (rounded_bf16(b) & 0xFFFF0000u);
  }
  if (width % 2) out[width - 1].bits = to_bf16(f(width / 2, from_bf16(rows[width - 1].bits)...));
}

}  // namespace ddpm_fast::cpu
