#include <torch/csrc/stable/accelerator.h>

#include "common/ops.h"
#include "cuda/launch.h"

namespace ddpm_fast {
namespace {

namespace accelerator = torch::stable::accelerator;

// The kernels' own memory. It is freed when the call returns, before they have run: PyTorch then gives it to nobody but
// what comes later on the same stream.
Tensor allocate_floats(int64_t size, accelerator::DeviceIndex device) {
  const torch::stable::Device place(torch::headeronly::DeviceType::CUDA, device);
  return torch::stable::empty({size}, ScalarType::Float, std::nullopt, place);
}

struct Cuda {
  struct Guard {
    accelerator::DeviceGuard guard;
    explicit Guard(const Tensor& x) : guard(x.get_device_index()) {}
  };

  template <class Arguments>
  static auto run(Arguments arguments) -> decltype(workspace_size(arguments), void()) {
    const auto device = accelerator::getCurrentDeviceIndex();
    const int64_t size = workspace_size(arguments);
    if (size == 0) return put(arguments, device);
    Tensor workspace = allocate_floats(size, device);
    arguments.workspace = workspace.mutable_data_ptr<float>();
    put(arguments, device);
  }

  static void run(const FoldIn& f) { put(f, accelerator::getCurrentDeviceIndex()); }
  static void run(const Normal& n) { put(n, accelerator::getCurrentDeviceIndex()); }
  static void run(const QSample& q) { put(q, accelerator::getCurrentDeviceIndex()); }
  static void run(const ReverseStep& r) { put(r, accelerator::getCurrentDeviceIndex()); }

 private:
  template <class Arguments>
  static void put(const Arguments& arguments, accelerator::DeviceIndex device) {
    void* stream = accelerator::getCurrentStream(device).nativeHandle();
    STD_CUDA_CHECK(launch(arguments, static_cast<cudaStream_t>(stream)));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, library) { Ops<Cuda>::register_all(library); }

}  // namespace ddpm_fast
