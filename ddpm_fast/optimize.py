"""Somebody else's network, made fast in place: see `optimize`.

The modules keep their parameters and their code. What changes is the class of some of them: convolutions and linear
layers keep packed weights, and a group norm returns a tensor that is computed when it is used, so that a SiLU that
follows becomes part of it, however the code around the two is written.
"""

__all__ = ["optimize", "restore"]

import copyreg
import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import ops, packing
from .ops.door import memory_format

M = TypeVar("M", bound=nn.Module)

_STATE = "_ddpm_fast_state"  # an attribute of an optimised model


def optimize(model: M, dtype: torch.dtype | None = None) -> M:
    """Makes a network fast in place: channels-last, in a faster dtype, with packed weights and fused group norms.

    For networks of other packages, such as diffusers' UNet2DModel, denoising_diffusion_pytorch's Unet or OpenAI's
    UNetModel, and for `ddpm_fast.UNet`. `restore` undoes it. The results are those of the network to the rounding of
    the dtype, gradients too.

    - Parameters and buffers are converted to `dtype`, and convolutions' weights to channels-last. The Parameter
      objects stay, so that optimizers, hooks and averages that hold them still do.
    - Whole images and embeddings that the model is called with are cast to that dtype, and its results cast back.
      Inputs of one number a sample, timesteps, are not: bfloat16 knows no odd number above 256.
    - Group norms compute the SiLU that follows them (also written as x * sigmoid(x)) and, on a CPU, a scale and a
      shift of each channel between the two, h * (1 + scale) + shift.
    - Without gradients and on a CPU, nn.Conv2d and nn.Linear keep their weights in oneDNN's order from call to call.
      They are packed again when the weights change. A write through `weight.data`, as averages do, is seen when the
      model is called next, if it changes any of 32 elements of each weight.

    To train with float32 weights, give `dtype=torch.float32` and use autocast as ever: updates of an optimizer are
    too small for bfloat16. torch.compile, DistributedDataParallel and the like go around an optimised model.

    Args:
        model: the network; or a GaussianDiffusion (of this package or of denoising_diffusion_pytorch), whose `.model`
            is optimised.
        dtype: of the weights and the arithmetic. None is bfloat16 for a float32 model on a processor that computes in
            it (AMX or AVX512-BF16, GPUs since Ampere), and otherwise the model's own.

    Returns:
        `model` itself. A deep copy or a pickle of it is optimised too. What it was is kept in it: the float32 weights
        for `restore`, twice the memory of those in bfloat16.

    Raises:
        TypeError: not a module, or one of TorchScript, torch.compile or DistributedDataParallel.
        ValueError: a dtype that is not floating, a model optimised before, one with a `forward` of its own object, or
            parameters on the meta device.
    """
    network = _network(model)
    floats = [p for p in network.parameters() if p.is_floating_point()]
    if any(p.is_meta for p in network.parameters()):
        raise ValueError("the model has parameters on the meta device: load its weights first")
    if any(hasattr(m, _STATE) or type(m) in _OURS for m in network.modules()):
        raise ValueError("the model, or a part of it, is optimised already: ddpm_fast.restore it first")
    if "forward" in vars(network):
        raise ValueError(
            "the model's forward was replaced on this very object, as by hooks of accelerate: undo that first"
        )
    if dtype is None:
        dtype = _fast_dtype(floats)
    elif not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")

    state = _State({}, {}, packing.PackedWeights())
    for name, module in network.named_modules():
        kind = _kind(module)
        if kind is not None:
            state.classes[name] = type(module)
            module.__class__ = kind
    for name, tensor in _tensors(network):
        old = tensor.data
        images = tensor.dim() == 4 and isinstance(tensor, nn.Parameter)
        layout = torch.channels_last if images else torch.preserve_format
        new = old.to(dtype or old.dtype, memory_format=layout)
        if new is not old:
            state.tensors[name] = _Former(old.dtype, old.stride(), old if new.dtype != old.dtype else None)
            _replace(tensor, new)
    setattr(network, _STATE, state)
    network.__class__ = _optimized(type(network))
    return model


def restore(model: M) -> M:
    """Undoes `optimize` in place.

    A tensor that has not changed in between has its former bits again, one that has (by training, say, or by loading
    a state dict) is converted back from the dtype it is in. Memory formats and classes are the former ones too.

    Args:
        model: what `optimize` was given, or a copy of it.

    Returns:
        `model` itself.

    Raises:
        ValueError: not an optimised model.
    """
    network = _network(model)
    state = vars(network).get(_STATE)
    if state is None:
        raise ValueError("the model is not optimised")
    network.__class__ = type(network).__base__
    delattr(network, _STATE)
    modules = dict(network.named_modules())
    for name, kind in state.classes.items():
        if type(modules.get(name)) in _OURS:  # and not replaced since
            modules[name].__class__ = kind
    for name, tensor in _tensors(network):
        former = state.tensors.get(name)
        if former is None:
            continue
        kept = former.kept
        if kept is not None and kept.shape == tensor.shape:
            kept = kept.to(tensor.device)
            if torch.equal(kept.to(tensor.dtype), tensor.data):
                _replace(tensor, kept)
                continue
        new = tensor.data.to(former.dtype)
        if len(former.stride) == new.dim():
            new = torch.empty_strided(new.shape, former.stride, dtype=new.dtype, device=new.device).copy_(new)
        _replace(tensor, new)
    return model


@dataclasses.dataclass
class _Former:
    """What a parameter or buffer was."""

    dtype: torch.dtype
    stride: tuple[int, ...]
    kept: Tensor | None  # its values, where others are in its place


@dataclasses.dataclass
class _State:
    """What `restore` needs, by name, so that it is that of a copy as well; and the packed weights."""

    classes: dict[str, type]
    tensors: dict[str, _Former]
    weights: packing.PackedWeights


def _network(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    wrappers = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{type(model).__name__} wraps or replaces a module that it has read: optimize that, and wrap it then"
        )
    if "alphas_cumprod" in model._buffers and isinstance(getattr(model, "model", None), nn.Module):
        return _network(model.model)  # a process, whose tables stay as they are
    return model


def _fast_dtype(parameters: list[Tensor]) -> torch.dtype | None:
    if not parameters or any(p.dtype != torch.float32 for p in parameters):
        return None
    kind = parameters[0].device.type
    if kind == "cpu":
        fast = torch.bfloat16 in packing.DTYPES and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    else:
        fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else None


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    named = chain(network.named_parameters(), network.named_buffers())
    return ((name, tensor) for name, tensor in named if tensor.is_floating_point())


def _replace(tensor: Tensor, data: Tensor) -> None:
    """As nn.Module.to does it; a gradient follows."""
    grad, tensor.grad = tensor.grad, None
    tensor.data = data
    if grad is not None:
        tensor.grad = torch.empty_like(data).copy_(grad)


# The model


@functools.cache
def _optimized(cls: type) -> type:
    """The class of an optimised model of class `cls`."""

    class Optimized(cls):
        @functools.wraps(cls.forward)
        def forward(self, *args, **kwargs):
            dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
            given: list[torch.dtype] = []

            def arriving(x: Tensor) -> Tensor:
                if not x.is_floating_point() or x.dim() < 2 or x.numel() <= len(x):
                    return x
                given.append(x.dtype)
                return x if dtype is None else x.to(dtype)

            def leaving(x: Tensor) -> Tensor:
                x = _computed(x)
                return x.to(given[0]) if given and x.dtype == dtype else x

            args, kwargs = _each(arriving, args), _each(arriving, kwargs)
            if torch.compiler.is_compiling():
                return _each(leaving, super().forward(*args, **kwargs))
            weights = getattr(self, _STATE).weights
            weights.refresh()
            with packing.packed(weights):
                return _each(leaving, super().forward(*args, **kwargs))

        def __reduce_ex__(self, protocol: int) -> tuple:
            # It is not found by its name, as pickle and copy would look for it.
            reduced = super().__reduce_ex__(protocol)
            if reduced[0] is copyreg.__newobj__ and reduced[1] == (Optimized,):
                return (_new, (cls,), *reduced[2:])
            return reduced

    Optimized.__name__, Optimized.__qualname__, Optimized.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    Optimized.__doc__ = cls.__doc__
    return Optimized


def _new(cls: type) -> nn.Module:
    return _optimized(cls).__new__(_optimized(cls))


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` of every tensor in it: dataclasses (diffusers' results), tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        new = {name: _each(change, getattr(value, name)) for name in fields}
        same = all(new[name] is getattr(value, name) for name in fields)
        return value if same else dataclasses.replace(value, **new)
    if isinstance(value, tuple):
        new = [_each(change, v) for v in value]
        return type(value)(*new) if hasattr(value, "_fields") else tuple(new)
    if type(value) is list:
        return [_each(change, v) for v in value]
    if type(value) is dict:
        return {k: _each(change, v) for k, v in value.items()}
    return value


# Its modules


def _kind(module: nn.Module) -> type | None:
    """The class that takes the place of the module's own."""
    if "forward" in vars(module):
        return None
    if type(module) is nn.Conv2d:
        return _Conv2d
    if type(module) is nn.Linear:
        return _Linear
    if isinstance(module, nn.GroupNorm) and module.affine and (type(module) is nn.GroupNorm or _only_casts(module)):
        return _GroupNorm
    return None


def _only_casts(norm: nn.GroupNorm) -> bool:
    """Whether its forward is a group norm between casts, as OpenAI's GroupNorm32: it is watched while it runs."""
    watch = _Watch()
    x = torch.zeros(1, norm.num_channels, 2, 2, dtype=norm.weight.dtype, device=norm.weight.device)
    try:
        with torch.no_grad(), watch:
            type(norm).forward(norm, x)
    except Exception:  # whatever it is, it is not that
        return False
    return watch.norms == [(norm.num_groups, norm.eps)]


class _Watch(TorchFunctionMode):
    """Notes the group norms that are computed, and None for everything else but casts."""

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


def _arriving(x: Tensor, weight: Tensor) -> Tensor:
    """Networks make some tensors in float32 whatever their weights: embeddings of t, or what they cast themselves."""
    x = _computed(x)
    if x.dtype == weight.dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


class _Conv2d(packing.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = _arriving(x, self.weight)
        if x.dim() == 4:  # others' code drops the format, on purpose for large batches or before a shortcut
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class _Linear(packing.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_arriving(x, self.weight))


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = _computed(x)
        if x.dim() < 3 or x.shape[1] != self.num_channels or x.numel() == 0 or not x.is_floating_point():
            return super().forward(x)  # and its errors
        # Hooks may keep what they see.
        watched = self._forward_hooks or self._backward_hooks or nn.modules.module._has_any_global_hook()
        if watched or type(x) is not Tensor or torch.compiler.is_compiling():
            return self.compute(x, False)
        return _Pending.of(self, x)

    def compute(self, x: Tensor, silu: bool, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        tokens = _are_tokens(x)  # and shall stay a view of channels-last images
        if tokens:
            x = x.unsqueeze(3)
        y = ops.group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, silu=silu, scale=scale, shift=shift
        )
        return y.squeeze(3) if tokens else y


_OURS = (_Conv2d, _Linear, _GroupNorm)


# What a group norm returns


class _Pending(Tensor):
    """A tensor that is computed when it is first used: norm(x), norm(x) * factor, norm(x) * factor + shift.

    A SiLU is computed together with it. It has no memory of its own, so that code which does not ask
    `__torch_function__` (TorchScript, say) comes to `__torch_dispatch__`, and what asks neither fails.
    """

    _norm: _GroupNorm
    _x: Tensor
    _factor: Tensor | None  # (N, C, 1, 1), where no shift was added yet
    _scale: Tensor | None  # (N, C), factor - 1
    _shift: Tensor | None  # (N, C)
    _sigmoid_of: "_Pending | None"  # this is the sigmoid of that
    _value: Tensor | None  # what it is, once computed
    _grad_mode: bool  # whether gradients were on
    _versions: list[tuple[Tensor, int]]  # nobody may write to these in between

    @classmethod
    def of(
        cls,
        norm: _GroupNorm,
        x: Tensor,
        factor: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        sigmoid_of: "_Pending | None" = None,
    ) -> "_Pending":
        inputs = [v for v in (x, factor, shift) if v is not None]
        grad = torch.is_grad_enabled()
        needs_grad = grad and any(v.requires_grad for v in (norm.weight, norm.bias, *inputs))
        self = Tensor._make_wrapper_subclass(
            cls, x.shape, strides=_strides(x), dtype=x.dtype, device=x.device, requires_grad=needs_grad
        )
        if needs_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_lost)
        self._norm, self._x, self._factor, self._scale, self._shift = norm, x, factor, scale, shift
        self._sigmoid_of, self._value, self._grad_mode = sigmoid_of, None, grad
        # Inference tensors do not count.
        self._versions = [(v, v._version) for v in inputs if not v.is_inference()]
        return self

    def compute(self) -> Tensor:
        if self._value is None:
            with torch.set_grad_enabled(self._grad_mode):
                if self._sigmoid_of is not None:
                    self._value = torch.sigmoid(self._sigmoid_of.compute())
                elif self._factor is not None:
                    self._value = self._fused(silu=False) * self._factor
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
        return _Pending.of(self._norm, self._x, shift=self._shift, sigmoid_of=self)

    def times(self, other: Any) -> Tensor:
        if isinstance(other, _Pending) and other._sigmoid_of is self and other._value is None:
            return self.silu()
        if isinstance(other, _Pending) and other is self._sigmoid_of and self._value is None:
            return other.silu()
        if (
            self._open()
            and self._factor is self._scale is None
            and self._of_channels(other)
            and other.device.type == "cpu"
        ):
            # What it was made of, if it was made as 1 + scale. Another factor near 0 would be rounded as if near 1.
            scale = other - 1
            if torch.equal(scale + 1, other):
                return _Pending.of(self._norm, self._x, factor=other, scale=scale.flatten(1))
        return self.compute() * _computed(other)

    def plus(self, other: Any) -> Tensor:
        if self._open() and self._factor is not None and self._of_channels(other):
            return _Pending.of(self._norm, self._x, scale=self._scale, shift=other.flatten(1))
        return self.compute() + _computed(other)

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
        return self._norm.compute(self._x, silu, self._scale, self._shift)

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
        return func(*_each(_computed, args), **_each(_computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*_each(_computed, args), **_each(_computed, kwargs or {}))


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


def _computed(x: Any) -> Any:
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
