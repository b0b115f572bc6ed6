// The backend of ops.h that puts kernels on PyTorch's current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/ops.h"
#include "cuda/launch.h"

namespace ddpm_fast {

struct Cuda {
  struct Guard {
    explicit Guard(const Tensor& x) : device(x.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard device;
  };

  template <class Arguments>
  static void run(const Arguments& arguments) {
    namespace accelerator = torch::stable::accelerator;
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(accelerator::getCurrentDeviceIndex(), &stream));
    STD_CUDA_CHECK(launch(arguments, static_cast<cudaStream_t>(stream)));
  }
  template <class Arguments>
  static int64_t workspace_size(const Arguments& arguments) {
    return ddpm_fast::workspace_size(arguments);
  }
};

}  // namespace ddpm_fast
