"""Backend selection: plain PyTorch, or the kernels for the CPU, for Triton or for CUDA.

Each op is registered twice. `ddpm_fast::op` has the reference as its default kernel, and the compiled modules (or
Triton, if there is no CUDA module) add kernels for their devices: PyTorch's dispatcher makes the automatic choice.
`ddpm_fast_triton::op` always runs Triton's kernel. Both share their fake kernel and their gradient.
"""

__all__ = ["BACKENDS", "OPS", "Op", "availability", "backend", "chosen", "define", "has_triton", "reference_gradient"]

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib import import_module, util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .transforms import transformed

BACKENDS = ("reference", "cpu", "triton", "cuda")


def _known(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return name


_default: str | None = _known(os.environ.get("DDPM_FAST_BACKEND") or None)
_chosen: ContextVar[str | None] = ContextVar("ddpm_fast backend", default=_default)
_contexts: ContextVar[tuple[list[str | None], ...]] = ContextVar("ddpm_fast backend contexts", default=())
# The contexts of all threads, and the choice of the one that was entered last. torch.compile guards on the values of
# globals, and before 2.14 it cannot trace a ContextVar.
_of_process: list[list[str | None]] = []
_latest: str | None = _default
_lock = threading.Lock()


def chosen() -> str | None:
    """The backend that was asked for in this thread, or in compiled code in the process; None for the automatic one."""
    return _latest if torch.compiler.is_compiling() else _chosen.get()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within this context, all ops are computed by one backend.

    The choice holds in the thread (or asyncio task) that enters the context; others keep their own. Contexts may
    overlap without nesting, as those of two generators do: the one entered last holds among those not yet left.
    The gradient of an op is computed by the backend that computed the op. Compiled code follows the context that was
    entered last in any thread, since torch.compile guards on nothing that belongs to one thread.

    Args:
        name: reference (plain PyTorch, any device), cpu (C++), triton or cuda (C++); None for the automatic choice,
            which is also what holds outside, unless the environment variable DDPM_FAST_BACKEND names a backend.

    Raises:
        ValueError: an unknown name. An op whose tensors that backend cannot serve raises RuntimeError when it is
            called, with the reason.
    """
    entry = [_known(name)]  # a list, so that it differs from every other entry
    _hold((*_contexts.get(), entry))
    _update_latest(lambda entries: [*entries, entry])
    try:
        yield
    finally:
        _hold(tuple(other for other in _contexts.get() if other is not entry))
        _update_latest(lambda entries: [other for other in entries if other is not entry])


def _hold(contexts: tuple[list[str | None], ...]) -> None:
    _contexts.set(contexts)
    _chosen.set(contexts[-1][0] if contexts else _default)


def _update_latest(change: Callable[[list[list[str | None]]], list[list[str | None]]]) -> None:
    global _latest
    with _lock:
        _of_process[:] = change(_of_process)
        _latest = _of_process[-1][0] if _of_process else _default


def availability(name: str) -> tuple[bool, str]:
    """Whether a backend can be used here on any tensor at all, and why not."""
    if name == "reference":
        return True, ""
    if name != "triton":
        module = native.modules[name]
        if module.available and name == "cuda":
            if not torch.cuda.is_available():
                return False, "built and loaded, but PyTorch finds no NVIDIA GPU"
            torch.cuda.init()
            if len(_unserved) == torch.cuda.device_count():
                return False, next(iter(_unserved.values()))
        return module.available, module.reason
    if not has_triton():
        return False, "Triton is not installed"
    device = _triton_device()
    reason = triton_fault(device) if device else "Triton finds no GPU"
    return not reason, reason


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


@cache
def triton_fault(device: str) -> str:
    """Why Triton cannot launch kernels on a type of device; empty if it can.

    Found out once, by the smallest kernel there is: to launch one, Triton compiles a C program, for which it needs a C
    compiler and Python's header files.
    """
    keys = torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        by_triton("fold_in", keys, keys[0, :1])
    except Exception as error:  # of Triton, of the compiler it calls, of LLVM
        return f"Triton cannot launch kernels here: {type(error).__name__}: {error}"
    return ""


def by_triton(name: str, *args: Any) -> Any:
    """The strict op as a Triton kernel."""
    with torch.accelerator.device_index(args[0].device.index):  # Triton launches on the current device
        return getattr(import_module("ddpm_fast.ops.triton"), name)(*args)


def by_triton_if_it_works(name: str, kernel: Callable[..., Any], *args: Any) -> Any:
    """The strict op as a Triton kernel, or where Triton cannot launch one, in plain PyTorch, which is said once."""
    reason = triton_fault(args[0].device.type)
    if not reason:
        return by_triton(name, *args)
    _tell(args[0].device.type, reason, stacklevel=3)
    return kernel(*args)


def _tell(device: str, reason: str, stacklevel: int) -> None:
    """Says, once, that plain PyTorch serves a device, and why."""
    if not torch.compiler.is_compiling() and reason not in _told:
        _told.add(reason)
        warnings.warn(f"ddpm_fast runs in plain PyTorch on {device} tensors: {reason}", stacklevel=stacklevel)


_told: set[str] = set()

# GPUs for which the CUDA module has no kernels, with the reason. They are found when PyTorch initialises CUDA, before
# any tensor is there: code that torch.compile traces can look into a dictionary, but not ask a GPU what it is.
_unserved: dict[int, str] = {}
if native.modules["cuda"].available:
    torch.cuda._lazy_call(lambda: _unserved.update(native.unserved_gpus()))


def _fault_of_gpu(tensor: Tensor) -> str:
    """Why the CUDA module has no kernels for a tensor's GPU; empty if it has, and on other devices."""
    return _unserved.get(tensor.device.index, "") if _unserved and tensor.device.type == "cuda" else ""


def _serves(name: str, tensor: Tensor) -> tuple[bool, str]:
    available, reason = availability(name)
    if not available:
        return available, reason
    if name == "cuda" and (reason := _fault_of_gpu(tensor)):
        return False, reason
    device = tensor.device.type
    own = {"reference": device, "cpu": "cpu", "cuda": "cuda"}.get(name) or _triton_device()
    return device in (own, "meta"), f"it works on {own} tensors, and was given {device} ones"


class Op(NamedTuple):
    """An op on every backend. All functions take the strict op's arguments, in the order of its schema."""

    name: str
    arguments: type[tuple]  # a NamedTuple of the strict op's arguments
    kernel: Callable[..., Any]  # the strict op in plain PyTorch
    reference: Callable[..., Any]  # the same, which PyTorch can differentiate and transform
    automatic: Callable[..., Any]  # the strict op as PyTorch dispatches it
    triton: Callable[..., Any]  # the strict op by Triton

    def __call__(self, like: Tensor, *, differentiated: bool = False) -> Callable[..., Any]:
        """The function that serves tensors like the one given."""
        return self.reference if self.by_reference(like, differentiated) else self.kernel_of(chosen())

    def by_reference(self, like: Tensor, differentiated: bool = False) -> bool:
        """Whether the reference serves tensors like the one given.

        It does if it was asked for, if a transform of torch.func or forward-mode differentiation is active, if the op
        is to be differentiated by more than its registered gradient covers, on a GPU for which the CUDA module has no
        kernels, and for float64 data whatever the backend: the kernels' arithmetic is float32.

        Raises:
            RuntimeError: the backend that was asked for cannot serve the tensor.
        """
        name = chosen()
        fault = _fault_of_gpu(like) if name is None else ""
        if fault:
            _tell(str(like.device), fault, stacklevel=5)
        elif name is None:
            if like.device.type in _unannounced:
                _announce(like.device.type)
        elif not torch.compiler.is_compiling():
            serves, reason = _serves(name, like)
            if not serves:
                raise RuntimeError(f"{self.name}: backend {name!r} was asked for, but {reason}")
        if fault or differentiated or transformed():
            return True
        return like.dtype == torch.float64 or name == "reference"

    def kernel_of(self, name: str | None) -> Callable[..., Any]:
        """The strict op of a backend."""
        return self.triton if name == "triton" else self.automatic


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
    _tell(device, native.modules[device].reason, stacklevel=6)


def reference_gradient(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """The gradients of a function of tensors for a gradient of its result, by autograd; None where not needed.

    Where gradients are recorded (create_graph=True), those returned can be differentiated in turn.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since a tensor may be given for two arguments; detached ones need no graph behind them.
        inputs = [
            x if x is None or not need else x.view_as(x) if create_graph else x.detach().requires_grad_()
            for x, need in zip(tensors, needed, strict=True)
        ]
        leaves = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(function(*inputs), leaves, grad, create_graph=create_graph))
    return [next(found) if need and x is not None else None for x, need in zip(inputs, needed, strict=True)]


def define(
    name: str,
    schema: str,
    *,
    arguments: type[tuple],
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Registers an op.

    Args:
        schema: its arguments and results. Tensors come checked: dense, contiguous or channels-last, in agreeing dtypes.
        arguments: a NamedTuple of the schema's arguments, which mirrors the C++ struct.
        kernel: what the op does, in plain PyTorch; the default for devices that have nothing better.
        reference: the same, for autograd to differentiate and torch.func to transform; what backend("reference") calls.
        fake: the results' shapes, dtypes and strides.
        setup_context, backward: the gradient, as torch.library.register_autograd takes it. When gradients are recorded
            (create_graph=True) or `transformed()`, it is computed by the reference, so that it can be differentiated.
    """

    for namespace, default in (("ddpm_fast", kernel), ("ddpm_fast_triton", partial(by_triton, name))):
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", default)
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"ddpm_fast::{name}", "CUDA")
    if not has_cuda and has_triton():
        torch.library.impl(f"ddpm_fast::{name}", "cuda", partial(by_triton_if_it_works, name, kernel))
    automatic, of_triton = (getattr(space, name).default for space in (torch.ops.ddpm_fast, torch.ops.ddpm_fast_triton))
    OPS[name] = Op(name, arguments, kernel, reference, automatic, of_triton)
    return OPS[name]
