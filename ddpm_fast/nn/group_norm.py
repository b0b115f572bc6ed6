"""Group norm with SiLU, whose output is recomputed in the backward pass."""

__all__ = ["GroupNorm", "recomputed", "unhooked"]

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import ops
from ..ops.add_group_norm_silu import add_and_normalise
from ..ops.recompute_group_norm_silu import Statistics, recompute_group_norm_silu
from ..ops.transforms import transformed


def unhooked(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else: no subclass, no wrapper and no hook."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not nn.modules.module._has_any_global_hook()
    )


class GroupNorm(nn.GroupNorm):
    """Group norm and, unless `silu=False`, SiLU after it."""

    def __init__(self, groups: int, channels: int, eps: float, *, silu: bool = True) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)


class _Versioned(NamedTuple):
    """A saved tensor and its version, since autograd checks no versions where there are saved-tensor hooks."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> "_Versioned":
        return cls(x, x._version)

    def get(self) -> Tensor:
        x = self.tensor
        if x._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{x.type()} {list(x.shape)}] is at version {x._version}; expected version {self.version} instead"
            )
        return x


class _View(NamedTuple):
    """What is kept of a saved view of y, of all or some of its elements."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def recomputed(
    norm: nn.Module,
    x: Tensor,
    y: Tensor,
    statistics: Statistics | None = None,
    input_bias: Tensor | None = None,
) -> AbstractContextManager[None]:
    """A context for the layers that take y = norm(x): autograd saves x; y is recomputed in the backward pass.

    Args:
        statistics: of the norm, where a kernel has returned them: y is then recomputed by one read of x.
        input_bias: y = norm(x + input_bias).

    The norm saves x anyway, so that y costs no memory, for about 1 % of a training step. y is computed from the
    tensors that the norm was given (x and its parameters at that time), whose versions are checked, and never by
    calling the module again. y is saved as usual where it could be something else: a norm of another class or with
    hooks, y written to in place. It is too where saved-tensor hooks cannot be used (torch.compile, torch.func,
    forward-mode derivatives) or are used already (gradient checkpointing, `save_on_cpu`).
    """
    if (
        not y.requires_grad
        or torch.compiler.is_compiling()
        or not unhooked(norm, GroupNorm)
        or type(y) is not Tensor
        or transformed()
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    inputs = [None if v is None else _Versioned.of(v) for v in (x, input_bias, norm.weight, norm.bias)]
    groups, eps, silu = norm.num_groups, norm.eps, norm.silu
    # Autograd keeps these functions: they hold no memory of y, but its storage object, whose address stays its own.
    storage, version = StorageWeakRef(y.untyped_storage()), y._version
    dtype = y.dtype

    def pack(saved: Tensor) -> _Versioned | _View:
        if saved._version == version and saved.dtype == dtype and saved.untyped_storage()._cdata == storage.cdata:
            return _View(saved.shape, saved.stride(), saved.storage_offset())
        return _Versioned.of(saved)

    def unpack(kept: _Versioned | _View) -> Tensor:
        if isinstance(kept, _Versioned):
            return kept.get()
        x, added, weight, bias = (None if v is None else v.get() for v in inputs)
        if statistics is None or torch.is_grad_enabled():
            # With create_graph, gradients are on here, and the graph goes on through x and the parameters.
            again = add_and_normalise(x, weight, bias, groups, eps, silu=silu, input_bias=added, keep=False).y
        else:
            again = recompute_group_norm_silu(x, added, statistics, weight, bias, silu=silu)
        return again.as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
