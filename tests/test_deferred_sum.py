"""A U-Net whose group norms add what they normalise, as on a GPU; plain PyTorch is the kernel of the op here."""

import sys

import pytest
import torch
from torch import nn

from ddpm_fast import UNet
from ddpm_fast.app.memory import SavedActivations
from ddpm_fast.nn import deferred_sum
from ddpm_fast.nn.layers import Attention, ResidualBlock
from ddpm_fast.ops.layout import memory_format

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def fused(monkeypatch):
    """A function that makes norms add, and counts the calls of the ops that do."""

    def fuses(x):
        return memory_format(x) != torch.contiguous_format

    def start():
        calls, function = [], deferred_sum.add_and_normalise
        monkeypatch.setattr(deferred_sum, "add_and_normalise", lambda *a, **k: calls.append(1) or function(*a, **k))
        monkeypatch.setattr(sys.modules["ddpm_fast.ops.add_group_norm_silu"], "fuses", fuses)
        monkeypatch.setattr(deferred_sum, "fuses", fuses)
        return calls

    return start


def network(**changes):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "dim": 32, "dim_mults": (1, 2), "attention_resolutions": (8,), "norm_groups": 8}
    model = UNet(**(sizes | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def results(model, x, t):
    """The prediction and the gradients of all parameters."""
    y = model(x, t)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def assert_close(found, expected, dtype):
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 40 * eps * b.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("t", [torch.tensor([3, 700]), torch.tensor(500)], ids=["own", "shared"])
def test_prediction_and_gradients_are_those_of_separate_additions(fused, t, checkpointing):
    model, x = network(gradient_checkpointing=checkpointing), torch.randn(2, 3, 16, 16)
    expected = results(model, x, t)
    calls = fused()
    found = results(model, x, t)
    assert len(calls) > 20
    assert_close(found, expected, torch.float32)


def test_bfloat16_weights_and_autocast(fused):
    model, x, t = network(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    exact = results(model, x, t)
    fused()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model, x, t)
    assert_close([y.float() for y in found], exact, torch.bfloat16)
    model.bfloat16()
    assert_close([model(x, t).float()], exact[:1], torch.bfloat16)


class Wrapped(nn.Module):
    """A layer that takes x alone, as an adapter's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


CHANGES = {
    "wrapped convolutions": lambda model: wrap(model, nn.Conv2d),
    "wrapped linear layers": lambda model: wrap(model, nn.Linear),
    "hooks of blocks": lambda model: hook(model, ResidualBlock | Attention),
    "hooks of norms": lambda model: hook(model, nn.GroupNorm),
    "hooks of convolutions": lambda model: hook(model, nn.Conv2d),
    "no bias": lambda model: remove_biases(model),
}


def wrap(model, kind):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind) and not isinstance(module, Wrapped):
                setattr(module, name, Wrapped(child))


def hook(model, kind):
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, args, y: 0.9 * y)


def remove_biases(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_wrapped_or_hooked_or_have_no_bias_give_the_same(fused, change):
    model, x, t = network(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    CHANGES[change](model)
    expected = results(model, x, t)
    fused()
    assert_close(results(model, x, t), expected, torch.float32)


def test_no_more_is_kept_for_the_backward_pass(fused):
    def kept(batch):
        x = torch.randn(batch, 3, 16, 16).contiguous(memory_format=CHANNELS_LAST)
        with SavedActivations() as memory:
            result = model(x, torch.arange(batch))
        assert result.requires_grad
        return memory.bytes

    model = network()
    separate = kept(3) - kept(1)
    fused()
    assert kept(3) - kept(1) <= 1.01 * separate  # time embeddings, which the sums are given


def test_dropout_draws_the_same(fused):
    model, x, t = network(dropout=0.3).train(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    torch.manual_seed(1)
    expected = results(model, x, t)
    fused()
    torch.manual_seed(1)
    assert_close(results(model, x, t), expected, torch.float32)
