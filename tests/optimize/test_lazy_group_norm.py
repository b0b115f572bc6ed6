"""The result of an optimised group norm, used by any code."""

import copy

import pytest
import torch
import torch.nn.functional as F
from optimized_networks import (
    Calls,
    OpenAIBlock,
    gradients,
    inputs,
    make,
    predict,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import optimize

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("fused_in_training")]


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h + 1,
        lambda h: h.sigmoid() + h,
        lambda h: torch.sigmoid(h) * 2,
        lambda h: F.silu(h) + h,
        lambda h: F.silu(input=h),
        lambda h: h * h.mean(),
        lambda h: h * 2,
        lambda h: torch.add(h, h, alpha=3),
        lambda h: h.mul_(2) + F.silu(h),
        lambda h: [F.silu(h, inplace=True), h][1],
        lambda h: (h * h.new_ones(2, 8, 1, 1)).add(1),
        lambda h: torch.cat([h, h]),
        lambda h: h.flatten(2).transpose(1, 2).contiguous(),
        lambda h: copy.deepcopy(h.detach()),
        lambda h: torch.stack(list(h)),
        lambda h: h[:, :3].clone(),
        lambda h: torch.ops.aten.silu(h),
        lambda h: torch.jit.script(nn.SiLU())(h.detach()),
        lambda h: h.new_zeros(h.shape) + torch.from_numpy(h.detach().numpy()),
        lambda h: checkpoint(lambda v: F.silu(v) * 2, h, use_reentrant=False),
        lambda h: torch.where(h > 0, h, 0 * h),
    ],
)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "grad"])
def test_any_code_may_follow_a_norm(use, train):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_(train)
    plain = nn.Sequential(nn.GroupNorm(2, 8))
    norm = optimize(copy.deepcopy(plain), torch.float32)[0]
    results = []
    for module in (norm, plain[0]):
        with torch.set_grad_enabled(train):
            y = use(module(x))
            assert type(y) in (torch.Tensor, type(norm(x)))
            gradient = torch.autograd.grad(y.sin().sum(), (x, *module.parameters())) if y.requires_grad else ()
        results.append((y + 0, *gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_metadata_of_a_norm_is_known_before_it_is_computed():
    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    x = torch.randn(2, 8, 6, 6)
    views = [x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x[:1], x.flatten(2)]
    views += [x.contiguous(memory_format=torch.channels_last).flatten(2), x.flatten(2)[:, :, ::2]]
    for view in views:
        with Calls() as calls, torch.no_grad():
            h = norm(view)
            known = (h.shape, h.dtype, h.device, h.ndim, h.size(0), len(h), h.stride(), h.is_contiguous(), h.numel())
        assert not calls.counts["ddpm_fast::group_norm_silu"]
        with torch.no_grad():
            y = h + 0 if view.dim() == 3 else h.view_as(h)
        assert (y.shape, y.dtype, y.device, y.ndim, y.size(0), len(y)) == known[:6]
        assert h.compute().stride() == known[6]


def test_an_input_changed_in_between_is_an_error_and_not_a_wrong_number():
    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        h = norm(x)
        x += 1
        with pytest.raises(RuntimeError, match="written to between the group norm"):
            F.silu(h)


@pytest.mark.parametrize("at_norm", [False, True])
def test_gradients_are_those_of_the_mode_that_each_operation_is_in(at_norm):
    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    for use in (F.silu, torch.sigmoid, lambda h: h * h.new_ones(2, 8, 1, 1) + h.new_ones(2, 8, 1, 1)):
        with torch.set_grad_enabled(at_norm):
            h = norm(torch.randn(2, 8, 6, 6))
        with torch.set_grad_enabled(not at_norm):
            y = use(h) + 0
        assert not y.requires_grad
        assert (h + 0).requires_grad == at_norm


def test_a_gradient_that_would_be_lost_is_an_error():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    norm = optimize(nn.Sequential(nn.GroupNorm(2, 8)), torch.float32)[0]
    x = torch.randn(2, 8, 6, 6)
    y = Twice.apply(norm(x))
    torch.testing.assert_close(y, 2 * (norm(x) + 0))
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        y.sum().backward()


def test_what_comes_out_of_a_model_is_computed():
    model = optimize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)), torch.float32)
    assert type(model(inputs()[0])) is torch.Tensor
    model = optimize(nn.Sequential(nn.Embedding(9, 8), nn.Flatten(2), nn.GroupNorm(2, 8)), torch.float32)
    assert type(model(torch.arange(8)[None])) is torch.Tensor  # nothing is cast


def test_hooks_see_tensors():
    model, (x, t), seen = optimize(make("openai"), torch.float32), inputs(), []
    expected = predict(model, x, t)
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: seen.append(output))
        module.register_forward_pre_hook(lambda m, args: seen.extend(args))
    y = predict(model, x, t)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert seen
    assert all(type(v) is torch.Tensor for v in seen)


def test_backward_hooks_of_norms_and_blocks_see_gradients():
    model, (x, t), seen = optimize(make("openai"), torch.float32), inputs(), []
    expected = gradients(model, x, t)
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.Conv2d | OpenAIBlock):
            module.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_output[0]))
    for key, value in gradients(model, x, t).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
    assert len(seen) == 7 + 3 + 3 * 3 + 3 + 3
