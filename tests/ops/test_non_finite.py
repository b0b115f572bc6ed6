"""Infinities and NaN go through every op as they go through the reference in float64: none becomes finite."""

import math

import pytest
import torch
from harness import make_t, schedule, targets, vlb_rows, wide
from runners import runners

from ddpm_fast import ops
from ddpm_fast.ops import reference
from ddpm_fast.ops.reference import LOSS_TYPES

VALUES = (math.nan, math.inf, -math.inf)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPE = (2, 6, 3, 5)
DTYPES = (F32, BF16, F16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
RUNNERS = pytest.mark.parametrize("runner", runners())


def dtypes_of(runner):
    """All of them, or one for a simulator, whose kernels differ by dtype in their loads and stores alone."""
    return (BF16,) if runner.simulated else DTYPES


def images(dtype=F32, layout=torch.channels_last, scale=1.0):
    return (scale * torch.randn(SHAPE)).to(dtype).contiguous(memory_format=layout)


def kind(x):
    """0 for a finite number, 1 for NaN, 2 and 3 for the infinities."""
    return x.isnan() * 1 + (x == math.inf) * 2 + (x == -math.inf) * 3


def assert_same_kinds(found, expected, where, nan_for_infinity=False):
    for i, (result, exact) in enumerate(zip(found, expected, strict=True)):
        differs = kind(result) != kind(exact)
        if nan_for_infinity:
            differs &= ~(result.isnan() & exact.isinf())
        assert not differs.any(), f"result {i} with {where}: {result[differs][:4]} instead of {exact[differs][:4]}"


def cases(arguments, places):
    """Each argument in turn with each value at one element; (what it is, the arguments)."""
    for name in places:
        for value in VALUES:
            changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            x = changed[name]
            x[tuple(n // 2 for n in x.shape)] = value
            yield f"{name} = {value}", changed


def norm_arguments(dtype, layout, scaled):
    x, channels = images(dtype, layout), torch.randn(SHAPE[1])
    arguments = {"x": x, "weight": 1 + 0.1 * channels, "bias": torch.randn(SHAPE[1]), "scale": None, "shift": None}
    if scaled:
        arguments |= {name: torch.randn(SHAPE[:2]).to(dtype) for name in ("scale", "shift")}
    return arguments


@RUNNERS
def test_what_is_not_finite_stays_so_in_group_norm_and_its_gradient(runner):
    combinations = [(F32, LAYOUTS[1], True, True), (BF16, LAYOUTS[0], True, True)]
    if not runner.simulated:
        kinds = [(False, True), (True, True), (True, False)]  # with a scale or without, with SiLU or without
        combinations = [(dtype, layout, *kind) for dtype in DTYPES for layout in LAYOUTS for kind in kinds]
    for dtype, layout, scaled, silu in combinations:
        arguments = {"grad": images(dtype, layout), **norm_arguments(dtype, layout, scaled)}
        places = [name for name, value in arguments.items() if value is not None]
        for where, changed in cases(arguments, places):
            grad, x, *parameters = changed.values()
            where = f"{where}, {dtype}, {layout}, scaled={scaled}, silu={silu}"
            y, mean, rstd = runner.call("group_norm_silu", (x, *parameters, 3, 1e-5, silu))
            truth, *statistics = reference.group_norm_silu(*map(wide, (x, *parameters)), 3, 1e-5, silu)
            # The GPU kernels fold (w x_hat + b) (1 + scale) to one factor and one term. Where scale is infinite, these
            # are infinite too, and their sum is NaN where the two have opposite signs.
            folded = runner.name not in ("reference", "cpu") and where.startswith("scale") and "inf" in where
            assert_same_kinds([y], [truth], where, nan_for_infinity=folded)
            assert torch.equal(rstd.isfinite(), statistics[1].isfinite())

            inputs = (grad, x, mean, rstd, *parameters)
            found = runner.call("group_norm_silu_backward", (*inputs, 3, silu))
            expected = reference.group_norm_silu_backward(*map(wide, inputs), 3, silu)
            expected = [torch.empty(0) if e is None else e for e in expected]
            assert_same_kinds(found, expected, where, nan_for_infinity=folded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_is_nan_in_pytorch_is_nan_in_group_norm_silu_and_its_gradients(backend, dtype):
    arguments = {"grad": images(dtype), **norm_arguments(dtype, torch.channels_last, False)}
    del arguments["scale"], arguments["shift"]
    for where, tensors in cases(arguments, arguments):
        grad, *changed = tensors.values()
        leaves = [v.clone().requires_grad_() for v in changed]
        with ops.backend(backend):
            y = ops.group_norm_silu(*leaves, 3)
            found = [y, *torch.autograd.grad(y, leaves, grad)]
        exact = [v.double().requires_grad_() for v in changed]
        truth = torch.nn.functional.silu(torch.nn.functional.group_norm(exact[0], 3, *exact[1:], 1e-5))
        expected = [truth, *torch.autograd.grad(truth, exact, grad.double())]
        # PyTorch folds mean and weight into the bias, so that an infinite weight is infinity minus infinity there. Here
        # it is an infinite multiple of the deviation, which is not finite either.
        folded = "weight" in where and "inf" in where
        for result, exact_result in zip(found, expected, strict=True):
            broken = ~result.isfinite() if folded else result.isnan()
            assert bool((broken | ~exact_result.isnan()).all()), where


@RUNNERS
def test_what_is_not_finite_stays_so_in_q_sample(runner):
    for dtype in dtypes_of(runner):
        for where, changed in cases({"x_start": images(), "noise": images()}, ["x_start", "noise"]):
            values = [v.to(dtype) for v in changed.values()]
            rest = (make_t(2), schedule(2))
            found = runner.call("q_sample", (*values, None, *rest, dtype))
            assert_same_kinds([found[0]], [reference.q_sample(*map(wide, values), *rest, torch.float64)], where)


@RUNNERS
def test_what_is_not_finite_stays_so_in_the_loss_and_its_gradient(runner):
    for dtype in dtypes_of(runner):
        tensors = {"pred": images(dtype), "x_start": images(dtype), "noise": images(dtype)}
        for index, name in enumerate(LOSS_TYPES):
            for where, changed in cases({**tensors, "upstream": torch.ones(2)}, [*tensors, "upstream"]):
                *values, upstream = changed.values()
                table = (make_t(2), schedule(3))
                found = runner.call("weighted_loss", (*values, None, *table, upstream, index, 1.0, True))
                exact = (*map(wide, values), *table, name)
                gradient = reference.weighted_loss_gradient(*exact) * upstream.double().view(2, 1, 1, 1)
                assert_same_kinds(found, [reference.weighted_loss(*exact), gradient], f"{name}, {where}")


@RUNNERS
def test_what_is_not_finite_stays_so_in_a_reverse_step(runner):
    for dtype in dtypes_of(runner):
        tensors = {name: images(dtype) for name in ("x", "pred", "noise", "x_start_prev", "variance")}
        bounds = torch.tensor([[-1.0, 1.0], [-0.5, 2.0]])
        for where, changed in cases({**tensors, "bounds": bounds}, [*tensors, "bounds"]):
            for step in (torch.tensor([0, 3]), torch.tensor(0)):  # sigma is 0 in step 0
                x, pred, noise, x_prev, variance, limits = changed.values()
                rest = (step, schedule(8), -1.0, 1.0)
                out = targets(x, pred, True)
                found = runner.call("reverse_step", (x, pred, noise, None, x_prev, variance, limits, *rest, *out))
                exact = [wide(v) for v in (x, pred, noise, x_prev, variance, limits)]
                assert_same_kinds(found, reference.reverse_step(*exact, *rest), where)


@RUNNERS
def test_what_is_not_finite_stays_so_in_the_terms_of_the_bound(runner):
    for dtype in dtypes_of(runner):
        x_start = images().clamp(-0.9, 0.9)
        tensors = {
            "x_start": x_start,
            "x_t": x_start + 0.01,
            "pred": images(dtype, scale=0.01),
            "variance": images(dtype),
        }
        for low, high in ((-1.0, 1.0), (-math.inf, math.inf)):
            for where, changed in cases(tensors, tensors):
                for t in (torch.tensor([0, 0]), torch.tensor([3, 4])):
                    arguments = (*changed.values(), t, vlb_rows(True), low, high)
                    found = runner.call("vlb_terms", arguments)
                    expected = reference.vlb_terms(*map(wide, changed.values()), t, vlb_rows(True).double(), low, high)
                    assert_same_kinds(found, [expected], f"{where}, t = {t[0]}")


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's own word about it
@RUNNERS
def test_the_statistics_of_a_group_without_elements_are_nan(runner):
    x, ones = torch.empty(2, 6, 0, 5), torch.ones(6)
    y, mean, rstd = runner.call("group_norm_silu", (x, ones, ones, None, None, 3, 1e-5, True))
    assert y.shape == x.shape
    assert mean.shape == rstd.shape == (2, 3)
    assert mean.isnan().all()
    assert rstd.isnan().all()
