"""What a step costs a GPU, counted on tensors that claim to be there: launches, and bytes that are read and written.

Each op counts with the tensors that it reads and writes, each once, except that:
- a convolution with a bias is two launches, since ATen adds the bias to the result of cuDNN afterwards;
- ddpm_fast's group norms take the launches and passes of the CUDA kernels' plan, see `of_norm`.
Weights are left out of the bytes: they are shared by all images of a batch.
"""

import math
from collections import defaultdict
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


def as_on_a_gpu(name: str, args: tuple, result: Any) -> Any:
    """The result of an op in cuDNN's memory format, which tensors that claim to be on a GPU do not know of."""
    if "conv" in name and args[0].is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result


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
        result = as_on_a_gpu(name, args, result)
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
            self.kinds["group norm"] += of_norm(name, args)
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


def launches_of_norm(channels: int, own: int, plane: int, groups: int, item: int, *, backward: bool = False) -> int:
    """Launches of a channels-last group norm by the CUDA kernels, whose plans this follows (csrc/cuda).

    Args:
        channels: of what is normalised, of which the first `own` are of x and the others of a skip connection.
        item: bytes of an element.
    """
    width, each = 16 // item, channels // groups
    unit = math.lcm(each, width)
    vectors = range(0, unit, width)
    fits = channels % width == own % width == 0 and all((c + width - 1) // each - c // each <= 1 for c in vectors)
    most, least = min(-(-64 // item // unit) * unit, channels), min(32 // item, channels)
    for held in (4,) if backward else (4, 8):
        for block in range(most, least - 1, -unit) if fits else ():
            columns = block // width
            warps = -(-plane // (32 // columns * held)) if columns <= 32 else 17
            if warps <= 16 and columns * warps <= 256:
                return 2 if backward else 1
    slices = -(-plane // max(16384 // channels, 1))
    return 3 if backward or slices > 16 else 2


def of_norm(name: str, args: tuple) -> Cost:
    """Of the forward pass of a group norm."""
    if name == "group_norm_silu":
        x, weight, groups = args[0], args[1], args[5]
        added, keep = (), False
    else:
        x, _, residual, skip, weight, *_, groups, _, _, keep = args
        added = [y for y in (residual, skip) if y is not None]
    channels = len(weight)
    result = size(x) * channels // x.shape[1]
    launches = launches_of_norm(channels, x.shape[1], x[0, 0].numel(), groups, x.element_size())
    again = 0 if launches == 1 else result  # what is normalised is read once more
    return Cost(launches, size(x) + sum(map(size, added)) + result * (1 + keep) + again)
