"""Triton's kernels compile for AMD's GPUs. They have never run on one."""

import pytest
import torch

pytest.importorskip("triton")

import ptxsim.triton
import triton
from compiled import simulated
from kernel_calls import BF16, F32, LARGE, SLABS, add_group_norm, elementwise, group_norm, images, make_keys
from triton.backends.compiler import GPUTarget

from ddpm_fast import ops

KERNELS = {
    "_fold_in", "_normal", "_q_sample", "_weighted_loss", "_add_parts", "_reverse_step", "_vlb_terms", "_statistics",
    "_merge", "_apply", "_sum_gradients", "_spread_gradients", "_apply_gradients", "_norm_of_slab",
    "_gradients_of_slab", "_add_samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def sources():
    """What Triton was given to compile, {(kernel, types of its arguments): (source, warps)}."""
    found = {}
    original = ptxsim.triton._Launcher.__init__

    def record(self, source, metadata):
        original(self, source, metadata)
        found[source.name, tuple(source.signature.values())] = source, metadata.num_warps

    ptxsim.triton._Launcher.__init__ = record
    try:
        with simulated(86):  # for which no other test compiles, so that nothing is compiled already
            for call, *_ in elementwise(F32, BF16, n=1, size=16).values():
                call()
            group_norm(BF16, torch.channels_last, (1, 128, 40, 40))[1]()
            for shape, of_skip in ((SLABS | LARGE)[name] for name in ("256 + 128 x 32 x 32", *LARGE)):
                add_group_norm(BF16, shape, of_skip)[1]()
            ops.fold_in(make_keys(2), torch.arange(2))
            ops.normal(make_keys(2), 5)
            pred = images(1, 3, 64, 64, dtype=BF16).requires_grad_()
            ops.weighted_loss(pred, torch.zeros(1, dtype=torch.int64), torch.rand(1, 3), keys=make_keys(1))
    finally:
        ptxsim.triton._Launcher.__init__ = original
    return found


@pytest.mark.parametrize("arch", ["gfx942"])  # MI300
def test_every_kernel_compiles(sources, arch):
    assert {name for name, _ in sources} == KERNELS
    for (name, _), (source, warps) in sources.items():
        compiled = triton.compile(source, target=GPUTarget("hip", arch, 64), options={"num_warps": warps})
        assert arch in compiled.asm["amdgcn"], name
        assert compiled.asm["hsaco"], name
        assert compiled.metadata.shared <= 65536, name
