"""Optimised networks compute what the plain ones do, with fused norms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from optimized_networks import NETWORKS, NORMS, Calls, gradients, in_plain_bfloat16, inputs, make, predict, relative
from torch import nn

from ddpm_fast import optimize
from ddpm_fast.nn import packed_weights as packing

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@pytest.mark.parametrize("train", [False, True], ids=["inference", "grad"])
@pytest.mark.usefixtures("fused_in_training")
def test_in_float32_the_results_are_the_same(name, train):
    model, (x, t) = make(name), inputs()
    expected = gradients(model, x, t) if train else {"y": predict(model, x, t)}
    model.zero_grad()
    optimize(model, torch.float32)
    actual = gradients(model, x, t) if train else {"y": predict(model, x, t)}
    assert set(actual) == set(expected)
    for key, value in expected.items():
        # 40 layers of sums in another order, each to a few units of 2^-24. Some biases have no gradient but rounding.
        floor = 1e-5 * max(v.abs().max() for v in expected.values())
        torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=float(floor), msg=key)


def test_in_bfloat16_the_error_is_no_larger_than_that_of_bfloat16(name):
    model, (x, t) = make(name), inputs(4)
    exact = predict(model, x, t)  # float32 is, next to bfloat16
    plain = predict(in_plain_bfloat16(model), x.bfloat16(), t)
    y = predict(optimize(model, torch.bfloat16), x, t)
    assert y.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert relative(y, exact) < 1.5 * relative(plain, exact)


def test_in_bfloat16_the_gradients_are_no_further_off_than_those_of_bfloat16(name):
    model, (x, t) = make(name), inputs(4)
    exact = gradients(model, x, t)
    plain = gradients(in_plain_bfloat16(model), x.bfloat16(), t)
    model.zero_grad()
    actual = gradients(optimize(model, torch.bfloat16), x, t)
    errors = [sum((g[k] - exact[k]).square().sum() for k in exact) ** 0.5 for g in (actual, plain)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "grad"])
def test_norm_and_activation_are_one_call(train):
    for name, (fused, alone) in NORMS.items():
        if name.startswith("diffusers"):
            pytest.importorskip("diffusers", exc_type=ImportError)
        model = optimize(make(name), torch.float32)
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=train), Calls() as calls:
            model(*inputs())
        assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == fused, name
        assert calls.counts["ddpm_fast::group_norm_silu"] == alone, name
        assert not calls.counts["aten::native_group_norm"], name
        packed = calls.counts["mkldnn::_convolution_pointwise"]
        assert bool(packed) == (not train and torch.float32 in packing.DTYPES), name


@pytest.mark.parametrize("factor", [lambda s: 1 + s, lambda s: 0.03 * s], ids=["1 + scale", "another factor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_shift_are_fused_where_that_is_exact(dtype, factor):
    norm = optimize(nn.Sequential(nn.GroupNorm(4, 16)), dtype)[0]
    x, s = torch.randn(3, 16, 5, 5, dtype=dtype), torch.randn(3, 16, 1, 1, dtype=dtype)
    for factor_first in (False, True):
        with torch.no_grad(), Calls() as calls:
            f = factor(s)
            y = F.silu(s + f * norm(x) if factor_first else norm(x) * f + s)
        fused = factor(torch.zeros(())) == 1
        assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == fused
        exact = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double()) * f.double() + s.double())
        torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("train", [False, True])
def test_images_are_channels_last_inside(train):
    model, seen = optimize(make("diffusers").train(train), torch.bfloat16), []

    def look(module, args, output):
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    with torch.set_grad_enabled(train):
        model(*inputs(64))  # where Upsample2D drops the format, as shortcuts do in training
    assert seen
    assert all(seen)


def test_training_in_float32_calls_what_the_plain_network_calls(name):
    """Nothing is faster there: fused norms and images in another order took up to a tenth of a step longer."""
    model, (x, t) = make(name), inputs()
    counts = []
    for network in (model, optimize(copy.deepcopy(model), torch.float32)):
        with Calls() as calls:
            gradients(network, x, t)
        counts.append(calls.counts)
    assert counts[0] == counts[1]
