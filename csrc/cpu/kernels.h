// The kernels, one file each.
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

}  // namespace ddpm_fast::cpu
