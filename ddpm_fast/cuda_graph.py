"""CUDA graphs: one launch replaces hundreds, so that the host does not limit the speed."""

__all__ = ["CannotCapture", "capture", "capturing", "enabled", "without"]

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, cuda

WARM_UP = 2  # calls before the capture, in which libraries choose kernels and allocate their workspaces

_without: ContextVar[bool] = ContextVar("nothing may be captured", default=False)
_lock = threading.Lock()  # a process captures one graph at a time


class CannotCapture(RuntimeError):
    """Why a function cannot be captured. No capture is under way, and the function can be called as before."""


def enabled(x: Tensor) -> bool:
    """Whether work on x may be captured: x is on a GPU, and the environment variable DDPM_FAST_GRAPHS is not 0."""
    return x.is_cuda and os.environ.get("DDPM_FAST_GRAPHS") != "0"


def capturing(x: Tensor) -> bool:
    """Whether work on x is a part of a graph, or will be at its next call, or is within `without`."""
    return _without.get() or (x.is_cuda and cuda.is_current_stream_capturing())


@contextmanager
def without() -> Iterator[None]:
    """Within this context, in this thread, nothing is captured that asks `capturing` first."""
    token = _without.set(True)
    try:
        yield
    finally:
        _without.reset(token)


def capture(
    step: Callable[[], None], device: torch.device, *, warm_up: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Captures a function as a graph. Returns the replay, for the current stream.

    Autocast keeps no casts of weights meanwhile: they would be gone when the graph is replayed outside that context.

    Args:
        step: works on the same tensors of the device in every call, and never waits for it. It is called once in the
            capture, when the device only takes notes of it, and before that instead of `warm_up`.
        device: whose current stream is waited for before and waits afterwards.
        warm_up: called twice before the capture, for real: what of a step may be repeated without harm.

    Raises:
        CannotCapture: the function waits for the device, or does what graphs do not allow.
        Exception: what the function raises before it is captured, such as torch.OutOfMemoryError.
    """
    warm_up = warm_up or step
    with _lock, cuda.device(device), without(), _without_autocast_cache():
        outside, stream = cuda.current_stream(), cuda.Stream()
        stream.wait_stream(outside)
        try:
            with cuda.stream(stream):
                warm_up()
                _without_waiting(warm_up)
            graph = _captured(step, stream)
        finally:
            cuda.set_stream(outside)  # where PyTorch cannot end a capture, it leaves the stream as it is
            outside.wait_stream(stream)

    def replay() -> None:
        with cuda.device(device):
            graph.replay()

    return replay


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _without_waiting(step: Callable[[], None]) -> None:
    """Calls the function, and raises CannotCapture if it waits for the device, which would break a capture."""
    before = cuda.get_sync_debug_mode()
    cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" in str(error):
            raise CannotCapture(f"it waits for the device: {error}") from error
        raise
    finally:
        cuda.set_sync_debug_mode(before)


def _captured(step: Callable[[], None], stream: cuda.Stream) -> cuda.CUDAGraph:
    graph = cuda.CUDAGraph()
    try:
        # Thread-local: another thread may call CUDA meanwhile, as one that pins memory for a DataLoader does.
        with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        raise CannotCapture(str(error)) from error
    return graph
