// The launchers of the CUDA backend in one library with C names, for the tests to call.
#include "cuda/group_norm_silu.cu"
#include "cuda/group_norm_silu_backward.cu"
#include "cuda/launch.h"
#include "cuda/q_sample.cu"
#include "cuda/random.cu"
#include "cuda/reverse_step.cu"
#include "cuda/sample_sum.cu"
#include "cuda/vlb_terms.cu"
#include "cuda/weighted_loss.cu"

using namespace ddpm_fast;

#define ENTRY(NAME)                                                            \
  extern "C" int launch_##NAME(const NAME* arguments) {                        \
    return static_cast<int>(launch(*arguments, static_cast<cudaStream_t>(0))); \
  }                                                                            \
  extern "C" int64_t size_of_##NAME() { return sizeof(NAME); }
#define WORKSPACE(NAME) \
  extern "C" int64_t workspace_of_##NAME(const NAME* arguments) { return workspace_size(*arguments); }

ENTRY(FoldIn)
ENTRY(Normal)
ENTRY(QSample)
ENTRY(WeightedLoss)
ENTRY(ReverseStep)
ENTRY(VlbTerms)
ENTRY(GroupNormSilu)
ENTRY(GroupNormSiluBackward)
ENTRY(AddGroupNormSilu)
ENTRY(AddGroupNormSiluBackward)
ENTRY(RecomputeGroupNormSilu)
WORKSPACE(WeightedLoss)
WORKSPACE(VlbTerms)
WORKSPACE(GroupNormSilu)
WORKSPACE(GroupNormSiluBackward)
WORKSPACE(AddGroupNormSilu)
WORKSPACE(AddGroupNormSiluBackward)
