"""Group norm with lazy evaluation: the result is computed at its first use, fused with a SiLU that follows.

The fusion therefore does not depend on how the surrounding code is written. See `optimize`.
"""

__all__ = ["PendingGroupNorm", "computed", "only_casts", "trains_in_float32", "watched"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import ops
from ..ops.layout import eager_on_cpu, memory_format
from ..ops.transforms import transformed
from .mixed_dtypes import each
from .one_plus_scale import noted_scale, readable

# Called with (norm, x, scale, shift, silu) before SiLU(norm(x) * (1 + scale) + shift), or the part of it that there is.
Watcher = Callable[["PendingGroupNorm", Tensor, Tensor | None, Tensor | None, bool], None]

_watcher: ContextVar[Watcher | None] = ContextVar("what is told of group norms that are computed", default=None)


@contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Within this context, the watcher is called with whatever is about to be computed by one kernel."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def trains_in_float32(x: Tensor) -> bool:
    """Whether gradients may follow and x is float32 or float64 on a CPU, where a plain network is as fast.

    The backward pass of the fused norm computes the SiLU again, and channels-last images cost copies where a network
    drops that format: networks of diffusers lost 2 to 9 % of a training step, and none gained.
    """
    return (
        torch.is_grad_enabled() and x.dtype.itemsize >= 4 and eager_on_cpu(x) and not torch.is_autocast_enabled("cpu")
    )


class PendingGroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose result is a `_Pending` tensor, or a plain one where a lazy result cannot be right."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, PendingGroupNorm):  # restored since, while a hook still holds this method
            return type(self).forward(self, x)
        x = computed(x)
        if x.dim() < 3 or x.shape[1] != self.num_channels or x.numel() == 0 or not x.is_floating_point():
            return super().forward(x)  # which raises the errors of PyTorch
        if transformed() or trains_in_float32(x):
            parameters = (p.to(x.dtype) for p in (self.weight, self.bias))
            return F.group_norm(x, self.num_groups, *parameters, self.eps)
        # Hooks may store the tensors that they are given.
        hooks = self._forward_hooks or self._backward_hooks or nn.modules.module._has_any_global_hook()
        if not hooks and type(x) is Tensor and _eager():
            return _Pending.of(self, x, self.weight, self.bias)
        _tell(self, x, None, None, False)
        return _compute(self, x, self.weight, self.bias, False)


def _tell(norm: PendingGroupNorm, x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> None:
    watcher = None if torch.compiler.is_compiling() else _watcher.get()
    if watcher is not None:
        watcher(norm, x, scale, shift, silu)


def _eager() -> bool:
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _compute(
    norm: nn.GroupNorm,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    tokens = _are_tokens(x)
    if tokens:  # the result is to be a view of channels-last images, too
        x = x.unsqueeze(3)
    y = ops.group_norm_silu(x, weight, bias, norm.num_groups, norm.eps, silu=silu, scale=scale, shift=shift)
    return y.squeeze(3) if tokens else y


class _Pending(Tensor):
    """The result of a group norm that has not been computed yet.

    It stands for norm(x), norm(x) * factor or norm(x) * factor + shift. If the next operation on it is a SiLU, both
    are computed by one kernel; any other operation computes the norm first. The tensor has shape, strides and dtype but
    no storage. Python functions of PyTorch reach `__torch_function__`; code that bypasses it, such as TorchScript,
    reaches `__torch_dispatch__`; code that bypasses both raises an error, since there is no storage to read.
    """

    _norm: PendingGroupNorm
    _x: Tensor
    _weight: Tensor  # those of the norm when it was called
    _bias: Tensor
    _factor: Tensor | None  # (N, C, 1, 1), where no shift was added yet
    _scale: Tensor | None  # (N, C), where the factor is 1 + scale
    _shift: Tensor | None  # (N, C)
    _sigmoid_of: "_Pending | None"  # this is the sigmoid of that
    _value: Tensor | None  # what it is, once computed
    _grad_mode: bool  # whether gradients were on
    _versions: list[tuple[Tensor, int]]  # the inputs and their versions, to detect in-place changes

    @classmethod
    def of(
        cls,
        norm: PendingGroupNorm,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        factor: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        sigmoid_of: "_Pending | None" = None,
    ) -> "_Pending":
        inputs = [v for v in (x, factor, scale, shift) if v is not None]
        grad = torch.is_grad_enabled()
        needs_grad = grad and any(v.requires_grad for v in (weight, bias, *inputs))
        self = Tensor._make_wrapper_subclass(
            cls, x.shape, strides=_strides(x), dtype=x.dtype, device=x.device, requires_grad=needs_grad
        )
        if needs_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_lost)
        self._norm, self._x, self._weight, self._bias = norm, x, weight, bias
        self._factor, self._scale, self._shift = factor, scale, shift
        self._sigmoid_of, self._value, self._grad_mode = sigmoid_of, None, grad
        # Inference tensors do not count.
        self._versions = [(v, v._version) for v in inputs if not v.is_inference()]
        return self

    def _with(self, **changes: Any) -> "_Pending":
        return _Pending.of(self._norm, self._x, self._weight, self._bias, **changes)

    def compute(self) -> Tensor:
        if self._value is None:
            with torch.set_grad_enabled(self._grad_mode):
                if self._sigmoid_of is not None:
                    self._value = torch.sigmoid(self._sigmoid_of.compute())
                elif self._factor is not None:
                    self._value = self._fused(silu=False) * self._factor  # no shift followed
                else:
                    self._value = self._fused(silu=False)
        return self._value

    def silu(self, inplace: bool = False) -> Tensor:
        if self._open() and self._factor is None:
            y = self._fused(silu=True)
            if inplace:
                self._value = y
            return y
        return F.silu(self.compute(), inplace)

    def sigmoid(self) -> Tensor:
        if not self._open() or self._factor is not None:
            return torch.sigmoid(self.compute())
        return self._with(shift=self._shift, sigmoid_of=self)

    def times(self, other: Any) -> Tensor:
        if isinstance(other, _Pending) and other._sigmoid_of is self and other._value is None:
            return self.silu()
        if isinstance(other, _Pending) and other is self._sigmoid_of and self._value is None:
            return other.silu()
        if self._open() and self._factor is self._scale is None and self._of_channels(other):
            scale = _scale_of(other)
            if scale is not None:
                return self._with(factor=other, scale=scale.flatten(1))
        return self.compute() * computed(other)

    def plus(self, other: Any) -> Tensor:
        if self._open() and self._factor is not None and self._of_channels(other):
            return self._with(scale=self._scale, shift=other.flatten(1))
        return self.compute() + computed(other)

    def _open(self) -> bool:
        """Whether something can still become part of it."""
        return self._value is None and self._sigmoid_of is None and self._grad_mode == torch.is_grad_enabled()

    def _of_channels(self, other: Any) -> bool:
        x = self._x
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))
        return type(other) is Tensor and other.shape == shape and other.dtype == x.dtype and other.device == x.device

    def _fused(self, *, silu: bool) -> Tensor:
        for x, version in self._versions:
            if x._version != version:
                raise RuntimeError(
                    "a tensor was written to between the group norm that reads it and the first use of the norm's "
                    "result, which ddpm_fast.optimize computes then: use it first, or write to a copy"
                )
        fused = (self._scale, self._shift) if self._factor is None else (None, None)
        _tell(self._norm, self._x, *fused, silu)
        return _compute(self._norm, self._x, self._weight, self._bias, silu, *fused)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        method = _METHODS.get(func)
        if method is not None and args:
            if isinstance(args[0], _Pending) and (not kwargs or func is F.silu):
                return method(*args, **kwargs)
            if len(args) == 2 and not kwargs:  # factor * h, shift + h
                return method(args[1], args[0])
        return func(*each(computed, args), **each(computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*each(computed, args), **each(computed, kwargs or {}))


def _scale_of(factor: Tensor) -> Tensor | None:
    """The scale for which the factor is 1 + scale, if there is an exact one."""
    if not readable(factor):
        return noted_scale(factor)
    # What it was made of, if it was made as 1 + scale. Another factor near 0 would be rounded as if near 1.
    scale = factor - 1
    return scale if torch.equal(scale + 1, factor) else None


_METHODS = {
    F.silu: _Pending.silu,
    torch.sigmoid: _Pending.sigmoid,
    Tensor.sigmoid: _Pending.sigmoid,
    Tensor.mul: _Pending.times,
    torch.mul: _Pending.times,
    Tensor.add: _Pending.plus,
    torch.add: _Pending.plus,
}
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_sparse", "is_meta", "is_quantized")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point),
    *(Tensor.__len__, torch.is_floating_point, torch.numel),
}
_CASTS = {Tensor.float, Tensor.to, Tensor.type, Tensor.type_as}


def computed(x: Any) -> Any:
    return x.compute() if isinstance(x, _Pending) else x


def _strides(x: Tensor) -> tuple[int, ...]:
    """Those of the result of a group norm of x."""
    images = x.unsqueeze(3) if _are_tokens(x) else x
    if images.is_contiguous(memory_format=memory_format(images)):
        return x.stride()
    return torch.empty(x.shape, device="meta").stride()


def _are_tokens(x: Tensor) -> bool:
    """Whether x, (N, C, L), is a view of channels-last images, as diffusers' attention has them."""
    return x.dim() == 3 and x.stride(1) == 1


def _lost(grad: Tensor) -> None:
    raise RuntimeError(
        "an autograd.Function (a backward hook of a module, or a reentrant checkpoint) took the result of a group norm "
        "before ddpm_fast.optimize had computed it, and its gradient would be lost: give it `h.clone()`, use "
        "use_reentrant=False, or register a forward hook with the group norm, which makes it compute at once"
    )


def only_casts(norm: nn.GroupNorm) -> bool:
    """Whether the module's forward computes one group norm and otherwise only casts, as OpenAI's GroupNorm32 does.

    This is found out by running it on zeros and recording the functions that it calls.
    """
    watch = _Watch()
    x = torch.zeros(1, norm.num_channels, 2, 2, dtype=norm.weight.dtype, device=norm.weight.device)
    try:
        with torch.no_grad(), watch:
            type(norm).forward(norm, x)
    except Exception:  # it expects another input, so it is not such a module
        return False
    return watch.norms == [(norm.num_groups, norm.eps)]


class _Watch(TorchFunctionMode):
    """Records the calls of a forward: (groups, eps) for each group norm, None for each other call that is not a cast.

    A group norm returns its input, since only the calls matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[tuple[int, float] | None] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.group_norm:
            bound = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | (kwargs or {})
            self.norms.append((bound["num_groups"], bound.get("eps", 1e-5)))
            return bound["input"]
        if func not in _CASTS and func not in _METADATA:
            self.norms.append(None)
        return func(*args, **(kwargs or {}))
