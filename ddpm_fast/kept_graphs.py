"""Sampling steps that were captured as CUDA graphs, kept from run to run.

To capture a step takes as long as a run of twenty. A graph serves every run on the same device and shape whose network
has its weights at the same addresses, whatever their values; timesteps, coefficients, keys and further arguments of the
network are copied into the graph's tensors.
"""

__all__ = ["KeptGraph", "kept_graph"]

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from . import cuda_graph, graph_keys
from .denoiser import Denoiser, ModelArguments, clip_bounds
from .sampling_step import SamplingStep


class KeptGraph:
    """A step and its graph. One run at a time may use it.

    Attributes:
        step: the tensors that the graph reads and writes.
        replay: takes the step `step.index`.
    """

    def __init__(
        self, step: SamplingStep, replay: Callable[[], None], run: object, model_kwargs: ModelArguments
    ) -> None:
        self.step, self.replay = step, replay
        self.run = weakref.ref(run)  # which uses it
        self._arguments = dict(model_kwargs)  # kept, so that no other object can have their identity


_graphs: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, KeptGraph]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept_graph(
    run: object,
    model: nn.Module,
    denoiser: Denoiser,
    step_of: Callable[[], SamplingStep],
    load: Callable[[SamplingStep], None],
    shape: Hashable,
    model_kwargs: ModelArguments,
) -> KeptGraph | None:
    """A graph for a run, loaded for it: one that is kept and free, or a new one. None if it cannot be captured.

    Args:
        run: has the graph for itself for as long as it lives.
        model: the network, for whose lifetime the graph is kept.
        denoiser: in evaluation mode, with that network or a copy that shares its weights.
        step_of: makes the tensors of a new graph.
        load: copies what a run needs into them.
        shape: what `step_of` depends on.
    """
    conditioned, clip = denoiser.self_condition, clip_bounds(denoiser.clip_denoised)
    network, switches = graph_keys.network(denoiser.model), graph_keys.switches()
    key = (shape, conditioned, clip, _arguments(model_kwargs), network, switches)
    with _lock:
        kept = _graphs.setdefault(model, OrderedDict())
        found = kept.get(key)
        if found is not None and found.run() is None:
            found.run = weakref.ref(run)
            kept.move_to_end(key)
        else:
            found = None
    if found is not None:
        load(found.step)
        return found
    step = step_of()
    load(step)
    try:
        replay = cuda_graph.capture(lambda: step.take_next(denoiser, conditioned=conditioned), step.x.device)
    except cuda_graph.CannotCapture as error:
        warnings.warn(f"sampling runs step by step, since the network cannot be captured: {error}", stacklevel=2)
        return None
    load(step)  # again, since the steps before the capture have changed it
    new = KeptGraph(step, replay, run, model_kwargs)
    with _lock:
        graph_keys.keep(kept, key, new)
    return new


def _arguments(model_kwargs: ModelArguments) -> Hashable:
    """Tensors by their form, since their values are copied; other arguments by their values, or by their identity."""

    def form(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return "tensor", value.shape, value.dtype, value.stride()
        return value if graph_keys.is_setting(value) else ("object", id(value))

    return tuple(sorted((name, form(value)) for name, value in model_kwargs.items()))
