"""Layers of the U-Net by Triton's kernels: what their backward pass launches, and the bits of their gradients."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from compiled import simulated
from kernel_calls import BF16, F32, images

from ddpm_fast import ops
from ddpm_fast.nn import layers
from ddpm_fast.nn.layers import Attention, ResidualBlock


@pytest.mark.parametrize(("size", "dtype"), [(8, BF16), (18, F32)], ids=["slabs", "large planes"])
def test_each_norm_is_recomputed_by_one_launch_and_in_the_same_bits(monkeypatch, size, dtype):
    block = ResidualBlock(64, 64, groups=1, eps=1e-6, dropout=0.0).to(dtype)
    x, time = images(1, 64, size, size, dtype=dtype), torch.randn(1, 64).to(dtype)
    weights = [block.conv1.weight, block.conv2.weight]

    def in_training():
        """The gradients of the weights, and the names of the kernels that the backward pass launches."""
        with simulated(90) as launched:
            loss = block(x, time).float().square().sum()
            forward = len(launched)
            gradients = torch.autograd.grad(loss, weights)
        return gradients, [one.stats.kernel for one in launched[forward:]]

    found, launches = in_training()
    monkeypatch.setattr(layers, "recomputed", lambda *_: contextlib.nullcontext())
    kept, fewer = in_training()
    assert all(map(torch.equal, found, kept))
    assert sorted(launches) == sorted([*fewer, "_apply", "_apply"])


def test_an_output_is_recomputed_by_the_backend_of_the_forward_pass():
    layer, x = Attention(64, heads=2, groups=1, eps=1e-6), images(1, 64, 8, 8)
    with simulated(90) as launched:
        y = layer(x)
        forward = len(launched)
        with ops.backend("reference"):
            torch.autograd.grad(y.sum(), layer.qkv.weight)
    assert [one.stats.kernel for one in launched[forward:]] == ["_apply"]
