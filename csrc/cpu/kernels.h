// The kernels; each has a file of its own.
#pragma once

#include "common/arguments.h"

namespace ddpm_fast::cpu {

void run(const FoldIn&);
void run(const Normal&);
void run(const QSample&);
void run(const WeightedLoss&);
void run(const ReverseStep&);
void run(const VlbTerms&);
void run(const GroupNormSilu&);
void run(const GroupNormSiluBackward&);

// How many floats `workspace` must hold.
template <class Arguments>
int64_t workspace_size(const Arguments&) {
  return 0;
}
inline int64_t workspace_size(const GroupNormSiluBackward& b) { return 2 * b.shape.samples * b.shape.channels; }

}  // namespace ddpm_fast::cpu
