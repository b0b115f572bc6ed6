"""Norms whose results are recomputed in the backward pass: gradients are those of keeping the results, in every bit."""

import contextlib
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ddpm_fast import UNet
from ddpm_fast.nn import deferred_sum, group_norm, layers
from ddpm_fast.nn.deferred_sum import DeferredSum, normalised
from ddpm_fast.nn.group_norm import GroupNorm, recomputed
from ddpm_fast.nn.layers import Attention, ResidualBlock
from ddpm_fast.ops.layout import memory_format


@pytest.fixture(params=[False, True], ids=["on a CPU", "as on a GPU"], autouse=True)
def fused(request, monkeypatch):
    """Whether norms add, and return their statistics; plain PyTorch is the kernel of their op here."""
    if request.param:
        for module in (sys.modules["ddpm_fast.ops.add_group_norm_silu"], deferred_sum):
            monkeypatch.setattr(module, "fuses", lambda x: memory_format(x) != torch.contiguous_format)
    return request.param


def network(**changes):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
    model = UNet(**sizes, norm_groups=4, **changes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([3, 700])


def keeping(monkeypatch):
    monkeypatch.setattr(layers, "recomputed", lambda *_: contextlib.nullcontext())


def assert_same_with_everything_kept(monkeypatch, gradients):
    found = gradients()
    keeping(monkeypatch)
    kept = gradients()
    assert any(g.any() for g in found)
    assert all(map(torch.equal, found, kept))


def images(dtype=torch.float32, channels=8):
    x = torch.randn(2, channels, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def recomputing(norm, x):
    """norm(x), and the context that recomputes it."""
    y, _, statistics = normalised(norm, DeferredSum(x))
    return y, recomputed(norm, x, y, statistics)


def saved_by_a_convolution(norm, x, conv):
    y, context = recomputing(norm, x)
    with context:
        return conv(y)


def test_statistics_are_computed_in_the_forward_pass_alone(monkeypatch, fused):
    calls = []
    for name in ("add_and_normalise", "recompute_group_norm_silu"):
        function = getattr(group_norm, name)
        monkeypatch.setattr(group_norm, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
    model = network()
    model(*batch()).sum().backward()
    norms = sum(isinstance(module, GroupNorm) for module in model.modules())
    once = 1  # a network has its last norm's result kept
    assert calls == ["recompute_group_norm_silu" if fused else "add_and_normalise"] * (norms - once)


def test_weights_of_a_functional_call_are_those_of_its_backward_pass(monkeypatch):
    model = network()
    others = {name: (p.detach() + 0.2 * torch.randn_like(p)).requires_grad_() for name, p in model.named_parameters()}

    def gradients():
        loss = torch.func.functional_call(model, others, batch()).square().mean()
        return torch.autograd.grad(loss, list(others.values()))

    assert_same_with_everything_kept(monkeypatch, gradients)


@pytest.mark.parametrize("kind", ["forward", "pre", "always", "method"])
def test_hooks_that_change_what_a_norm_returns_reach_the_gradients(monkeypatch, kind):
    model = network()

    def gradients():
        handles = []
        for norm in model.modules():
            if not isinstance(norm, GroupNorm):
                continue
            if kind == "forward":
                handles.append(norm.register_forward_hook(lambda module, inputs, output: 2 * output))
            elif kind == "pre":
                handles.append(norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)))
            elif kind == "method":
                norm.forward = lambda x, norm=norm: 2 * type(norm).forward(norm, x)
        if kind == "always":
            register = nn.modules.module.register_module_forward_hook
            handles.append(register(lambda m, inputs, output: 2 * output if isinstance(m, GroupNorm) else None))
        loss = model(*batch()).square().mean()
        for handle in handles:
            handle.remove()
        for norm in model.modules():
            vars(norm).pop("forward", None)
        return torch.autograd.grad(loss, list(model.parameters()))

    assert_same_with_everything_kept(monkeypatch, gradients)


def test_norms_of_another_class_keep_what_they_return():
    class Doubled(GroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    norm, conv, x = Doubled(2, 8, 1e-6), nn.Conv2d(8, 4, 1), images()
    found, kept = (torch.autograd.grad(f(), conv.weight)[0] for f in (
        lambda: saved_by_a_convolution(norm, x, conv).square().sum(), lambda: conv(norm(x)).square().sum()
    ))  # fmt: skip
    assert torch.equal(found, kept)


@pytest.mark.parametrize("written", ["x", "norm", "conv"])
def test_writing_to_what_the_backward_pass_needs_raises_as_in_pytorch(written):
    norm, conv, x = GroupNorm(2, 8, 1e-6), nn.Conv2d(8, 4, 1), images() * 1
    y = saved_by_a_convolution(norm, x, conv)
    with torch.no_grad():
        {"x": x, "norm": norm.weight, "conv": conv.weight}[written].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .*expected version"):
        y.sum().backward()


def test_results_written_to_in_place_before_they_are_saved_are_kept():
    """As by a wrapper that begins with an activation in place."""
    norm, x = GroupNorm(2, 8, 1e-6), images()
    conv = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Conv2d(8, 4, 1))
    found = torch.autograd.grad(saved_by_a_convolution(norm, x, conv).sum(), conv[1].weight)
    assert torch.equal(found[0], torch.autograd.grad(conv(recomputing(norm, x)[0]).sum(), conv[1].weight)[0])


def test_tensors_that_take_the_memory_of_a_freed_result_are_not_taken_for_it():
    norm, x = GroupNorm(2, 8, 1e-6), images()
    weight = torch.randn(256, requires_grad=True)
    for _ in range(20):  # an allocator gives memory out again as soon as it is freed
        y, context = recomputing(norm, x)
        with context:
            del y
            threes = torch.full((256,), 3.0)
            product = weight * threes
        del threes
        assert torch.equal(torch.autograd.grad(product.sum(), weight)[0], torch.full((256,), 3.0))


def test_a_part_of_the_result_that_is_saved_is_that_part_of_it():
    norm, x = GroupNorm(2, 8, 1e-6), images()
    y, context = recomputing(norm, x)
    parts = [y[1:], y[1:].expand(2, -1, -1, -1), y[:, 2:5], y[:1]]
    scales = [torch.randn(part.shape, requires_grad=True) for part in parts]
    with context:
        total = sum((part * scale).sum() for part, scale in zip(parts, scales, strict=True))
    for found, part in zip(torch.autograd.grad(total, scales), parts, strict=True):
        assert torch.equal(found, part)


def test_views_of_the_same_bytes_in_another_dtype_are_not_taken_for_the_result():
    norm, x = GroupNorm(2, 8, 1e-6), images()
    y, context = recomputing(norm, x)
    scale = torch.randn(y.shape, requires_grad=True)
    with context:
        bits = y.detach().view(torch.int32)
        product = scale * bits
    assert torch.equal(torch.autograd.grad(product.sum(), scale)[0], bits.float())


def test_autocast_and_its_end_change_no_bit(monkeypatch):
    model = network()

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch()).float().square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    assert_same_with_everything_kept(monkeypatch, gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_others_around_the_network_change_no_bit(monkeypatch, reentrant):
    model = network(dropout=0.3).train()

    def gradients(around=lambda f, *args: f(*args)):
        torch.manual_seed(2)
        x, t = batch()
        loss = around(model, x.requires_grad_(), t).square().mean()
        return torch.autograd.grad(loss, list(model.parameters())) if not reentrant else backward(model, loss)

    def backward(model, loss):
        model.zero_grad()
        loss.backward()
        return [p.grad for p in model.parameters()]

    found = gradients(lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant))
    keeping(monkeypatch)
    assert all(map(torch.equal, found, gradients()))


def test_hooks_of_others_for_saved_tensors_get_all_of_them():
    block, x, packed = ResidualBlock(8, 8, groups=2, eps=1e-6, dropout=0.0), images(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: packed.append(saved) or saved, lambda saved: saved):
        block(x, torch.zeros(2, 8)).sum().backward()
    kernels = [saved for saved in packed if saved.shape == block.conv1.weight.shape]
    normed, _ = recomputing(block.norm1, x)
    assert len(kernels) == 2
    assert any(saved.shape == normed.shape and torch.equal(saved, normed) for saved in packed)


def test_second_derivatives_are_right():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    time = torch.randn(2, 4, dtype=torch.float64)
    residual = ResidualBlock(4, 4, groups=2, eps=1e-6, dropout=0.0).double()
    attention = Attention(4, heads=2, groups=2, eps=1e-6).double()
    for block, function in ((residual, lambda x, *_: residual(x, time)), (attention, lambda x, *_: attention(x))):
        for p in block.parameters():
            nn.init.normal_(p, std=0.5)
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels have no second derivative
            assert torch.autograd.gradgradcheck(function, (x, *block.parameters()), fast_mode=True)


def test_batched_gradients_are_those_of_one_after_the_other():
    block, x, time = ResidualBlock(8, 8, groups=2, eps=1e-6, dropout=0.0), images(), torch.randn(2, 8)
    y, grads = block(x, time), torch.randn(3, 2, 8, 4, 4)
    leaves = [block.norm1.weight, block.conv1.weight, block.conv2.weight]
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for batched, alone in zip(found, expected, strict=True):
            # sums over 2 x 4 x 4 pixels and 8 channels, in another order
            torch.testing.assert_close(batched[i], alone, rtol=0, atol=2**-24 * 256 * alone.abs().max().item())
