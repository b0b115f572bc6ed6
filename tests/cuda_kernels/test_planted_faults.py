"""Faults planted in copies of the CUDA kernels, which the simulator must find."""

import shutil

import architectures
import ptxsim
import pytest
import torch
from cuda_kernels.inputs import F32, N, images, unaligned
from harness import targets
from ptxsim import toolchain
from simulated_cuda import ROOT, Library, Simulation

pytestmark = pytest.mark.skipif(not toolchain.has_tool("nvcc"), reason="no nvcc")

FAULTS = {
    "q_sample.cu": ("for_tiles(tiles,", "for_tiles(tiles + 1,"),  # out of bounds
    "tile.cuh": ("sample_size % kWidth == 0 && aligned(tensors)", "sample_size % kWidth == 0"),
    "sample_sum.cuh": ("  __syncthreads();\n", ""),  # a race
    "reduce.cuh": ("thread % kWarp == 0", "thread % (2 * kWarp) == 0"),  # a sum that nobody wrote
}
HALF_TYPES = """\
    case Type::bf16:
      return f(bfloat16{});
    case Type::f16:
      return f(float16{});
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    # The calls below take float32 alone, for which nvcc has a quarter of the kernels to compile.
    for name, (right, wrong) in {**FAULTS, "dispatch.h": (HALF_TYPES, "")}.items():
        path = folder / "csrc/cuda" / name
        text = path.read_text()
        assert text.count(right) == 1, name
        path.write_text(text.replace(right, wrong))
    return Simulation(architectures.chosen[0], Library(folder / "csrc", folder, architectures.chosen[:1]))


def test_planted_faults_are_found(broken):
    t, rows = torch.arange(N), torch.rand(N, 6)
    x, ones, odd = images(N, 3, 20, 24), torch.ones(3), torch.randn(N, 8 * 131)  # an odd number of tiles
    with pytest.raises(ptxsim.OutOfBounds):
        broken.q_sample(odd, odd, None, t, rows[:, :2].contiguous(), F32)
    with pytest.raises(ptxsim.MisalignedAccess):
        broken.reverse_step(unaligned(x), x, None, None, None, None, None, t, rows, -1.0, 1.0, *targets(x, x))
    with pytest.raises(ptxsim.SharedMemoryRace):
        broken.weighted_loss(x, x, None, None, t, rows[:, :3].contiguous(), None, 0, 1.0, True)
    with pytest.raises(ptxsim.UninitialisedSharedRead):
        broken.group_norm_silu(x.contiguous(), ones, ones, None, None, 1, 1e-5, True)
