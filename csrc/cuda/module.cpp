#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/add_group_norm_silu.h"
#include "cuda/launch.h"

namespace ddpm_fast {
namespace {

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, library) {
  Ops<Cuda>::register_all(library);
  AddingOps<Cuda>::register_all(library);
}

}  // namespace ddpm_fast
