"""Convolutions and linear layers whose weights are packed for oneDNN once.

oneDNN reorders PyTorch's weights into the blocked layout of its kernels in every call: for small images that takes as
long as the arithmetic. Within `packed`, without gradients and on the CPU, these modules keep the reordered weights.
Everywhere else they are the modules of torch.nn.
"""

__all__ = ["DTYPES", "Conv2d", "Linear", "PackedWeights", "packed"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.layout import eager_on_cpu
from . import conv_backward

_onednn = torch.ops.mkldnn  # the ops that TorchInductor calls too
# The dtypes that can be packed; none where PyTorch was built without oneDNN.
DTYPES = ()
if torch.backends.mkldnn.is_available():
    DTYPES = (torch.float32, torch.bfloat16) if _onednn._is_mkldnn_bf16_supported() else (torch.float32,)


_WATCHED = 32  # elements of each weight that are compared to see whether it has changed


class _Entry(NamedTuple):
    weight: Tensor  # the module's
    version: int  # of the weight when it was packed
    packed: Tensor
    pointer: int  # to the weight's memory when it was packed
    watched: Tensor  # a view of some elements of the weight, (<= _WATCHED,)
    values: Tensor  # of these elements when it was packed


class _Watched(NamedTuple):
    """The elements of all entries that are compared, side by side."""

    entries: tuple[_Entry, ...]
    values: Tensor


class PackedWeights:
    """The packed weights of modules: packed when first needed, and again when a weight was replaced or written to.

    Writes through `weight.data` are only seen by `refresh`. Copies and pickles are empty. Threads may share one:
    entries are immutable and are looked up without a lock; the lock is taken to change what is kept.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
        self._watched: _Watched | None = None  # None: to be made from the entries
        self._lock = Lock()

    def __reduce__(self) -> tuple:
        return PackedWeights, ()

    def get(self, module: nn.Module, pack: Callable[[], Tensor]) -> Tensor:
        """The packed weight of a module.

        Args:
            pack: packs the weight of the module; called if it was not packed yet or has changed.
        """
        weight = module.weight
        version = 0 if weight.is_inference() else weight._version
        entry = self._entries.get(module)
        if entry is None or entry.weight is not weight or entry.version != version:
            watched = _some_of(weight.detach())
            # The values are read first: a write while the weight is packed is then seen by `refresh`.
            values, pointer = watched.clone(), weight.data_ptr()
            entry = _Entry(weight, version, pack(), pointer, watched, values)
            with self._lock:
                self._entries[module], self._watched = entry, None
        return entry.packed

    @torch.no_grad()
    def refresh(self) -> None:
        """Forgets all weights if one was written to through `weight.data`, which does not count as a new version.

        Updates of an average or of an optimizer change every element, so that 32 of each weight detect them. A write
        that changes few elements may be missed.
        """
        watched = self._watched
        if watched is None or len(watched.entries) != len(self._entries):  # a module may be gone
            with self._lock:
                entries = tuple(self._entries.values())
                if not entries:
                    return
                watched = self._watched = _Watched(entries, torch.cat([e.values for e in entries]))
        moved = any(e.weight.data_ptr() != e.pointer for e in watched.entries)
        if moved or not torch.equal(torch.cat([e.watched for e in watched.entries]), watched.values):
            with self._lock:
                self._entries, self._watched = WeakKeyDictionary(), None


def _some_of(weight: Tensor) -> Tensor:
    """A view of elements at equal distances in memory; odd ones, so that they are not all of one tap of the filters."""
    step = (max(1, weight.numel() // _WATCHED) - 1) | 1
    return weight.as_strided((min(weight.numel(), _WATCHED),), (step,))


_current: ContextVar[PackedWeights | None] = ContextVar("packed weights", default=None)


@contextmanager
def packed(weights: PackedWeights) -> Iterator[None]:
    """Within this context, `Conv2d` and `Linear` keep their packed weights in `weights`."""
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
    """nn.Conv2d, with packed weights within `packed`, where the result is channels-last."""

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        plus: Tensor | None = None,
        overwrite: bool = False,
        biased: bool = True,
    ) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            bias: (out_channels,), used instead of the module's.
            biased: False for the result without a bias.
            plus: added to the result, of its shape and dtype.
            overwrite: whether the result may be written into plus.
        """
        bias = self.bias if bias is None and biased else bias
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
    """nn.Linear, with packed weights within `packed`."""

    def forward(self, x: Tensor) -> Tensor:
        weights = _weights_for(x, self.weight)
        if weights is None:
            return super().forward(x)
        rows = x.numel() // x.shape[-1]
        weight = weights.get(self, lambda: _onednn._reorder_linear_weight(self.weight.detach(), rows))
        return _onednn._linear_pointwise(x, weight, self.bias, "none", [], "")
