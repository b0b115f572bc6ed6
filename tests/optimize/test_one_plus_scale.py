"""Scale and shift are fused with a norm on a GPU too, where no value may be read. Here the CPU stands for the GPU."""

import pytest
import torch
import torch.nn.functional as F
from optimized_networks import NORMS, Calls, make
from optimized_networks import inputs as images
from torch import nn

from ddpm_fast import optimize
from ddpm_fast.nn import lazy_group_norm, one_plus_scale, optimized_modules

pytestmark = pytest.mark.usefixtures("fused_in_training")

READS = ("aten::equal", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::item")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (lazy_group_norm, one_plus_scale):
        monkeypatch.setattr(module, "readable", lambda x: False)
    monkeypatch.setattr(optimized_modules, "_on_gpu", lambda module: True)


class Modulated(nn.Module):
    def __init__(self, factor, first=False):
        super().__init__()
        self.norm, self.factor, self.first = nn.GroupNorm(4, 16), factor, first

    def forward(self, x, s):
        f = self.factor(s)
        return F.silu(s + f * self.norm(x) if self.first else self.norm(x) * f + s)


def inputs(dtype=torch.float32):
    return torch.randn(3, 16, 5, 5, dtype=dtype), torch.randn(3, 16, 1, 1, dtype=dtype)


def exact(model, x, s, f):
    norm = model.norm
    return F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double()) * f.double() + s.double())


@pytest.mark.parametrize("first", [False, True], ids=["norm first", "factor first"])
@pytest.mark.parametrize(
    "factor", [lambda s: 1 + s, lambda s: s + 1.0, lambda s: torch.add(s, 1), lambda s: s.add(1)], ids=range(4)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_plus_scale_is_fused_and_no_value_is_read(dtype, factor, first):
    model, (x, s) = optimize(Modulated(factor, first), dtype), inputs(dtype)
    with torch.no_grad(), Calls() as calls:
        y = model(x, s)
    assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == 1
    assert not any(calls.counts[name] for name in READS)
    # The factor itself is not rounded, so that this is as close as one rounding of the result.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact(model, x, s, 1 + s.double()), rtol=4 * eps, atol=4 * eps)


def written_to(s):
    f = 1 + s
    f.mul_(0.5)
    return f


def scale_written_to(s):
    own = s.clone()
    f = 1 + own
    own.zero_()
    return f


@pytest.mark.parametrize(
    "factor",
    [
        lambda s: 0.03 * s,
        lambda s: s + 2,
        lambda s: torch.add(s, 1, alpha=2),
        lambda s: torch.add(1, s, alpha=2),
        lambda s: (1 + s) * 1,
        lambda s: s + torch.ones(()),
        written_to,
        scale_written_to,
    ],
    ids=range(8),
)
def test_any_other_factor_is_multiplied_as_it_is(factor):
    model, (x, s) = optimize(Modulated(factor), torch.float32), inputs()
    with torch.no_grad(), Calls() as calls:
        y = model(x, s)
    assert not calls.counts["ddpm_fast::group_norm_silu(silu)"]
    assert not any(calls.counts[name] for name in READS)
    torch.testing.assert_close(y.double(), exact(model, x, s, factor(s)), rtol=1e-5, atol=1e-6)


def gradients(model, x, s):
    x, s = x.clone().requires_grad_(), s.clone().requires_grad_()
    y = model(x, s)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), (x, s, *model.parameters()))]


def detached(s):
    with torch.no_grad():
        return 1 + s


def seen(s):
    f = 1 + s
    f.retain_grad()
    return f


@pytest.mark.parametrize("factor", [lambda s: 1 + s, detached, seen], ids=["graph", "detached", "its own gradient"])
def test_gradients_reach_the_scale_as_they_did(factor):
    model, (x, s) = Modulated(factor), inputs()
    expected = gradients(model, x, s)
    optimize(model, torch.float32)
    with Calls() as calls:
        found = gradients(model, x, s)
    assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == (factor not in (detached, seen))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_that_is_written_to_before_the_norm_is_computed_is_an_error():
    class Late(Modulated):
        def forward(self, x, s):
            h = self.norm(x) * (1 + s) + s.clone()
            s.zero_()
            return F.silu(h)

    with torch.no_grad(), pytest.raises(RuntimeError, match="written to between the group norm"):
        optimize(Late(None), torch.float32)(*inputs())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["diffusers-scale-shift", "openai"])
def test_networks_are_fused_as_on_a_cpu(name, dtype):
    model = optimize(make(name), dtype)
    with torch.no_grad(), Calls() as calls:
        model(*images())
    assert calls.counts["ddpm_fast::group_norm_silu(silu)"] == NORMS[name][0]
