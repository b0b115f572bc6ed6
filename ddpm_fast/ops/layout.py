"""Memory formats and dtypes: the form in which the strict ops take their tensors."""

__all__ = [
    "as_given",
    "channels_last_format",
    "dense",
    "eager_on_cpu",
    "empty_with_channels",
    "memory_format",
    "overlap",
    "table",
]

import torch
from torch import Tensor

from .transforms import inside_vmap


def channels_last_format(ndim: int) -> torch.memory_format | None:
    """PyTorch's channels-last format for a number of dimensions; None where there is none."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of an op's result: channels-last if x is, contiguous otherwise.

    Inside `torch.vmap`, which does not know the memory format of its tensors, it is contiguous.
    """
    layout = channels_last_format(x.ndim)
    if layout is None or inside_vmap() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def empty_with_channels(x: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor as x, (N, C, ...), with another number of channels, in the memory format of a result."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def as_given(x: Tensor | None, dtype: torch.dtype, layout: torch.memory_format) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous(memory_format=layout)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def table(rows: Tensor, x: Tensor) -> Tensor:
    """Rows in the dtype of the arithmetic on x."""
    return rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def eager_on_cpu(x: Tensor) -> bool:
    """Whether the values of x can be read at once: x is a plain tensor on a CPU, and no compiler traces the code."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu"


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the memory that two tensors span, gaps included, has addresses in common."""
    if x.device != y.device or not x.numel() or not y.numel():
        return False
    (x_begin, x_end), (y_begin, y_end) = map(_span, (x, y))
    return x_begin < y_end and y_begin < x_end


def _span(x: Tensor) -> tuple[int, int]:
    begin = x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.element_size()
