"""The classes that `optimize` gives to the modules of a network."""

__all__ = ["AS_IT_WAS", "OPTIMIZED_LAYERS", "SHARED", "STATE", "Shared", "call_as_it_was", "calling", "replacement"]

import copyreg
import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import cuda_graph
from ..ops.transforms import transformed
from . import packed_weights as packing
from .call_graphs import CallGraphs
from .group_norm import GroupNorm
from .lazy_group_norm import PendingGroupNorm, computed, only_casts, trains_in_float32
from .mixed_dtypes import each, in_one_dtype, is_timestep
from .one_plus_scale import note

STATE = "_ddpm_fast_state"  # the attribute of an optimised model that holds what `restore` needs
AS_IT_WAS = "_ddpm_fast_as_it_was"  # the attribute of a module in an optimised model that computes as it did before
SHARED = "_ddpm_fast_shared"  # the attribute of each optimised module that holds the network's `Shared`


class Shared:
    """What the modules of one optimised network share.

    Attributes:
        weights: the packed weights.
        graphs: the calls of the network that were captured as CUDA graphs.
        reduced: the dtype that the network was converted to, or None where it kept its own.
        first_call: called before the first inference with the network and that call.
        dtype: what `model.dtype` was before the conversion; None where the model has no such property.
    """

    def __init__(self, reduced: torch.dtype | None, dtype: torch.dtype | None) -> None:
        self.weights = packing.PackedWeights()
        self.graphs = CallGraphs()
        self.first_call: Callable[[nn.Module, Callable[[], Any]], None] | None = None
        self.reduced = reduced
        self.dtype = dtype


# The network whose module is being called in this thread.
_in_call: ContextVar[Shared | None] = ContextVar("the optimised network in a call", default=None)


def replacement(module: nn.Module) -> type | None:
    """The class that replaces the module's own, or None where the module keeps it."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule) or kind.forward is nn.Module.forward:
        return None
    if kind in (GroupNorm, packing.Conv2d, packing.Linear):
        return None  # fast as they are, and the blocks of our U-Net ask for these classes
    if "forward" not in vars(module):
        if kind is nn.Conv2d:
            return _Conv2d
        if kind is nn.Linear:
            return _Linear
        if isinstance(module, nn.GroupNorm) and module.affine and (kind is nn.GroupNorm or only_casts(module)):
            return PendingGroupNorm
    return calling(kind) if _dtype(module) is not None else None


@functools.cache
def calling(cls: type) -> type:
    """A subclass of `cls`, of the same name, whose outermost call in a network casts inputs and results.

    Whichever module of a network is called from outside, be it the network, or the encoder of an autoencoder within
    `encode`, takes any floating dtype and returns the dtype that it was given.
    """

    class Optimized(cls):
        @functools.wraps(cls.forward)
        def forward(self, *args, **kwargs):
            if AS_IT_WAS in self.__dict__:
                return call_as_it_was(self, functools.partial(cls.forward, self), args, kwargs)
            if torch.compiler.is_compiling():
                if STATE in self.__dict__:
                    return _cast_call(self, functools.partial(cls.forward, self), args, kwargs)
                return cls.forward(self, *args, **kwargs)
            shared = vars(self).get(SHARED)  # none in a slice of an nn.Sequential, or once restored
            if shared is None or _in_call.get() is shared:
                return cls.forward(self, *args, **kwargs)
            call = functools.partial(_outermost_call, self, functools.partial(cls.forward, self), shared)
            if STATE not in vars(self):
                return call(*args, **kwargs)
            if shared.first_call is not None and _infers(self, args, kwargs):
                first_call, shared.first_call = shared.first_call, None
                first_call(self, functools.partial(call, *args, **kwargs))
            return shared.graphs.call(self, call, args, kwargs)

        def __reduce_ex__(self, protocol: int) -> tuple:
            # pickle and copy would look the class up by its name, where `cls` is.
            reduced = super().__reduce_ex__(protocol)
            if reduced[0] is copyreg.__newobj__ and reduced[1] == (Optimized,):
                return (_new, (cls,), *reduced[2:])
            return reduced

    if isinstance(getattr(cls, "dtype", None), property):

        def dtype(self) -> torch.dtype:
            """The dtype that the model is to be called with; during a call, the one that it computes in."""
            own, shared = cls.dtype.fget(self), vars(self).get(SHARED)
            outside = shared is not None and _in_call.get() is not shared
            return shared.dtype if outside and shared.dtype is not None and own == shared.reduced else own

        Optimized.dtype = property(dtype)

    Optimized.__name__, Optimized.__qualname__, Optimized.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    Optimized.__doc__ = cls.__doc__
    return Optimized


def _new(cls: type) -> nn.Module:
    return calling(cls).__new__(calling(cls))


def _infers(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a call is one of inference: without gradients, in evaluation mode, and not within a capture."""
    x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    return (
        x is not None
        and not model.training
        and not (torch.is_grad_enabled() or transformed() or torch.jit.is_tracing() or cuda_graph.capturing(x))
        and vars(model)[STATE].modules[0][0] is model  # not a copy in evaluation mode, which shares its state
    )


def _outermost_call(module: nn.Module, forward, shared: Shared, *args, **kwargs):
    with ExitStack() as stack:
        stack.callback(_in_call.reset, _in_call.set(shared))
        shared.weights.refresh()
        stack.enter_context(packing.packed(None if transformed() else shared.weights))
        if shared.reduced is not None or _on_gpu(module):
            stack.enter_context(_Functions(shared.reduced))
        if torch._C._current_graph_task_id() != -1:
            # Gradient checkpointing repeats a part of a call, whose tensors have the dtypes of the inside.
            return each(computed, forward(*args, **kwargs))
        return _cast_call(module, forward, args, kwargs)


class _Functions(TorchFunctionMode):
    """How PyTorch's functions are called within a call of an optimised network."""

    def __init__(self, reduced: torch.dtype | None) -> None:
        super().__init__()
        self.reduced = reduced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.reduced is not None:
            args, kwargs = in_one_dtype(func, args, kwargs, self.reduced)
        result = func(*args, **kwargs)
        note(func, args, kwargs, result)
        return result


def _cast_call(module: nn.Module, forward, args: tuple, kwargs: dict):
    """Calls `forward` with floating inputs in the dtype of the module's weights, and casts its results back."""
    dtype = _dtype(module)
    given: list[torch.dtype] = []

    def arriving(x: Tensor) -> Tensor:
        if not x.is_floating_point() or is_timestep(x):
            return x
        given.append(x.dtype)
        return x if dtype is None else x.to(dtype)

    def leaving(x: Tensor) -> Tensor:
        x = computed(x)
        return x.to(given[0]) if given and x.dtype == dtype else x

    return each(leaving, forward(*each(arriving, args), **each(arriving, kwargs)))


def call_as_it_was(module: nn.Module, forward, args: tuple, kwargs: dict):
    """Calls a forward whose weights have the network's former dtype with what the network makes in its present one."""
    dtype, reduced = _dtype(module), getattr(module, SHARED).reduced
    raised: list[Tensor] = []

    def arriving(x: Tensor) -> Tensor:
        x = computed(x)
        if x.dtype != reduced or dtype is None:
            return x
        raised.append(x)
        return x.to(dtype)

    def leaving(x: Tensor) -> Tensor:
        return x.to(reduced) if raised and x.dtype == dtype else x

    return each(leaving, forward(*each(arriving, args), **each(arriving, kwargs)))


def _dtype(module: nn.Module) -> torch.dtype | None:
    """That of the weights a module computes with. float8 is a storage format, whose owner converts it in each call.

    Modules that compute as they did before count only where there are no others.
    """
    changed = (m for m in module.modules() if AS_IT_WAS not in m.__dict__)
    weights = itertools.chain((p for m in changed for p in m.parameters(recurse=False)), module.parameters())
    return next((p.dtype for p in weights if p.is_floating_point() and p.dtype.itemsize > 1), None)


def _on_gpu(module: nn.Module) -> bool:
    return next((p.device.type != "cpu" for p in module.parameters()), False)


def _call_layer(layer: nn.Module, forward, x: Tensor) -> Tensor:
    """Calls a layer with x in the dtype of its weight.

    Networks make some tensors in float32 whatever their weights are: embeddings of t, or what they cast for precision.
    Where the layer itself is what is called from outside, its result has the dtype of x.
    """
    x, weight = computed(x), layer.weight
    if x.dtype == weight.dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return forward(x)
    y = forward(x.to(weight.dtype))
    if torch.compiler.is_compiling() or _in_call.get() is not None or torch._C._current_graph_task_id() != -1:
        return y
    return y.to(x.dtype)


class _Conv2d(packing.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, _Conv2d):  # restored since, while a hook still holds this method
            return type(self).forward(self, x)
        return _call_layer(self, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        # Some code drops the format, deliberately for large batches or before a shortcut.
        if x.dim() == 4 and not transformed() and not trains_in_float32(x):
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class _Linear(packing.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, _Linear):
            return type(self).forward(self, x)
        return _call_layer(self, super().forward, x)


OPTIMIZED_LAYERS = (_Conv2d, _Linear, PendingGroupNorm)
