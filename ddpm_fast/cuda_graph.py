"""A step captured as a CUDA graph: one launch replaces hundreds, so that the host does not limit the speed."""

__all__ = ["captured"]

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 2  # calls before the capture, in which libraries choose kernels and allocate their workspaces


def captured(step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Captures a step that works on tensors in place. Returns its replay, or the step itself if it cannot be captured.

    Args:
        step: reads and writes the same tensors in every call, and synchronises with the device in none.
        state: the tensors that it changes. They have their former values when this returns.
    """
    before = [x.clone() for x in state]
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        function = graph.replay
    except RuntimeError as error:  # the network synchronises, or allocates in a way that graphs do not allow
        warnings.warn(f"sampling runs step by step, since the network cannot be captured: {error}", stacklevel=2)
        function = step
    for x, value in zip(state, before, strict=True):
        x.copy_(value)
    return function
