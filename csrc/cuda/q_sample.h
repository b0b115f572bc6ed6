#pragma once

#include <cuda_runtime_api.h>

#include "common/q_sample.h"

namespace ddpm_fast {

template <typename T>
cudaError_t launch_q_sample(const QSample<T>& q, cudaStream_t stream);

}  // namespace ddpm_fast
