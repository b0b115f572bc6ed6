"""Errors at the door: what was given, and what is needed."""

__all__ = ["floating", "images", "pixels", "require", "timesteps", "whole"]

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Resizing and (x + 1) / 2 leave rounding outside [0, 1]; another value range leaves far more.
RANGE_SLACK = 1e-3


def require(ok: Tensor, message: Callable[[], str]) -> None:
    """Raises ValueError where `ok`, one bool, is false.

    On a GPU, where reading it would make the host wait, and in a compiled graph, it is a device-side assertion.
    """
    if ok.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(ok, "a check of ddpm_fast's input failed; run uncompiled, on the CPU, to see which")
    elif not ok:
        raise ValueError(message())


def whole(name: str, value: Any, low: int, limit: int | None = None) -> int:
    """The value as an int, NumPy's included: at least `low` and below `limit`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (limit is not None and number >= limit):
        bounds = f"of at least {low}" if limit is None else f"in [{low}, {limit})"
        raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}")
    return number


def floating(name: str, x: Tensor) -> None:
    """Checks that x is floating, in the range of the network."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating, in the range of the network, [-1, 1]; got {x.dtype}")


def pixels(name: str, x: Tensor) -> None:
    """Checks that x is floating or uint8."""
    if x.dtype != torch.uint8:
        floating(name, x)


def images(img: Tensor, shape: tuple[int, ...], *, unit_range: bool) -> None:
    """Checks a batch for training.

    Args:
        img: (N, *shape); floating and, for unit_range, in [0, 1], or uint8 in [0, 255].
    """
    if img.ndim != len(shape) + 1 or tuple(img.shape[1:]) != shape:
        needed = ", ".join(["N", *map(str, shape)])
        raise ValueError(f"images must have the shape ({needed}), channels first; got {tuple(img.shape)}")
    if not len(img):
        raise ValueError("the batch is empty")
    if img.dtype == torch.uint8:
        if not unit_range:
            raise ValueError("uint8 images need auto_normalize=True, which scales them; got auto_normalize=False")
        return
    if not img.is_floating_point():
        raise ValueError(f"images must be floating in [0, 1] or uint8 in [0, 255]; got {img.dtype}")
    low, high = img.detach().aminmax()
    if unit_range:
        ok = (low >= -RANGE_SLACK) & (high <= 1 + RANGE_SLACK)  # false for NaN
        require(ok, lambda: _range_message(low.item(), high.item()))
    else:
        require(low.isfinite() & high.isfinite(), lambda: "the data holds NaN or inf")


def _range_message(low: float, high: float) -> str:
    if low != low:
        return "the images hold NaN"
    message = f"floating images must lie in [0, 1]; these reach from {low:.4g} to {high:.4g}"
    if low >= 0 and 1 < high <= 255:
        return message + ". Divide by 255, or pass them as uint8"
    if -1 - RANGE_SLACK <= low < 0 and high <= 1 + RANGE_SLACK:
        return message + ". Map [-1, 1] to [0, 1], or set auto_normalize=False"
    return message


def timesteps(t: Tensor, batch: int, limit: int) -> None:
    """Checks that t is (batch,) whole numbers in [0, limit)."""
    if not isinstance(t, Tensor) or t.dtype != torch.int64:
        given = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"timesteps must be an int64 tensor of shape ({batch},); got {given}")
    if tuple(t.shape) != (batch,):
        raise ValueError(f"timesteps must have the shape ({batch},), one for each sample; got {tuple(t.shape)}")
    if batch:
        low, high = t.aminmax()
        require(
            (low >= 0) & (high < limit),
            lambda: f"timesteps must lie in [0, {limit}), counted from 0; these reach from {low} to {high}",
        )
