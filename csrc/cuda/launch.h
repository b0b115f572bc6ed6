// What the CUDA backend does: each function puts the kernels for its arguments on a stream and returns at once.
#pragma once

#include <cuda_runtime_api.h>

#include "common/arguments.h"

namespace ddpm_fast {

cudaError_t launch(const FoldIn& f, cudaStream_t stream);
cudaError_t launch(const Normal& n, cudaStream_t stream);
cudaError_t launch(const QSample& q, cudaStream_t stream);
cudaError_t launch(const WeightedLoss& l, cudaStream_t stream);
cudaError_t launch(const ReverseStep& r, cudaStream_t stream);
cudaError_t launch(const VlbTerms& v, cudaStream_t stream);
cudaError_t launch(const GroupNormSilu& g, cudaStream_t stream);
cudaError_t launch(const GroupNormSiluBackward& g, cudaStream_t stream);
cudaError_t launch(const AddGroupNormSilu& g, cudaStream_t stream);
cudaError_t launch(const AddGroupNormSiluBackward& g, cudaStream_t stream);
cudaError_t launch(const RecomputeGroupNormSilu& g, cudaStream_t stream);

// How many floats `workspace` must hold; 0: it may be null.
int64_t workspace_size(const WeightedLoss& l);
int64_t workspace_size(const VlbTerms& v);
int64_t workspace_size(const GroupNormSilu& g);
int64_t workspace_size(const GroupNormSiluBackward& g);
int64_t workspace_size(const AddGroupNormSilu& g);
int64_t workspace_size(const AddGroupNormSiluBackward& g);

}  // namespace ddpm_fast
