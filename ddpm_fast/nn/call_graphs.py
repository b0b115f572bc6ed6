"""Calls of a network by CUDA graphs, one for each form of its inputs.

A graph is captured when a form comes again within the last two calls, so that a shape that comes once, or a number that
is another one in every call, costs nothing. From then on a call copies its tensors into those of the graph, replays it,
and returns copies of the results.
"""

__all__ = ["CallGraphs"]

import dataclasses
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import cuda_graph, graph_keys
from ..cuda_graph import CannotCapture
from ..ops.transforms import transformed
from .mixed_dtypes import each

Forward = Callable[..., Any]


class CallGraphs:
    """The graphs of one network. Copies and pickles are empty.

    What is not captured is called as it is: calls with gradients, in training mode, on other devices, in a graph, in
    transforms of torch.func and under modes that watch or change functions; and, after a warning that gives the reason,
    calls that cannot be captured.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned = False
        self._network: _Network | None = None
        self.clear()

    def __reduce__(self) -> tuple:
        return CallGraphs, ()

    def clear(self) -> None:
        self._kept: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._recent: deque[Hashable] = deque(maxlen=graph_keys.MOST)  # a longer cycle of forms does not fit
        self._failed: deque[Hashable] = deque(maxlen=100)

    def call(self, model: nn.Module, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of forward(*args, **kwargs), which calls the model."""
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and cuda_graph.enabled(v)), None)
        if x is None or torch.is_grad_enabled() or model.training or transformed() or _watched():
            return forward(*args, **kwargs)
        if torch.jit.is_tracing() or cuda_graph.capturing(x):
            return forward(*args, **kwargs)
        try:
            graph = self._graph(model, forward, args, kwargs, x)
        except CannotCapture as reason:
            graph = None
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the optimised network is called without a CUDA graph, which cannot be captured: {reason}",
                    stacklevel=2,
                )
        return forward(*args, **kwargs) if graph is None else graph(args, kwargs)

    def _graph(self, model: nn.Module, forward: Forward, args: tuple, kwargs: dict, x: Tensor) -> "_Graph | None":
        """The graph for a call, captured now if its form has come before; None if the call is to be made as it is."""
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        key = (_form((args, kwargs)), torch.is_inference_mode_enabled(), graph_keys.switches(), stream)
        with self._lock:
            network = self._of_now(model)
            if network.obstacle is not None:
                raise CannotCapture(network.obstacle)
            if network.devices - {x.device}:
                raise CannotCapture(f"not all of its weights are on {x.device}")
            graph = self._kept.get(key)
            if graph is not None:
                self._kept.move_to_end(key)
            again = key in self._recent and key not in self._failed
            self._recent.append(key)
        if graph is not None or not again:
            return graph
        try:
            graph = _Graph(forward, args, kwargs, x.device)
        except (CannotCapture, torch.OutOfMemoryError) as error:
            self._failed.append(key)
            raise CannotCapture(str(error)) from error
        with self._lock:
            if self._network is network:
                graph_keys.keep(self._kept, key, graph)
        return graph

    def _of_now(self, model: nn.Module) -> "_Network":
        """What the network is now. All graphs are forgotten if it is not what they have captured."""
        network = self._network
        if network is not None and network.key.holds(model):
            return network
        new = _Network.of(model)
        if network is None or new.key.key != network.key.key:
            self.clear()
        self._network = new
        return new


class _Network(NamedTuple):
    key: graph_keys.NetworkKey
    devices: set[torch.device]
    obstacle: str | None  # why it is not to be captured

    @classmethod
    def of(cls, model: nn.Module) -> "_Network":
        obstacle = None
        for name, module in model.named_modules():
            if module is model:  # its hooks are called outside the graph
                continue
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                obstacle = f"{name} has a hook, or a forward of its own, whose Python a graph leaves out"
            elif module.training:
                obstacle = f"{name} is in training mode"
        devices = {x.device for x in (*model.parameters(), *model.buffers())}
        return cls(graph_keys.NetworkKey(model), devices, obstacle)


class _Graph:
    """A captured call. Threads may share it: their calls come in turns, on one stream."""

    def __init__(self, forward: Forward, args: tuple, kwargs: dict, device: torch.device) -> None:
        given = _tensors_of((args, kwargs))
        self._inputs = [x.detach().to(device, copy=True) for x in given]
        self._lock = threading.Lock()
        inputs = iter(self._inputs)
        args, kwargs = each(lambda x: next(inputs), (args, kwargs))
        versions = None if torch.is_inference_mode_enabled() else [x._version for x in self._inputs]

        def step() -> None:
            self._result = forward(*args, **kwargs)
            if versions is not None and versions != [x._version for x in self._inputs]:
                raise CannotCapture("it writes to its inputs")
            _form(self._result)  # every tensor in it can be copied

        self._replay = cuda_graph.capture(step, device)

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        with self._lock:
            for x, given in zip(self._inputs, _tensors_of((args, kwargs)), strict=True):
                if given.numel() == 1 and given.device.type == "cpu":
                    x.fill_(given.item())  # a timestep, say, without waiting for the device as a copy does
                else:
                    x.copy_(given)
            self._replay()
            return each(torch.clone, self._result)


def _tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(lambda x: found.append(x) or x, value)
    return found


def _form(value: Any) -> Hashable:
    """Everything but the values of the tensors.

    Raises:
        CannotCapture: `each` does not find the tensors in it.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter):
            raise CannotCapture(f"it takes or returns a {type(value).__name__}")
        return "tensor", value.shape, value.dtype, value.stride(), value.device
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), *(_form(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
    if isinstance(value, tuple) or type(value) is list:
        return type(value), *map(_form, value)
    if type(value) is dict:
        return dict, *((name, _form(v)) for name, v in value.items())
    if not graph_keys.is_setting(value):
        raise CannotCapture(f"it takes or returns a {type(value).__name__}")
    return type(value), value


def _watched() -> bool:
    """Whether modes or hooks of all modules are active, which would see nothing of a graph."""
    modes = _get_current_function_mode_stack()
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or any(not isinstance(mode, DeviceContext) for mode in modes)
        or nn.modules.module._has_any_global_hook()
    )
