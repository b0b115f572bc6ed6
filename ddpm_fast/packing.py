"""Convolutions and products whose weights oneDNN has packed once.

PyTorch keeps weights as people see them, and oneDNN brings them into the order of its kernels again in every call: at
small images that takes as long as the arithmetic. Within `packed`, without gradients and on the CPU, these modules keep
the reordered weights. Everywhere else they are the modules of torch.nn.
"""

__all__ = ["Conv2d", "Linear", "PackedWeights", "packed"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# What TorchInductor calls too; empty where PyTorch was built without oneDNN.
_onednn = torch.ops.mkldnn
_DTYPES = ()
if torch.backends.mkldnn.is_available():
    _DTYPES = (torch.float32, torch.bfloat16) if _onednn._is_mkldnn_bf16_supported() else (torch.float32,)


class _Entry(NamedTuple):
    weight: Tensor  # as the module has it
    version: int
    packed: Tensor


class PackedWeights:
    """The packed weights of modules, each made when it is first needed and when its weight was replaced or written to.

    Writes through `weight.data` go unseen: make new ones after those.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()

    def get(self, module: nn.Module, pack: Callable[[], Tensor]) -> Tensor:
        weight = module.weight
        version = 0 if weight.is_inference() else weight._version
        entry = self._entries.get(module)
        if entry is None or entry.weight is not weight or entry.version != version:
            entry = self._entries[module] = _Entry(weight, version, pack())
        return entry.packed


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
    if torch.compiler.is_compiling():
        return None
    weights = _current.get()
    if weights is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    plain = type(x) is Tensor and x.device.type == "cpu" and x.numel() > 0
    return weights if plain and x.dtype == weight.dtype and x.dtype in _DTYPES else None


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
