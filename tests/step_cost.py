"""What a step costs a GPU, counted on tensors that claim to be there: launches, bytes and floating-point operations.

Each op counts with the tensors that it reads and writes, each once, except that:
- a convolution with a bias is two launches, since ATen adds the bias to the result of cuDNN afterwards;
- ddpm_fast's group norms take the launches and passes of the CUDA kernels' plan, see `of_norm`.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


class Launch(NamedTuple):
    """
    Attributes:
        bytes: of images, read and written.
        weights: bytes of everything else, which does not grow with the batch.
        flops: of convolutions and products.
    """

    kind: str
    bytes: int
    weights: int = 0
    flops: int = 0


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
    if "conv" not in name or not args[0].is_contiguous(memory_format=torch.channels_last):
        return result
    if isinstance(result, Tensor):
        return result.contiguous(memory_format=torch.channels_last)
    of_x, *others = result  # the gradients
    return (of_x if of_x is None else of_x.contiguous(memory_format=torch.channels_last), *others)


class Costs(TorchDispatchMode):
    """Collects the launches of what is called within it.

    Args:
        samples: tensors whose first dimension is another one are weights, tables or numbers.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op._schema.name.partition("::")[2]
        result = as_on_a_gpu(name, args, result)
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        made = [x for x in tensors(result) if x.untyped_storage()._cdata not in given]
        if (made or op._schema.is_mutable) and "empty" not in name:
            self.launches += self._of(name, args, kwargs, made)
        return result

    def _of(self, name: str, args: tuple, kwargs: dict, made: list[Tensor]) -> list[Launch]:
        if "group_norm_silu" in name:
            return of_norm(name, args)
        if name == "dropout" and not args[2]:  # not in training: its input, as PyTorch returns it from a GPU
            return []
        sizes = [(x.shape[:1] == (self.samples,), size(x)) for x in [*tensors((args, kwargs)), *made]]
        images, weights = (sum(count for is_image, count in sizes if is_image == wanted) for wanted in (True, False))
        if name in ("convolution", "conv2d"):
            _, weight, bias = args[:3]
            out = sum(map(size, made))
            launches = [Launch("convolution", images, weights, 2 * made[0].numel() * weight[0].numel())]
            return launches if bias is None else [*launches, Launch("bias", 2 * out)]
        flops = 0
        if name == "linear":
            flops = 2 * made[0].numel() * args[1].shape[1]
        elif name == "scaled_dot_product_attention":
            q, k, _ = args[:3]
            flops = 4 * q.numel() * k.shape[-2]
        return [Launch(name, images, weights, flops)]

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    def __str__(self) -> str:
        kinds = defaultdict(list)
        for launch in self.launches:
            kinds[launch.kind].append(launch.bytes)
        rows = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
        rows.append(("all", [launch.bytes for launch in self.launches]))
        per_image = MIB * self.samples
        return "\n".join(f"{kind:30s} {len(sizes):4d} {sum(sizes) / per_image:8.2f} MiB" for kind, sizes in rows)


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


def of_norm(name: str, args: tuple) -> list[Launch]:
    """Of a group norm, of its output recomputed, or of its gradients."""
    if name.endswith("backward"):
        return of_gradients(name, args)
    if name == "recompute_group_norm_silu":
        return [Launch("group norm, recomputed", 2 * size(args[0]))]
    if name == "group_norm_silu":
        x, weight, groups = args[0], args[1], args[5]
        added, keep = (), False
    else:
        x, _, residual, skip, weight, *_, groups, _, _, keep = args
        added = [y for y in (residual, skip) if y is not None]
    channels = len(weight)
    result = size(x) * channels // x.shape[1]
    launches = launches_of_norm(channels, x.shape[1], x[0, 0].numel(), groups, x.element_size())
    read, written = size(x) + sum(map(size, added)), result * (1 + keep)
    if launches == 1:
        return [Launch("group norm", read + written)]
    # The first one stores the sum, and the last one reads it, or x, again.
    first, last = Launch("group norm", read + result * keep), Launch("group norm", 2 * result)
    return [first, *[Launch("group norm", 0)] * (launches - 2), last]


def of_gradients(name: str, args: tuple) -> list[Launch]:
    """Of the backward pass of a group norm."""
    if name == "group_norm_silu_backward":
        (grad, x, *_, groups, _), grad_sum, input_bias, own = args, None, None, args[1].shape[1]
    else:
        grad, grad_sum, x, input_bias, *_, groups, _, _, own = args
    launches = launches_of_norm(x.shape[1], own, x[0, 0].numel(), groups, x.element_size(), backward=True)
    read, more = size(grad) + size(x), 0 if grad_sum is None else size(grad_sum)
    last = [Launch("gradients of group norms", read + more + size(x))]
    if launches == 2:  # of which the second adds up the samples
        return [*last, Launch("gradients of group norms", 0)]
    first = read + (0 if input_bias is None else more)
    return [Launch("gradients of group norms", first), Launch("gradients of group norms", 0), *last]
