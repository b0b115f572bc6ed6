"""A step captured as a CUDA graph: hundreds of launches become one, and the host is out of the way."""

__all__ = ["captured"]

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 2  # calls before the capture: libraries choose their kernels and allocate what they keep


def captured(step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """A step that works on tensors in place, to be replayed; or the step itself, where it cannot be captured.

    Args:
        step: reads and writes the same tensors in every call, and asks the host nothing.
        state: the tensors that it changes, which are as before when this returns.
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
    except RuntimeError as error:  # a network that asks the host, or allocates in ways that graphs cannot
        warnings.warn(f"sampling runs step by step, since the network cannot be captured: {error}", stacklevel=2)
        function = step
    for x, value in zip(state, before, strict=True):
        x.copy_(value)
    return function
