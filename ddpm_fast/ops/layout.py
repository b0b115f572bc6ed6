"""What the ops ask of their tensors, and how they bring them into the form that kernels take."""

__all__ = [
    "FLOATING",
    "as_given",
    "check_index",
    "dense",
    "describe",
    "eager_on_cpu",
    "memory_format",
    "needs_grad",
    "noise_fits",
    "refuse",
    "table",
]

from typing import NoReturn

import torch
from torch import Tensor

from .reference import memory_format

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(**tensors: Tensor | None) -> str:
    return ", ".join(
        f"{name} {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} {x.device}"
        for name, x in tensors.items()
        if x is not None
    )


def refuse(op: str, needs: str, **tensors: Tensor | None) -> NoReturn:
    raise ValueError(f"{op} needs {needs}; got {describe(**tensors)}")


def as_given(x: Tensor | None, dtype: torch.dtype, layout: torch.memory_format) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous(memory_format=layout)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def check_index(op: str, name: str, index: Tensor, count: int) -> None:
    """Raises where an index on the CPU is not in [0, count). On other devices, finding out would mean to wait."""
    if index.device.type != "cpu":
        return
    outside = ((index < 0) | (index >= count)).flatten().nonzero().flatten().tolist()
    if outside:
        value = index.flatten()[outside[0]]
        raise RuntimeError(f"{op}: {name}[{outside[0]}] is {value}, but rows has {count}, counted from 0")


def eager_on_cpu(x: Tensor) -> bool:
    """Whether code may look into x: no compiler traces it, and it is no subclass, on a CPU."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu"


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def noise_fits(x: Tensor, noise: Tensor | None, keys: Tensor | None, leading: torch.Size) -> bool:
    """Whether noise has the shape of x, or keys one key for each of the `leading` axes."""
    if noise is not None and not (noise.shape == x.shape and noise.is_floating_point() and noise.device == x.device):
        return False
    return keys is None or (keys.shape == (*leading, 2) and keys.dtype == torch.int64 and keys.device == x.device)


def table(rows: Tensor, x: Tensor) -> Tensor:
    """Rows in the dtype of the arithmetic on x."""
    return rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
