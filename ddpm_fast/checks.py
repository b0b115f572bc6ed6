"""Input validation: every error says what was given and what is needed."""

__all__ = [
    "choice",
    "finite",
    "floating",
    "images",
    "integer",
    "integers",
    "numbers",
    "options",
    "pixels",
    "require",
    "sample_shape",
    "shape",
    "timesteps",
]

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

INT64 = 1 << 63  # the first integer that is too large for it
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


def integer(name: str, value: Any, low: int, limit: int = INT64) -> int:
    """The value as an int, from NumPy's integers too: at least `low` and below `limit`.

    Without a limit of its own, it fits a tensor of int64.

    In a compiled graph, an int stays symbolic, so that another value needs no other graph.
    """
    number = value if type(value) is int else _index(value)
    if number is None or number < low or number >= limit:
        bounds = f"of at least {low}" if limit == INT64 and (number is None or number < low) else f"in [{low}, {limit})"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
    return number


def integers(name: str, values: Any, low: int) -> tuple[int, ...]:
    """A sequence of integers of at least `low` each, as a tuple."""
    try:
        found = tuple(values)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of integers, got {values!r}") from None
    return tuple(integer(f"each of {name}", value, low) for value in found)


def sample_shape(shape: Any, channels: int, axes: int) -> tuple[int, ...]:
    """The shape of samples, (N, channels, ...) with so many axes after the channels."""
    found = integers("the batch size and the sizes", shape, 1)
    if len(found) != 2 + axes or found[1] != channels:
        raise ValueError(f"the shape must be (N, {channels}, ...) with {axes} sizes after the channels; got {found}")
    return found


def _index(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def finite(name: str, value: float, low: float = -math.inf) -> float:
    """The value as a float: finite and at least `low`."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not (low <= number < math.inf and number > -math.inf):
        bound = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return number


def numbers(name: str, values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A list of numbers, an array or a tensor as a tensor on the CPU."""
    try:
        return torch.as_tensor(values, dtype=dtype, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} must be a list of numbers, an array or a tensor; got {values!r:.80}") from None


def choice(kind: str, name: Any, names: Iterable[str]) -> str:
    """The name, if it is one of `names`."""
    names = list(names)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(names)}")
    return name


def options(what: str, function: Callable[..., Any], given: Mapping[str, Any], skip: int) -> None:
    """Checks that a function of a registry takes the keyword arguments given to it.

    Args:
        what: what the function is called in the message, such as "beta_schedule 'linear'".
        skip: how many of its first parameters are not options.
    """
    allowed = list(inspect.signature(function).parameters)[skip:]
    for key in given:
        if key not in allowed:
            raise ValueError(f"{what} has no argument {key!r}; it takes {', '.join(allowed) or 'none'}")


def floating(name: str, x: Tensor) -> None:
    """Checks that x is a floating tensor (N, ...), in the range of the network."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a floating tensor (N, ...); got {type(x).__name__}")
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(
            f"{name} must be floating, (N, ...), in the range of the network, [-1, 1]; got {x.dtype} {tuple(x.shape)}"
        )


def pixels(name: str, x: Tensor) -> None:
    """Checks that x is a tensor (N, ...), floating or uint8."""
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim == 0:
        floating(name, x)


def shape(name: str, x: Tensor, wanted: tuple[int, ...], of: str) -> None:
    """Checks that x is a floating tensor of the shape of another: it would be broadcast without a word."""
    floating(name, x)
    if x.shape != torch.Size(wanted):
        raise ValueError(f"{name} must have the shape of {of}, {tuple(wanted)}; got {tuple(x.shape)}")


def images(img: Tensor, shape: tuple[int, ...], *, unit_range: bool, bounds: tuple[float, float] | None = None) -> None:
    """Checks a batch for training.

    Args:
        img: (N, *shape); floating and, for unit_range, in [0, 1], or uint8 in [0, 255].
        unit_range: [0, 1] is mapped to [-1, 1] for the network. Otherwise the data is taken as it is.
        bounds: what samples are clipped to, in the range of the network.
    """
    if not isinstance(img, Tensor):
        hint = ""
        if isinstance(img, list | tuple) and img and isinstance(img[0], Tensor):
            hint = "; of a batch of images and labels, pass the images, batch[0]"
        elif type(img).__module__ == "numpy":
            hint = "; convert it by torch.from_numpy"
        raise ValueError(f"images must be a tensor, got {type(img).__name__}{hint}")
    if img.ndim != len(shape) + 1 or tuple(img.shape[1:]) != shape:
        needed = ", ".join(["N", *map(str, shape)])
        raise ValueError(f"images must have the shape ({needed}), channels first; got {tuple(img.shape)}")
    if not img.shape[0]:
        raise ValueError("the batch is empty")
    bytes_ = img.dtype == torch.uint8
    if bytes_ and not unit_range:
        raise ValueError("uint8 images need auto_normalize=True, which scales them; got auto_normalize=False")
    if not bytes_ and not img.is_floating_point():
        raise ValueError(f"images must be floating in [0, 1] or uint8 in [0, 255]; got {img.dtype}")
    # Bounds that hold [-1, 1] hold all images in [0, 1].
    unclipped = bounds is None or (unit_range and bounds[0] <= -1 and bounds[1] >= 1)
    if bytes_ and unclipped:
        return
    low, high = img.detach().aminmax()
    if not bytes_:
        if unit_range:
            ok = (low >= -RANGE_SLACK) & (high <= 1 + RANGE_SLACK)  # false for NaN
            require(ok, lambda: _range_message(low.item(), high.item()))
        else:
            require(low.isfinite() & high.isfinite(), lambda: "the data holds NaN or inf")
    if not unclipped:
        # Training would not show it, but samples would be clipped.
        scale, offset = (2 / 255, -1) if bytes_ else (2, -1) if unit_range else (1, 0)
        low, high = low * scale + offset, high * scale + offset
        ok = (low >= bounds[0] - 2 * RANGE_SLACK) & (high <= bounds[1] + 2 * RANGE_SLACK)
        require(ok, lambda: _clip_message(low.item(), high.item(), bounds))


def _clip_message(low: float, high: float, bounds: tuple[float, float]) -> str:
    return (
        f"in the range of the network, the data must lie within {bounds}, to which clip_denoised clips samples; it "
        f"reaches from {low:.4g} to {high:.4g}. Pass clip_denoised=(low, high) that hold it, or clip_denoised=False"
    )


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
    """Checks that t is (batch,) integers in [0, limit), as int64."""
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
