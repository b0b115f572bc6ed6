"""What the modules of an optimised network were before."""

__all__ = ["Former", "State", "network_of", "replace"]

import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class Former:
    """What a parameter or buffer was."""

    module: nn.Module
    name: str
    dtype: torch.dtype
    stride: tuple[int, ...]
    converted: torch.dtype  # the dtype that `optimize` gave it
    kept: Tensor | None  # its former values, where it was converted

    def tensor(self) -> Tensor | None:
        parameter = self.module._parameters.get(self.name)
        return self.module._buffers.get(self.name) if parameter is None else parameter

    def data(self) -> Tensor:
        """What it held; if its values have changed since, these, in its former dtype and memory format.

        That is the tensor itself if nothing needs to be changed.
        """
        tensor, kept = self.tensor(), self.kept
        if kept is not None and kept.shape == tensor.shape:
            kept = kept.to(tensor.device)
            if any(_same(k.to(tensor.dtype), tensor.data) for k in (kept, kept.to(self.converted))):
                return kept
        if tensor.dtype == self.dtype and tensor.stride() == self.stride:
            return tensor
        new = tensor.data.to(self.dtype)
        if len(self.stride) == new.dim():
            new = torch.empty_strided(new.shape, self.stride, dtype=new.dtype, device=new.device).copy_(new)
        return new

    def put_back(self) -> None:
        data = self.data()
        if data is not self.tensor():
            replace(self.tensor(), data)


@dataclasses.dataclass
class State:
    """What `restore` needs. It refers to modules, not to names, which adapters change; copies refer to copies."""

    dtype: torch.dtype | None  # of the network's weights before
    reduced: torch.dtype | None  # the dtype that they were converted to, if it is another
    modules: list[tuple[nn.Module, type]]  # with their former classes
    tensors: list[Former]


def network_of(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    wrappers = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{type(model).__name__} wraps or replaces a module that it has read: optimize that, and wrap it then"
        )
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module) and {*model.parameters()} == {*inner.parameters()}:
        return network_of(inner)  # a diffusion, or another wrapper, whose own arithmetic and tables stay as they are
    return model


def replace(tensor: Tensor, data: Tensor) -> None:
    """As nn.Module.to does it; a gradient follows."""
    grad, tensor.grad = tensor.grad, None
    tensor.data = data
    if grad is not None:
        tensor.grad = torch.empty_like(data).copy_(grad)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype.itemsize == 1:  # float8 cannot be compared
        a, b = a.float(), b.float()
    return torch.equal(a, b)
