#include "cuda/q_sample.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/q_sample_op.h"

namespace ddpm_fast {
namespace {

Tensor q_sample_cuda(const Tensor& x_start, const Tensor& noise, const Tensor& t, const Tensor& rows) {
  return q_sample_op(x_start, noise, t, rows, [&](const auto& q) {
    namespace accelerator = torch::stable::accelerator;
    const auto device = x_start.get_device_index();
    const accelerator::DeviceGuard guard(device);
    void* stream = accelerator::getCurrentStream(device).nativeHandle();
    STD_CUDA_CHECK(launch_q_sample(q, static_cast<cudaStream_t>(stream)));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, library) { library.impl("q_sample", TORCH_BOX(&q_sample_cuda)); }

}  // namespace ddpm_fast
