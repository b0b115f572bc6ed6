"""Input checks: what each op requires of its arguments, said once, for the check and for its message.

rules = Rules("normal", ("keys", "size"), Rule("size of at least 0", lambda keys, size: size >= 0))
rules.check(keys, size)  # ValueError: normal needs size of at least 0; got keys int64 (3, 2) cpu, size -1
"""

__all__ = ["FLOATING", "Rule", "Rules", "bounds", "check_eps", "check_index", "needs_grad"]

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .transforms import transformed

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Rule(NamedTuple):
    """A requirement of an op."""

    needs: str  # in words; {name} stands for the value of an argument
    holds: Callable[..., Any]  # of the arguments, in order: whether they meet it


class Rules:
    """The requirements of an op, in the order in which they are checked: one may rely on those before it."""

    def __init__(self, op: str, names: tuple[str, ...], *rules: Rule) -> None:
        self.op, self.names, self.rules = op, names, rules

    def check(self, *arguments: Any) -> None:
        """Raises ValueError with the first requirement that is not met, and what was given."""
        for rule in self.rules:
            try:
                holds = rule[1](*arguments)
            except AttributeError:  # not a tensor
                holds = False
            if not holds:
                self._refuse(rule.needs, arguments)

    def _refuse(self, needs: str, arguments: tuple[Any, ...]) -> None:
        given = dict(zip(self.names, arguments, strict=True))
        described = ", ".join(f"{name} {describe(value)}" for name, value in given.items() if value is not None)
        raise ValueError(f"{self.op} needs {needs.format(**given)}; got {described}")


def describe(value: Any) -> str:
    """A tensor's dtype, shape and device, or the value itself."""
    if not isinstance(value, Tensor):
        return f"{value!r:.80}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {value.device}"


def noise_fits(x: Tensor, noise: Tensor | None) -> bool:
    """Whether noise is absent, or floating and of the shape and device of x."""
    return noise is None or (noise.shape == x.shape and noise.is_floating_point() and noise.device == x.device)


def keys_fit(x: Tensor, keys: Tensor | None, *leading: int) -> bool:
    """Whether keys are absent, or one key for each element of the `leading` dimensions, on the device of x."""
    return keys is None or (keys.shape == (*leading, 2) and keys.dtype == torch.int64 and keys.device == x.device)


def is_index(index: Tensor, x: Tensor) -> bool:
    """Whether an index holds one int64 number for each sample of x, on its device."""
    return index.shape == x.shape[:1] and index.dtype == torch.int64 and index.device == x.device


def is_table(rows: Tensor, columns: int, x: Tensor) -> bool:
    return rows.dim() == 2 and rows.shape[1] == columns and rows.is_floating_point() and rows.device == x.device


def is_data(y: Tensor | None, x: Tensor) -> bool:
    """Whether y is absent, or floating or uint8 and of the shape and device of x."""
    if y is None:
        return True
    return y.shape == x.shape and (y.is_floating_point() or y.dtype == torch.uint8) and y.device == x.device


def check_index(op: str, name: str, index: Tensor, count: int) -> None:
    """Raises if an index on the CPU is not in [0, count). On other devices a check would wait for the device.

    Inside a transform of torch.func and in compiled code the values cannot be read; indexing itself raises there.
    """
    if index.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return
    outside = ((index < 0) | (index >= count)).flatten().nonzero().flatten().tolist()
    if outside:
        value = index.flatten()[outside[0]]
        raise RuntimeError(f"{op}: {name}[{outside[0]}] is {value}, but rows has {count}, counted from 0")


def check_eps(op: str, eps: float) -> None:
    """Raises unless eps can be added to a variance."""
    if not isinstance(eps, int | float) or not 0 <= eps < 1 << 64:
        raise ValueError(f"{op} needs an eps of at least 0 and below 2^64; got {eps!r:.80}")


def bounds(op: str, clip: tuple[float, float] | None) -> tuple[float, float]:
    """The bounds of x0_hat as numbers, infinite where there are none."""
    if clip is None:
        return -math.inf, math.inf
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low <= high:
        raise ValueError(f"{op} needs a clip of (low, high) with low <= high, or None; got {clip!r}")
    return low, high


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
