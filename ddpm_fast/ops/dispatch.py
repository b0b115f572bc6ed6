"""Who does the work: plain PyTorch, or the kernels for the CPU, for Triton or for CUDA.

Each op is registered twice. `ddpm_fast::op` has the reference as its default kernel, and the compiled modules (or
Triton, where there is no CUDA module) add kernels for their device: PyTorch's dispatcher is the automatic choice.
`ddpm_fast_triton::op` is Triton's alone, for those who ask for it. Both share their fake kernel and their gradient.
"""

__all__ = ["BACKENDS", "OPS", "Op", "availability", "backend", "define", "has_triton"]

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module, util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

BACKENDS = ("reference", "cpu", "triton", "cuda")


def _known(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return name


# Not a ContextVar, which torch.compile cannot guard on: the choice holds for the whole process.
_chosen: str | None = _known(os.environ.get("DDPM_FAST_BACKEND") or None)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within this context, all ops are done by one backend, in all threads.

    Args:
        name: reference (plain PyTorch, any device), cpu (C++), triton or cuda (C++); None for the automatic choice,
            which is also what holds outside, unless the environment variable DDPM_FAST_BACKEND names a backend.

    Raises:
        ValueError: an unknown name. An op whose tensors that backend cannot serve raises RuntimeError when it is
            called, with the reason.
    """
    global _chosen
    before, _chosen = _chosen, _known(name)
    try:
        yield
    finally:
        _chosen = before


def availability(name: str) -> tuple[bool, str]:
    """Whether a backend can be used here on any tensor at all, and why not."""
    if name == "reference":
        return True, ""
    if name != "triton":
        module = native.modules[name]
        if module.available and name == "cuda" and not torch.cuda.is_available():
            return False, "built and loaded, but PyTorch finds no NVIDIA GPU"
        return module.available, module.reason
    if not has_triton():
        return False, "Triton is not installed"
    device = _triton_device()
    return (device is not None, "" if device else "Triton finds no GPU")


@cache
def has_triton() -> bool:
    """Whether Triton is installed. It is imported when an op first needs it, and not before."""
    found = util.find_spec("triton")
    return found is not None and found.origin is not None  # any folder of that name has a spec


def _triton_device() -> str | None:
    """The type of device that Triton's active driver launches on: that of a simulator can be the CPU."""
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type
    except RuntimeError:  # no driver is active
        return None


def _serves(name: str, tensor: Tensor) -> tuple[bool, str]:
    available, reason = availability(name)
    if not available:
        return available, reason
    device = tensor.device.type
    own = {"reference": device, "cpu": "cpu", "cuda": "cuda"}.get(name) or _triton_device()
    return device in (own, "meta"), f"it works on {own} tensors, and was given {device} ones"


class Op(NamedTuple):
    """An op on every backend."""

    name: str
    kernel: Callable[..., Any]  # the strict op in plain PyTorch
    reference: Callable[..., Any]  # the same for autograd to differentiate
    automatic: Callable[..., Any]  # the strict op as PyTorch dispatches it
    triton: Callable[..., Any]  # the strict op as Triton does it

    def __call__(self, like: Tensor) -> Callable[..., Any]:
        """The function that serves tensors like the one given; the reference itself where that was asked for.

        Data in float64 is the reference's whatever the backend: the kernels' arithmetic is float32.
        """
        if _chosen is None:
            if like.device.type in _unannounced:
                _announce(like.device.type)
        elif not torch.compiler.is_compiling():
            serves, reason = _serves(_chosen, like)
            if not serves:
                raise RuntimeError(f"{self.name}: backend {_chosen!r} was asked for, but {reason}")
        if like.dtype == torch.float64 or _chosen == "reference":
            return self.reference
        return self.triton if _chosen == "triton" else self.automatic


OPS: dict[str, Op] = {}

# Devices whose tensors the reference may have to serve, with nobody told so far.
_unannounced = {name for name, module in native.modules.items() if not module.available}


def _announce(device: str) -> None:
    """Says, once, that no kernels serve a device, and why."""
    if torch.compiler.is_compiling():
        return
    _unannounced.discard(device)
    if device == "cuda" and availability("triton")[0]:
        return
    reason = native.modules[device].reason
    warnings.warn(f"ddpm_fast runs in plain PyTorch on {device} tensors: {reason}", stacklevel=4)


def define(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Registers an op.

    Args:
        schema: its arguments and results. Tensors come checked: dense, contiguous or channels-last, in agreeing dtypes.
        kernel: what the op does, in plain PyTorch; the default for devices that have nothing better.
        reference: the same for autograd to differentiate; what backend("reference") calls.
        fake: the results' shapes, dtypes and strides.
        setup_context, backward: the gradient, as torch.library.register_autograd takes it.
    """

    def triton(*args: Any, **kwargs: Any) -> Any:
        with torch.accelerator.device_index(args[0].device.index):  # Triton launches on the current device
            return getattr(import_module("ddpm_fast.ops.triton"), name)(*args, **kwargs)

    for namespace, default in (("ddpm_fast", kernel), ("ddpm_fast_triton", triton)):
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", default)
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"ddpm_fast::{name}", "CUDA")
    if not has_cuda and has_triton():
        torch.library.impl(f"ddpm_fast::{name}", "cuda", triton)
    automatic, by_triton = (getattr(space, name).default for space in (torch.ops.ddpm_fast, torch.ops.ddpm_fast_triton))
    OPS[name] = Op(name, kernel, reference, automatic, by_triton)
    return OPS[name]
