#include "cuda/add_group_norm_silu.h"

namespace ddpm_fast {

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, library) {
  Ops<Cuda>::register_all(library);
  AddingOps::register_all(library);
}

}  // namespace ddpm_fast
