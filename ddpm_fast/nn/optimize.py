"""Somebody else's network, made fast in place: see `optimize`.

The modules keep their parameters and their code. What changes is the class of some of them: convolutions and linear
layers keep packed weights, and a group norm waits for the SiLU that follows it.
"""

__all__ = ["computes_in_bfloat16", "optimize", "restore"]

import copyreg
import dataclasses
import functools
from collections.abc import Iterator
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import packed_weights as packing
from .lazy_group_norm import PendingGroupNorm, computed, each, only_casts

M = TypeVar("M", bound=nn.Module)

_STATE = "_ddpm_fast_state"  # an attribute of an optimised model


def optimize(model: M, dtype: torch.dtype | None = None) -> M:
    """Makes a network fast in place: channels-last, in a faster dtype, with packed weights and fused group norms.

    For networks of other packages, such as diffusers' UNet2DModel, denoising_diffusion_pytorch's Unet or OpenAI's
    UNetModel, and for `ddpm_fast.UNet`. `restore` undoes it. The results are those of the network to the rounding of
    the dtype, gradients too.

    - Parameters and buffers are converted to `dtype`, and on a GPU convolutions' weights to channels-last. The
      Parameter objects stay, so that optimizers, hooks and averages that hold them still do.
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
        # On a CPU, the order of a weight is no matter for speed, but for PyTorch's fused AdamW: it takes weights and
        # the moments that it has of them element by element as they lie, and would mix those of a reordered one.
        reordered = tensor.dim() == 4 and isinstance(tensor, nn.Parameter) and tensor.device.type != "cpu"
        layout = torch.channels_last if reordered else torch.preserve_format
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
    return torch.bfloat16 if computes_in_bfloat16(parameters[0].device.type) else None


def computes_in_bfloat16(kind: str) -> bool:
    """Whether devices of a kind, `cpu` or `cuda`, have instructions for it; others are not known."""
    if kind == "cpu":
        return torch.bfloat16 in packing.DTYPES and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


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
                x = computed(x)
                return x.to(given[0]) if given and x.dtype == dtype else x

            args, kwargs = each(arriving, args), each(arriving, kwargs)
            if torch.compiler.is_compiling():
                return each(leaving, super().forward(*args, **kwargs))
            weights = getattr(self, _STATE).weights
            weights.refresh()
            with packing.packed(weights):
                return each(leaving, super().forward(*args, **kwargs))

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


# Its modules


def _kind(module: nn.Module) -> type | None:
    """The class that takes the place of the module's own."""
    if "forward" in vars(module):
        return None
    if type(module) is nn.Conv2d:
        return _Conv2d
    if type(module) is nn.Linear:
        return _Linear
    if isinstance(module, nn.GroupNorm) and module.affine and (type(module) is nn.GroupNorm or only_casts(module)):
        return PendingGroupNorm
    return None


def _arriving(x: Tensor, weight: Tensor) -> Tensor:
    """Networks make some tensors in float32 whatever their weights: embeddings of t, or what they cast themselves."""
    x = computed(x)
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


_OURS = (_Conv2d, _Linear, PendingGroupNorm)
