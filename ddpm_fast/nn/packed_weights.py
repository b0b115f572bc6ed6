"""Convolutions and products whose weights oneDNN has packed once.

PyTorch keeps weights as people see them, and oneDNN brings them into the order of its kernels again in every call: at
small images that takes as long as the arithmetic. Within `packed`, without gradients and on the CPU, these modules keep
the reordered weights. Everywhere else they are the modules of torch.nn.
"""

__all__ = ["DTYPES", "Conv2d", "Linear", "PackedWeights", "packed"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.layout import eager_on_cpu
from . import conv_backward

# What TorchInductor calls too.
_onednn = torch.ops.mkldnn
# That can be packed; none where PyTorch was built without oneDNN.
DTYPES = ()
if torch.backends.mkldnn.is_available():
    DTYPES = (torch.float32, torch.bfloat16) if _onednn._is_mkldnn_bf16_supported() else (torch.float32,)


_WATCHED = 32  # elements of a weight that tell whether it has changed


class _Entry(NamedTuple):
    weight: Tensor  # as the module has it
    version: int
    packed: Tensor
    pointer: int
    watched: Tensor  # a view of some of its elements, (<= _WATCHED,)
    values: Tensor  # what they were when it was packed


class PackedWeights:
    """The packed weights of modules, each made when it is first needed and when its weight was replaced or written to.

    Writes through `weight.data` are seen by `refresh` alone. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
        self._watched: tuple[list[_Entry], list[Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple:
        return PackedWeights, ()

    def get(self, module: nn.Module, pack: Callable[[], Tensor]) -> Tensor:
        weight = module.weight
        version = 0 if weight.is_inference() else weight._version
        entry = self._entries.get(module)
        if entry is None or entry.weight is not weight or entry.version != version:
            watched = _some_of(weight.detach())
            entry = _Entry(weight, version, pack(), weight.data_ptr(), watched, watched.clone())
            self._entries[module], self._watched = entry, None
        return entry.packed

    @torch.no_grad()
    def refresh(self) -> None:
        """Forgets all weights if one was written to through `weight.data`, which does not count as a new version.

        Such writes are those of an average or of an old optimizer, which change all weights a little, so that some
        elements of each tell. One that spares all of these goes unseen.
        """
        if self._watched is None or len(self._watched[0]) != len(self._entries):
            if not self._entries:
                return
            entries = list(self._entries.values())
            self._watched = entries, [e.watched for e in entries], torch.cat([e.values for e in entries])
        entries, watched, values = self._watched
        moved = any(e.weight.data_ptr() != e.pointer for e in entries)
        if moved or not torch.equal(torch.cat(watched), values):
            self._entries.clear()
            self._watched = None


def _some_of(weight: Tensor) -> Tensor:
    """A view of elements that lie evenly in its memory, an odd distance apart: not all of one tap of the filters."""
    step = (max(1, weight.numel() // _WATCHED) - 1) | 1
    return weight.as_strided((min(weight.numel(), _WATCHED),), (step,))


_current: ContextVar[PackedWeights | None] = ContextVar("packed weights", default=None)


@contextmanager
def packed(weights: PackedWeights) -> Iterator[None]:
    """Within this context, the modules here take and keep their packed weights there."""
    token = _current.set(weights)
    try:
        yield
    finally:
        _current.reset(token)


def _weights_for(x: Tensor, weight: Tensor) -> PackedWeights | None:
    if not eager_on_cpu(x):
        return None
    weights = _current.get()
    if weights is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return weights if x.numel() > 0 and x.dtype == weight.dtype and x.dtype in DTYPES else None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, channels-last and with packed weights where there are any."""

    def forward(
        self, x: Tensor, bias: Tensor | None = None, plus: Tensor | None = None, overwrite: bool = False
    ) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            bias: (out_channels,), instead of the module's.
            plus: added to the result, of its shape and dtype.
            overwrite: plus may be written to, and is the result then: where nobody else needs it.
        """
        bias = self.bias if bias is None else bias
        weights = _weights_for(x, self.weight) if self.padding_mode == "zeros" else None
        if weights is None or isinstance(self.padding, str) or x.dim() != 4:
            if conv_backward.serves(self, x):
                y = conv_backward.conv2d(x, self.weight, bias, self.stride, self.padding)
            else:
                y = self._conv_forward(x, self.weight, bias)
            return y if plus is None else y + plus
        how = (self.padding, self.stride, self.dilation, self.groups)
        weight = weights.get(self, lambda: _onednn._reorder_convolution_weight(self.weight.detach(), *how, x.shape))
        x = x.contiguous(memory_format=torch.channels_last)
        if plus is None:
            return _onednn._convolution_pointwise(x, weight, bias, *how, "none", [], "")
        plus = plus.contiguous(memory_format=torch.channels_last)
        adding = ("add", 1.0, None, [], None)
        if overwrite:
            return _onednn._convolution_pointwise_.binary(plus, x, weight, bias, *how, *adding)
        return _onednn._convolution_pointwise.binary(x, plus, weight, bias, *how, *adding)


class Linear(nn.Linear):
    """nn.Linear, with packed weights where there are any."""

    def forward(self, x: Tensor) -> Tensor:
        weights = _weights_for(x, self.weight)
        if weights is None:
            return super().forward(x)
        rows = x.numel() // x.shape[-1]
        weight = weights.get(self, lambda: _onednn._reorder_linear_weight(self.weight.detach(), rows))
        return _onednn._linear_pointwise(x, weight, self.bias, "none", [], "")
