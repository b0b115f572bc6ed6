#include "common/ops.h"
#include "cpu/kernels.h"

namespace ddpm_fast {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  template <class Arguments>
  static void run(const Arguments& arguments) {
    cpu::run(arguments);
  }
  template <class Arguments>
  static int64_t workspace_size(const Arguments& arguments) {
    return cpu::workspace_size(arguments);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, library) { Ops<Cpu>::register_all(library); }

}  // namespace ddpm_fast
