"""Philox keys and normals as tensors: philox4x32-10 (Salmon et al. 2011) and Box-Muller.

This is the one place where keys become noise: `given_noise` is called before a reference function, which takes noise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .arguments import Rule, Rules

__all__ = ["fold_in", "given_noise", "noise_of", "normal"]


class FoldInArguments(NamedTuple):
    keys: Tensor
    data: Tensor


class NormalArguments(NamedTuple):
    keys: Tensor
    size: int


_KEYS = Rule("keys (M, 2) int64", lambda keys, _: keys.dim() == 2 and keys.shape[1] == 2 and keys.dtype == torch.int64)
_FOLD_IN_RULES = Rules(
    "fold_in",
    FoldInArguments._fields,
    _KEYS,
    Rule("data (M,) int64", lambda keys, data: data.shape == keys.shape[:1] and data.dtype == torch.int64),
    Rule("keys and data on one device", lambda keys, data: keys.device == data.device),
)
_NORMAL_RULES = Rules(
    "normal", NormalArguments._fields, _KEYS, Rule("a size of at least 0", lambda keys, size: size >= 0)
)


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """A new key from each key and number: philox(key = seed, counter = offset + number).

    Args:
        keys: (M, 2), int64: seed and offset.
        data: (M,), int64 (the bits of a uint64).

    Returns:
        (M, 2), int64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _FOLD_IN_RULES.check(keys, data)
    return _fold_in(keys)(keys.contiguous(), data.contiguous())


def normal(keys: Tensor, size: int) -> Tensor:
    """The first `size` standard normals of each key's stream.

    Args:
        keys: (M, 2), int64.
        size: at least 0.

    Returns:
        (M, size), float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a negative size.
    """
    _NORMAL_RULES.check(keys, size)
    return _normal(keys)(keys.contiguous(), size)


def noise_of(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise of samples of a shape (N, ...), float32: images counted channels-last, all else as it lies.

    It is made by the backend of the device, so that float64 arithmetic uses the bits that the kernels use.
    """
    n, *rest = shape
    eps = normal(keys, math.prod(rest))
    if len(shape) < 4:
        return eps.reshape(shape)
    channels, *axes = rest
    return eps.reshape(n, *axes, channels).movedim(-1, 1)  # (N, C, H, W) over (N, H, W, C)


def given_noise(noise: Tensor | None, keys: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The noise of a call that was given noise or keys; None if it was given neither."""
    return noise if keys is None else noise_of(keys, shape)


_fold_in = dispatch.define(
    "fold_in",
    "(Tensor keys, Tensor data) -> Tensor",
    arguments=FoldInArguments,
    kernel=reference.fold_in,
    reference=reference.fold_in,
    fake=lambda keys, data: torch.empty_like(keys),
)
_normal = dispatch.define(
    "normal",
    "(Tensor keys, SymInt size) -> Tensor",
    arguments=NormalArguments,
    kernel=lambda keys, size: reference.normal(keys, size).contiguous(),
    reference=reference.normal,
    fake=lambda keys, size: keys.new_empty((keys.shape[0], size), dtype=torch.float32),
)
