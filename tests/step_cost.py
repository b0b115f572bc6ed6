"""What a step costs a GPU, counted on tensors that claim to be there: launches, and bytes that are read and written.

Each op counts with the tensors that it reads and writes, each once, except that:
- a convolution with a bias is two launches, since ATen adds the bias to the result of cuDNN afterwards;
- ddpm_fast's group norms take the launches and passes of the CUDA kernels' plan, see `of_norm`.
Weights are left out of the bytes: they are shared by all images of a batch.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


class Cost(NamedTuple):
    launches: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.launches + other.launches, self.bytes + other.bytes)


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def size(x: Tensor) -> int:
    """Bytes of the elements, of which those that are expanded count once."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride else 1
    return count * x.element_size()


class Costs(TorchDispatchMode):
    """Sums up by kind of op what is called within it.

    Args:
        samples: tensors whose first dimension is another one are weights, tables or numbers.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.kinds: dict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op._schema.name.partition("::")[2]
        if "conv" in name and args[0].is_contiguous(memory_format=torch.channels_last):  # as cuDNN has it
            result = result.contiguous(memory_format=torch.channels_last)
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        made = [x for x in tensors(result) if x.untyped_storage()._cdata not in given]
        if made or op._schema.is_mutable:
            self._add(name, args, kwargs, made)
        return result

    def of_images(self, values: Any) -> int:
        return sum(size(x) for x in tensors(values) if x.dim() and x.shape[0] == self.samples)

    def _add(self, name: str, args: tuple, kwargs: dict, made: list[Tensor]) -> None:
        read, written = self.of_images((args, kwargs)), self.of_images(made)
        if "empty" in name:
            return
        if name in ("convolution", "conv2d"):
            self.kinds["convolution"] += Cost(1, read + written)
            if args[2] is not None:
                self.kinds["bias"] += Cost(1, 2 * written)
        elif "group_norm_silu" in name:
            self.kinds["group norm"] += of_norm(name, args, self.of_images)
        else:
            self.kinds[name] += Cost(1, read + written)

    @property
    def total(self) -> Cost:
        return sum(self.kinds.values(), Cost())

    def __str__(self) -> str:
        rows = sorted(self.kinds.items(), key=lambda kind: -kind[1].bytes)
        rows.append(("all", self.total))
        per_image = MIB * self.samples
        return "\n".join(f"{name:42s} {cost.launches:4d} {cost.bytes / per_image:8.2f} MiB" for name, cost in rows)


def of_norm(name: str, args: tuple, of_images: Callable[[Any], int]) -> Cost:
    """Of a group norm by the CUDA kernels."""
    if name == "group_norm_silu":
        x = args[0]
        inputs, result, groups = size(x), size(x), args[5]
        fits = True
    else:
        x, groups = args[0], args[8]
        inputs = of_images(args[:4])
        result = of_images(args[2:4]) and 0
    return Cost(1, inputs + result)
