"""Modules that are wrong or slower than before are found, and left as they were."""

import copy
import pickle
import warnings

import pytest
import recorded_graphs
import torch
import torch.nn.functional as F
from optimized_networks import NETWORKS, gradients, inputs, make, predict, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import optimize, restore, verify
from ddpm_fast.nn import verification
from ddpm_fast.nn.optimized_modules import AS_IT_WAS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:diffusers.*")

CONVOLUTIONS = ("mkldnn::_convolution_pointwise", "aten::convolution")
LINEAR = ("mkldnn::_linear_pointwise", "aten::addmm", "aten::linear")


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(verification, "perf_counter", clock)
    return clock


class Kernels(TorchDispatchMode):
    """Within this context, `change` is called with the name, the arguments and the result of every kernel."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.change(func._schema.name, args, result)
        return result


def wrong(names, how=lambda y: y.mul_(1.05), dtype=torch.bfloat16):
    """Kernels that are wrong in a dtype, as some versions of PyTorch have them."""

    def change(name, args, result):
        y = result[0] if isinstance(result, tuple) else result
        if name in names and y.dtype == dtype:
            how(y)

    return Kernels(change)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(4, 16), nn.Linear(8, 32)

    def forward(self, x, t):
        scale, shift = self.time(torch.outer(t / 1000, torch.arange(8.0)).sin())[:, :, None, None].chunk(2, dim=1)
        return self.conv_out(F.silu(self.norm(self.conv_in(x)) * (1 + scale) + shift))


@pytest.fixture
def small():
    return Small().eval()


def names(reports):
    return [report.name for report in reports]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_right_is_kept(name, dtype):
    model, (x, t) = optimize(make(name), dtype), inputs()
    expected = predict(model, x, t)
    found = verify(model, x, t)
    assert found.reverted == []
    assert torch.equal(predict(model, x, t), expected)
    compared = [report for report in found.modules if report.error is not None]
    assert len(compared) >= 0.9 * len(found.modules)
    assert bool(compared) == (dtype != torch.float32 or name != "ours")  # whose modules are fast as they are
    assert not [report for report in compared if not report.error <= report.bound / 2]
    for report in set(names(found.modules)) - set(names(compared)):
        assert "kept, not compared: it" in str(next(r for r in found.modules if r.name == report))


def test_the_report_can_be_read(small):
    optimize(small, torch.bfloat16)
    lines = str(verify(small, *inputs())).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("conv_in (Conv2d): error ")
    assert lines[0].endswith(", 0.000 -> 0.000 ms, kept")
    assert lines[-2:] == ["4 of 4 changed modules were compared: 0.0 -> 0.0 ms.", "All are kept."]
    with wrong(CONVOLUTIONS):
        lines = str(verify(small, *inputs())).splitlines()
    assert lines[0].endswith("as it was, wrong")
    assert lines[-1] == "2 were left as they were."
    assert names(verify(small, *inputs()).modules) == ["norm", "time"]  # what is left of it
    assert str(verify(optimize(nn.Sequential(nn.SiLU()).eval()), torch.zeros(1, 1))) == "optimize changed no module."


@pytest.mark.parametrize(
    ("kernels", "reverted"),
    [(CONVOLUTIONS, ["conv_in", "conv_out"]), (LINEAR, ["time"]), (("ddpm_fast::group_norm_silu",), ["norm"])],
    ids=["convolution", "linear", "norm"],
)
@pytest.mark.parametrize(
    "how",
    [
        lambda y: y.mul_(1.03),  # more than the 2^-6 of the bound
        lambda y: y[:, ::2].zero_(),
        lambda y: y[-1:].fill_(float("nan")),
        lambda y: y.copy_(y.flip(0)),
    ],
    ids=["a little", "zeros", "nan", "rows in another order"],
)
def test_modules_whose_kernel_is_wrong_are_left_as_they_were(small, kernels, reverted, how):
    x, t = inputs()
    exact, weights = predict(small, x, t), {k: v.clone() for k, v in small.state_dict().items()}
    plain = relative(predict(optimize(copy.deepcopy(small), torch.bfloat16), x, t), exact)
    optimize(small, torch.bfloat16)
    with wrong(kernels, how):
        assert not relative(predict(small, x, t), exact) < 2 * plain
        found = verify(small, x, t)
        y = predict(small, x, t)
    assert sorted(names(found.reverted)) == reverted
    assert all(report.reason == ("wrong" if report in found.reverted else "") for report in found.modules)
    assert y.dtype == torch.float32
    assert relative(y, exact) < 2 * plain
    for name, p in small.named_parameters():
        assert p.dtype == (torch.float32 if name.split(".")[0] in reverted else torch.bfloat16)
    restore(small)
    assert torch.equal(predict(small, x, t), exact)
    assert all(torch.equal(v, weights[k]) for k, v in small.state_dict().items())


def test_around_modules_that_were_left_the_network_computes_in_bfloat16(small):
    optimize(small, torch.bfloat16)
    with wrong(CONVOLUTIONS):
        verify(small, *inputs())
    seen = []
    for module in (small.conv_in, small.norm, small.conv_out):
        module.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    assert predict(small, *inputs()).dtype == torch.float32
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 3


@pytest.mark.parametrize("argument", [3, 7], ids=["scale", "silu"])
def test_a_norm_is_compared_with_what_is_computed_with_it(small, argument):
    def change(name, args, result):
        if name == "ddpm_fast::group_norm_silu" and (args[argument] is None or args[argument] is False):
            result[0].zero_()  # wrong alone, which is not how it is called

    optimize(small, torch.bfloat16)
    with Kernels(change):
        assert verify(small, *inputs()).reverted == []


def test_in_float32_too(small):
    x, t = inputs()
    exact = predict(small, x, t)
    optimize(small, torch.float32)
    with wrong(("mkldnn::_convolution_pointwise", "ddpm_fast::group_norm_silu"), lambda y: y.mul_(1.01), torch.float32):
        found = verify(small, x, t)
        y = predict(small, x, t)
    packed = torch.backends.mkldnn.is_available()
    assert names(found.reverted) == (["conv_in", "conv_out", "norm"] if packed else ["norm"])
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(restore(small), x, t), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_which_all_is_left_computes_what_it_did_and_is_restored(name, dtype, monkeypatch):
    model, (x, t) = make(name), inputs()
    exact, kinds = predict(model, x, t), [type(m) for m in model.modules()]
    optimize(model, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(verification, "_difference", lambda a, b: float("inf"))
        found = verify(model, x, t)
    compared = [report for report in found.modules if report.error is not None]
    assert len(found.reverted) == len(compared)
    y = predict(model, x, t)
    if len(compared) == len(found.modules):
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)  # attention may have its images in another order
    else:  # parameters of modules that have others in them are in bfloat16
        assert relative(y, exact) < 8 * 2**-9
    assert not verify(model, x, t).reverted
    restore(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(predict(model, x, t), exact)
    assert not [key for module in model.modules() for key in vars(module) if "ddpm_fast" in key]


class Slow:
    """Kernels that take as long as the test says, in seconds, for (name, dtype)."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.calls = clock, seconds, []

    def __call__(self, name, args, result):
        y = result[0] if isinstance(result, tuple) else result
        if name in CONVOLUTIONS:
            self.calls.append(y.dtype)
            self.clock.now += self.seconds(y.dtype)


@pytest.mark.parametrize(("factor", "kept"), [(0.5, True), (1.0, True), (1.19, True), (1.21, False), (3.0, False)])
def test_modules_that_are_slower_by_the_margin_are_left_as_they_were(small, clock, factor, kept):
    optimize(small, torch.bfloat16)
    slow = Slow(clock, lambda dtype: factor if dtype == torch.bfloat16 else 1.0)
    with Kernels(slow):
        found = verify(small, *inputs())
    assert names(found.reverted) == ([] if kept else ["conv_in", "conv_out"])
    conv_in = found.modules[0]
    assert (conv_in.before, conv_in.after) == pytest.approx((1.0, factor))
    assert ("slower" in str(found)) != kept
    # Values first, then times in turns, so that what slows the machine down slows both.
    turns = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32] * (verification.REPEATS // 2)
    assert slow.calls[: 3 + len(turns)] == [torch.float32, torch.float32, torch.bfloat16, *turns]


def test_what_slows_single_calls_down_decides_nothing(small, clock):
    optimize(small, torch.bfloat16)
    calls = []

    def seconds(dtype):
        calls.append(dtype)
        return 100.0 if dtype == torch.bfloat16 and calls.count(dtype) % 3 else 1.0  # most of them

    with Kernels(Slow(clock, seconds)):
        assert not verify(small, *inputs()).reverted


def test_hooks_are_called_once_and_stay(small):
    optimize(small, torch.bfloat16)
    seen = []
    for module in small.modules():
        module.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in small.modules()]
    with wrong(("ddpm_fast::group_norm_silu",)):
        assert names(verify(small, *inputs()).reverted) == ["norm"]
    assert len(seen) == 10
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in small.modules()] == hooks
    assert all(type(v) in (str, torch.Tensor) for v in seen)


def test_modules_are_compared_on_what_their_hooks_make_of_the_input():
    class Ill(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x)

    model = optimize(Ill().eval(), torch.bfloat16)
    model.conv.register_forward_pre_hook(lambda module, args: (args[0] * 0 + 2,))
    seen = []
    with Kernels(lambda name, args, result: name in CONVOLUTIONS and seen.append(args[0])):
        verify(model, torch.ones(2, 3, 4, 4))
    assert seen
    assert all((x == 2).all() for x in seen)


class Twice(nn.Module):
    """One module that is called with two shapes, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = (nn.Conv2d(3, 3, k, padding=k // 2) for k in (3, 1, 1))
        self.again = self.conv
        self.second.weight = self.first.weight

    def forward(self, x, t):
        x = self.second(self.first(x))
        return self.conv(x)[:, :, ::2, ::2] + self.again(x[:, :, ::2, ::2])


@pytest.mark.parametrize(("size", "reverted"), [(8, ["conv"]), (16, ["conv", "first", "second"])])
def test_a_module_is_judged_by_all_shapes_that_it_is_called_with(clock, size, reverted):
    model, (x, t) = optimize(Twice().eval(), torch.bfloat16), inputs()
    with Kernels(Slow(clock, lambda dtype: 1.0)):
        found = verify(model, x, t)
    assert names(found.modules) == ["conv", "first", "second"]
    assert [report.before for report in found.modules] == [2.0, 1.0, 1.0]
    exact = predict(restore(copy.deepcopy(model)), x, t)
    with wrong(CONVOLUTIONS, lambda y: y.mul_(1.05) if y.shape[-1] == size else None):
        found = verify(model, x, t)
        assert names(found.reverted) == reverted
        assert relative(predict(model, x, t), exact) < 4 * 2**-8


def test_modules_that_share_a_weight_are_left_together():
    model, (x, t) = Twice().eval(), inputs()
    exact = predict(model, x, t)
    optimize(model, torch.bfloat16)
    calls = []

    def first_alone(y):
        calls.append(y)
        if len(calls) == 1:
            y.zero_()

    with wrong(CONVOLUTIONS, first_alone):
        found = verify(model, x, t)
    assert [report.reason for report in found.reverted] == ["wrong", "shares a weight with one that was left as it was"]
    assert relative(predict(model, x, t), exact) < 4 * 2**-8
    assert torch.equal(predict(restore(model), x, t), exact)


def test_what_was_not_compared_is_said():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.used = nn.Parameter(torch.ones(3, 1, 1)), nn.Conv2d(3, 3, 1)
            self.unused, self.trained = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, t):
            return self.trained(F.conv2d(self.used(x + self.token), self.unused.weight))

    model = optimize(Partly().eval(), torch.bfloat16)
    model.trained.train()
    mean = model.trained.running_mean.clone()
    found = {report.name: report for report in verify(model, *inputs()).modules}
    assert "not compared: it has changed modules in it" in str(found["the model"])
    assert "not compared: it was not called" in str(found["unused"])
    assert "not compared: it is in training mode" in str(found["trained"])
    assert found["used"].error > 0
    assert all(report.kept for report in found.values())
    torch.testing.assert_close(model.trained.running_mean, mean, rtol=0, atol=1.0)


class Fourier(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 9.0) * unit)

    def forward(self, t):
        return torch.outer(t, self.weight.to(t.dtype)).sin()


class Fading(nn.Module):
    """Writes to its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[[0.3]], [[0.5]], [[0.7]]]))

    def forward(self, x):
        return x.mul_(self.weight)


class Embedded(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.fourier, self.linear, self.fading = Fourier(unit), nn.Linear(8, 3), Fading()

    def forward(self, x, t):
        return self.fading(x.float() * 2) + self.linear(self.fourier(t / 1000))[:, :, None, None]


@pytest.mark.parametrize(("unit", "reverted"), [(0.01, []), (100.3, ["fourier"])])
def test_frequencies_that_bfloat16_cannot_hold_are_left_in_float32(unit, reverted):
    model, (x, t) = Embedded(unit).eval(), inputs()
    exact = predict(model, x, t)
    optimize(model, torch.bfloat16)
    assert (relative(predict(model, x, t), exact) > 0.05) == bool(reverted)
    assert names(verify(model, x, t).reverted) == reverted
    assert model.fourier.weight.dtype == (torch.float32 if reverted else torch.bfloat16)
    assert relative(predict(model, x, t), exact) < 4 * 2**-8


def test_inputs_that_a_module_writes_to_are_those_of_its_call():
    model, (x, t), seen = optimize(Embedded(0.01).eval(), torch.bfloat16), inputs(), []
    model.fading.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    predict(model, x, t)
    verify(model, x, t)
    assert torch.equal(*seen)


def test_terms_that_cancel_leave_the_error_of_rounding_them():
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean(dim=1, keepdim=True)
    (report,) = verify(optimize(model, torch.bfloat16), torch.randn(50, 64) + 20).modules
    assert report.kept
    assert 4 * 2**-8 < report.error < report.bound < 13 * 2**-8


def test_a_layer_that_begins_as_zero_has_no_error():
    model = Embedded(0.01).eval()
    nn.init.zeros_(model.linear.weight)
    nn.init.zeros_(model.linear.bias)
    found = verify(optimize(model, torch.bfloat16), *inputs())
    assert [report.error for report in found.modules if report.name == "linear"] == [0.0]
    assert found.reverted == []


def test_weights_that_have_changed_since_are_those_to_compare_with(small):
    optimize(small, torch.bfloat16)
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1.5)
    assert not verify(small, *inputs()).reverted
    with wrong(CONVOLUTIONS):
        verify(small, *inputs())
    assert small.conv_in.weight.dtype == torch.float32
    assert torch.equal(small.conv_in.weight, small.conv_in.weight.bfloat16().float())


def verified(model):
    with wrong(CONVOLUTIONS):
        assert verify(model, *inputs()).reverted
    return model


def test_a_verified_network_is_copied_pickled_trained_and_compiled():
    model, (x, t) = verified(optimize(make("openai"), torch.bfloat16)), inputs()
    expected = predict(model, x, t)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predict(other, x, t), expected)
        assert torch.equal(predict(restore(other), x, t), predict(restore(copy.deepcopy(model)), x, t))
    plain = gradients(restore(copy.deepcopy(model)), x, t)
    found = gradients(model, x, t)
    total = sum((found[k] - plain[k]).square().sum() for k in plain) ** 0.5
    assert total < 40 * 2**-9 * sum(v.square().sum() for v in plain.values()) ** 0.5
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(predict(compiled, x, t), expected, rtol=0.02, atol=0.02)


def test_graphs_are_forgotten(monkeypatch):
    captures = recorded_graphs.use(monkeypatch)
    model, (x, t) = optimize(make("plain"), torch.bfloat16), inputs()
    for _ in range(3):
        predict(model, x, t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # hooks within the network would be a reason not to capture it
        verify(model, x, t)
    verified(model)
    assert len(captures) == 1
    results = [predict(model, x, t) for _ in range(3)]
    assert len(captures) == 2
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["diffusers", "lucidrains", "ours"])
def test_a_network_can_verify_itself_in_its_first_call(name):
    model, (x, t) = make(name), inputs()
    exact = predict(model, x, t)
    optimize(model, torch.bfloat16, verify=True)
    with wrong(CONVOLUTIONS):
        gradients(model, x, t)
        predict(model.train(), x, t)
        assert not [m for m in model.modules() if AS_IT_WAS in vars(m)]
        with pytest.warns(UserWarning, match=r"optimize left \d+ modules as they were:\n.* as it was, wrong"):
            found = predict(model.eval(), x, t)
        assert relative(found, exact) < 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(predict(model, x, t), found)
    assert torch.equal(predict(restore(model), x, t), exact)


def test_a_first_call_that_finds_nothing_says_nothing(small, monkeypatch):
    x, t = inputs()
    expected = predict(optimize(copy.deepcopy(small), torch.bfloat16), x, t)
    optimize(small, torch.bfloat16, verify=True)
    calls = []
    monkeypatch.setattr(verification._Judge, "decide", lambda judge: calls.append(judge))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [predict(small, x, t) for _ in range(3)]
    assert len(calls) == 4
    assert all(torch.equal(y, expected) for y in results)


def test_errors(small):
    with pytest.raises(ValueError, match="the model is not optimised"):
        verify(small, *inputs())
    with pytest.raises(ValueError, match="in training mode"):
        verify(optimize(small).train(), *inputs())
