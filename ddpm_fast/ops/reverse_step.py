"""One step of any sampler, x_next = A x + B clip(x0_hat) + C x0_prev + sigma z, with x0_hat = u x + w pred."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .arguments import (
    FLOATING,
    Rule,
    Rules,
    bounds,
    check_index,
    describe,
    is_index,
    is_table,
    keys_fit,
    needs_grad,
    noise_fits,
)
from .noise import given_noise
from .transforms import transformed

__all__ = ["ReverseStep", "reverse_step"]


class ReverseStep(NamedTuple):
    """What a step gives; None for what was not asked for."""

    x: Tensor
    x_start: Tensor | None
    model_input: Tensor | None


class ReverseStepArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct ReverseStep."""

    x: Tensor
    pred: Tensor
    noise: Tensor | None
    keys: Tensor | None
    x_start_prev: Tensor | None
    variance: Tensor | None
    bounds: Tensor | None
    step: Tensor
    rows: Tensor
    low: float
    high: float
    # what is written
    x_next: Tensor
    x_start: Tensor | None
    model_input: Tensor | None


def _step_fits(x, step) -> bool:
    return is_index(step, x) or (step.dim() == 0 and step.dtype == torch.int64 and step.device == x.device)


def _keys_fit(x, keys, rows) -> bool:
    leading = (x.shape[0],) if keys is None or keys.dim() == 2 else (rows.shape[0], x.shape[0])
    return keys_fit(x, keys, *leading)


_RULES = Rules(
    "reverse_step",
    ("x", "pred", "noise", "keys", "x_start_prev", "variance", "clip", "step", "rows"),
    Rule("x (N, ...) floating", lambda x, *_: x.dtype in FLOATING and x.dim() >= 1),
    Rule(
        "pred, noise, x_start_prev and variance floating, in the shape and on the device of x",
        lambda x, pred, noise, keys, x_start_prev, variance, *_: (
            noise_fits(x, pred) and noise_fits(x, noise) and noise_fits(x, x_start_prev) and noise_fits(x, variance)
        ),
    ),
    Rule("step () or (N,) int64 on the device of x", lambda *a: _step_fits(a[0], a[7])),
    Rule(
        "rows (K, 6), or (K, 8) with a variance, floating on the device of x",
        lambda *a: is_table(a[8], 6 if a[5] is None else 8, a[0]),
    ),
    Rule("at most one of noise and keys", lambda x, pred, noise, keys, *_: noise is None or keys is None),
    Rule("keys (N, 2) or (K, N, 2) int64 on the device of x", lambda *a: _keys_fit(a[0], a[3], a[8])),
    Rule(
        "clip (low, high), or a tensor (N, 2) on the device of x",
        lambda *a: a[6] is None or (a[6].shape == (a[0].shape[0], 2) and a[6].device == a[0].device),
    ),
)


def reverse_step(
    x: Tensor,
    pred: Tensor,
    step: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    x_start_prev: Tensor | None = None,
    variance: Tensor | None = None,
    clip: tuple[float, float] | Tensor | None = None,
    return_x_start: bool = False,
    return_model_input: bool = False,
    out: ReverseStep | None = None,
) -> ReverseStep:
    """One step of any sampler: x_next = A x + B clip(x0_hat) + C x0_prev + sigma z, with x0_hat = u x + w pred.

    Args:
        x: the state x_t, (N, ...), floating; float32 for all but the shortest runs.
        pred: what the network predicted from it, the shape of x, floating.
        step: which row: () for all samples, or (N,); int64, in [0, K).
        rows: (u, w, A, B, C, sigma) of each step, (K, 6) float32 (float64 for float64 data); with `variance` (K, 8),
            the log of the lower and of the upper variance at the end.
        noise: z, the shape of x, floating; or
        keys: keys from which z is made where it is needed, int64: (K, N, 2), of each step and sample, or (N, 2), of
            each sample for this step alone. Neither leaves the term out.
        x_start_prev: x0_hat of the step before, the shape of x; None leaves the term out.
        variance: v in [-1, 1] that the network predicted, the shape of x: sigma^2 lies between the two variances of the
            row, (v + 1) / 2 of the way from the log of the lower to that of the upper (Nichol & Dhariwal 2021,
            eq. 15). A row with sigma = 0 still has no noise.
        clip: (low, high), bounds of x0_hat, or a tensor (N, 2) of them for each sample; None leaves it as it is.
        return_x_start: give clip(x0_hat) too, for a multistep sampler, self-conditioning or a preview.
        return_model_input: give x_next in the dtype of pred too, for the network's next call.
        out: tensors to write the results to, of their shapes, dtypes and layouts, instead of new ones; with None for
            what is not wanted, whatever the two arguments above say. out.x may be x, and out.x_start x_start_prev: a
            run of steps in place. Not where a gradient is wanted.

    Returns:
        x_next and clip(x0_hat) in the shape and dtype of x, x_next in the dtype of pred; channels-last where x is,
        contiguous otherwise. They are computed in float32 (float64 for float64 data) and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or both noise and keys.
        RuntimeError: a step on the CPU that is not in [0, K).
    """
    own_bounds = clip if isinstance(clip, Tensor) else None
    low, high = bounds("reverse_step", clip if own_bounds is None else None)
    _RULES.check(x, pred, noise, keys, x_start_prev, variance, own_bounds, step, rows)
    memory_format = layout.memory_format(x)
    # A state in half precision goes with predictions of its own dtype, one in float32 with any.
    pred_dtype = pred.dtype
    inner = x.dtype if x.dtype in (torch.bfloat16, torch.float16) or pred.dtype == torch.float64 else pred.dtype
    wants_grad = needs_grad(x, pred, noise, x_start_prev, variance, *(out or ()))
    if out is not None and (wants_grad or transformed()):
        raise ValueError(
            "reverse_step writes to `out` only where no gradient is wanted, and outside the transforms of torch.func: "
            "detach its inputs, or give no `out`"
        )
    if out is not None:
        inputs = {"pred": pred, "noise": noise, "variance": variance, "clip": own_bounds, "keys": keys, "rows": rows}
        _check_out(out, x, inner, memory_format, inputs | {"step": step, "x_start_prev": x_start_prev})
        return_x_start, return_model_input = out.x_start is not None, out.model_input is not None
    x = x.contiguous(memory_format=memory_format)
    pred, variance = (layout.as_given(y, inner, memory_format) for y in (pred, variance))
    noise, x_start_prev = (layout.as_given(y, x.dtype, memory_format) for y in (noise, x_start_prev))
    if keys is not None and keys.dim() == 2:
        keys = keys[None]
    rows = layout.table(rows, x)
    if own_bounds is not None:
        own_bounds = own_bounds.to(rows.dtype)
    keys, step, own_bounds = layout.dense(keys, step, own_bounds)

    arguments = (x, pred, noise, keys, x_start_prev, variance, own_bounds, step, rows, low, high)
    if out is None and _op.by_reference(x, wants_grad):
        x_next, x_start = _results(*arguments)
        model_input = x_next.to(pred_dtype) if return_model_input else None
        return ReverseStep(x_next, x_start if return_x_start else None, model_input)

    def new(dtype: torch.dtype) -> Tensor:
        return torch.empty_like(x, dtype=dtype, memory_format=memory_format)

    results = out
    if results is None:
        model_input = new(inner) if return_model_input and inner != x.dtype else None
        results = ReverseStep(new(x.dtype), new(x.dtype) if return_x_start else None, model_input)
    _op(x)(*ReverseStepArguments(*arguments, *results))
    if out is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([y for y in out if y is not None])
    if return_model_input and results.model_input is None:
        return results._replace(model_input=results.x.to(pred_dtype))
    return results


def _check_out(
    out: ReverseStep,
    x: Tensor,
    model_dtype: torch.dtype,
    memory_format: torch.memory_format,
    inputs: dict[str, Tensor | None],
) -> None:
    for name, result, dtype in zip(out._fields, out, (x.dtype, x.dtype, model_dtype), strict=True):
        fits = (
            result is not None
            and result.shape == x.shape
            and result.dtype == dtype
            and result.device == x.device
            and result.is_contiguous(memory_format=memory_format)
        )
        if not fits and (result is not None or name == "x"):
            raise ValueError(
                f"reverse_step needs out.{name} in {str(dtype).removeprefix('torch.')}, in the shape and layout of x; "
                f"got x {describe(x)}, out.{name} {describe(result)}"
            )
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return  # memory has no address there
    targets = {f"out.{name}": y for name, y in out._asdict().items() if y is not None}
    others = {"x": x, **{name: y for name, y in inputs.items() if y is not None}, **targets}
    for name, target in targets.items():
        for other, y in others.items():
            in_place = (name, other) in (("out.x", "x"), ("out.x_start", "x_start_prev"))
            same = in_place and target.data_ptr() == y.data_ptr() and target.stride() == y.stride()
            if other != name and not same and layout.overlap(target, y):
                raise ValueError(
                    f"reverse_step cannot write {name} to the memory of {other}: give {name} memory of its own. (out.x "
                    "may be x itself, and out.x_start x_start_prev itself.)"
                )


def _results(*arguments):
    """(x_next, x_start), for autograd to differentiate."""
    x, pred, noise, keys, x_start_prev, variance, bounds, step, rows, low, high = arguments
    check_index("reverse_step", "step", step, rows.shape[0])
    if keys is not None:
        n = x.shape[0]
        every_step = keys.shape[0] == 1
        keys = keys[0] if every_step else keys[step.expand(n), torch.arange(n, device=x.device)]
    noise = given_noise(noise, keys, x.shape)
    results = reference.reverse_step(x, pred, noise, x_start_prev, variance, bounds, step, rows, low, high)
    return tuple(y.contiguous(memory_format=layout.memory_format(x)) for y in results)


def _reference(*arguments):
    *arguments, x_next, x_start_out, model_input = arguments
    result, x_start = _results(*arguments)
    x_next.copy_(result)
    if x_start_out is not None:
        x_start_out.copy_(x_start)
    if model_input is not None:
        model_input.copy_(result)


def _fake(*arguments):
    pass


_op = dispatch.define(
    "reverse_step",
    "(Tensor x, Tensor pred, Tensor? noise, Tensor? keys, Tensor? x_start_prev, Tensor? variance, Tensor? bounds, "
    "Tensor step, Tensor rows, float low, float high, Tensor(a!) x_next, Tensor(b!)? x_start, "
    "Tensor(c!)? model_input) -> ()",
    arguments=ReverseStepArguments,
    kernel=_reference,
    reference=_reference,
    fake=_fake,
)
