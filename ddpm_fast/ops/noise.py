"""The noise itself, for those who want it stored: philox4x32-10 (Salmon et al. 2011) and Box-Muller."""

import torch
from torch import Tensor

from . import dispatch, layout, reference

__all__ = ["fold_in", "normal"]


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """A new key from each key and number: philox(key = seed, counter = offset + number).

    Args:
        keys: (M, 2), int64: seed and offset.
        data: (M,), int64 (the bits of a uint64).

    Returns:
        (M, 2), int64.
    """
    fits = keys.dim() == 2 and keys.shape[1] == 2 and data.shape == keys.shape[:1] and keys.device == data.device
    if not fits or keys.dtype != torch.int64 or data.dtype != torch.int64:
        layout.refuse("fold_in", "keys (M, 2) and data (M,), int64, on one device", keys=keys, data=data)
    return _fold_in(keys)(keys.contiguous(), data.contiguous())


def normal(keys: Tensor, size: int) -> Tensor:
    """The first `size` standard normals of each key's stream.

    Args:
        keys: (M, 2), int64.

    Returns:
        (M, size), float32.
    """
    if keys.dim() != 2 or keys.shape[1] != 2 or keys.dtype != torch.int64 or size < 0:
        layout.refuse("normal", f"keys (M, 2) int64 and a size of at least 0 (it is {size})", keys=keys)
    return _normal(keys)(keys.contiguous(), size)


_fold_in = dispatch.define(
    "fold_in",
    "(Tensor keys, Tensor data) -> Tensor",
    kernel=reference.fold_in,
    reference=reference.fold_in,
    fake=lambda keys, data: torch.empty_like(keys),
)
_normal = dispatch.define(
    "normal",
    "(Tensor keys, SymInt size) -> Tensor",
    kernel=lambda keys, size: reference.normal(keys, size).contiguous(),
    reference=reference.normal,
    fake=lambda keys, size: keys.new_empty((len(keys), size), dtype=torch.float32),
)
