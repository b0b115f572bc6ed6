"""What a CUDA graph has taken from the program, as keys: calls with equal keys can be served by one graph."""

__all__ = ["MOST", "NetworkKey", "is_setting", "keep", "network", "switches"]

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .ops import dispatch

MOST = 2  # graphs of a network, each with the memory of its activations

Graph = TypeVar("Graph")


def keep(kept: OrderedDict[Hashable, Graph], key: Hashable, graph: Graph) -> None:
    """Adds a graph as the one used last, and drops those used least recently beyond `MOST`."""
    kept[key] = graph
    kept.move_to_end(key)
    while len(kept) > MOST:
        kept.popitem(last=False)


def network(model: nn.Module) -> Hashable:
    """What a graph has taken from a network: addresses of tensors, numbers and other settings of its modules, hooks."""
    return tuple(
        (
            type(module),
            tuple((p.data_ptr(), p.dtype, p.stride()) for p in _tensors(module)),
            tuple((name, value) for name, value in vars(module).items() if is_setting(value)),
            (*module._forward_hooks, *module._forward_pre_hooks),  # their numbers, which are never used again
            id(vars(module).get("forward")),
        )
        for module in model.modules()
    )


class NetworkKey:
    """`network(model)`, and whether it is still the same, which is found out in a tenth of the time.

    It takes 4 ms to make the key of 288 modules, and 0.4 to see that they hold the very objects that they held.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        self.key = network(model)
        self._modules = [weakref.ref(module) for module in modules]
        held = _held_by(modules)
        self._identities = [*map(id, held)]
        # Kept, so that no other object can have their identity.
        self._settings = [x for x in held if is_setting(x)]
        self._tensors = [x for x in held if isinstance(x, Tensor)]
        self._pointers = [x.data_ptr() for x in self._tensors]

    def holds(self, model: nn.Module) -> bool:
        """Whether the key is that of the model; False also where that would take long to find out."""
        if self._modules[0]() is not model:
            return False
        modules = [module() for module in self._modules]
        return (
            None not in modules
            and [*map(id, _held_by(modules))] == self._identities
            and [x.data_ptr() for x in self._tensors] == self._pointers
        )


def _held_by(modules: list[nn.Module]) -> list[Any]:
    held: list[Any] = []
    for module in modules:
        own = module.__dict__
        held.append(type(module))
        held += own.values()
        for name in ("_parameters", "_buffers", "_modules"):
            held += own[name].values()
        held += own["_forward_hooks"]  # their numbers
        held += own["_forward_pre_hooks"]
    return held


def _tensors(module: nn.Module) -> list[Tensor]:
    own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [x for x in own if isinstance(x, Tensor)]


def is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(is_setting, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def switches() -> Hashable:
    """Global settings that decide which kernels run."""
    cudnn = torch.backends.cudnn
    return (
        dispatch.chosen(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
    )
