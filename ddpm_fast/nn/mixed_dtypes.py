"""One dtype for the operands of products, convolutions and norms whose tensors have several."""

__all__ = ["each", "in_one_dtype", "is_timestep"]

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def in_one_dtype(func: Any, args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[tuple, dict]:
    """The arguments of a function of PyTorch, those of several dtypes cast to one where the function needs that.

    A network that was converted to bfloat16 or float16 still makes tensors in float32: embeddings of the timestep, or
    values that its code casts for precision. Whatever class uses them, they are cast to `dtype` where they meet its
    weights. A first operand with one number a sample, such as timesteps, is not rounded: the others are cast to its
    dtype. Functions that promote their operands by themselves, and operands that share a dtype, are left alone.
    """
    if func in _ONE_DTYPE:
        operands: list[Tensor] = []
        each(lambda x: operands.append(x) or x, (args, kwargs))
        operands = [x for x in operands if x.is_floating_point()]
        if len({x.dtype for x in operands}) > 1:
            common = operands[0].dtype if is_timestep(operands[0]) else dtype
            return each(lambda x: x.to(common) if x.is_floating_point() else x, (args, kwargs))
    return args, kwargs


def is_timestep(x: Tensor) -> bool:
    """Whether x has at most one number a sample, as timesteps and noise levels do."""
    return x.dim() < 2 or x.numel() <= len(x)


def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` applied to every tensor in it: in dataclasses, tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        new = {name: each(change, getattr(value, name)) for name in fields}
        same = all(new[name] is getattr(value, name) for name in fields)
        return value if same else dataclasses.replace(value, **new)
    if isinstance(value, tuple):
        new = [each(change, v) for v in value]
        return type(value)(*new) if hasattr(value, "_fields") else tuple(new)
    if type(value) is list:
        return [each(change, v) for v in value]
    if type(value) is dict:
        return {k: each(change, v) for k, v in value.items()}
    return value


def _functions(*names: str) -> set:
    """The functions of these names in torch, torch.nn.functional and Tensor."""
    return {getattr(space, name) for space in (torch, F, Tensor) for name in names if hasattr(space, name)}


_ONE_DTYPE = _functions(
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "vdot", "einsum"),
    *("scaled_dot_product_attention", "multi_head_attention_forward", "grid_sample", "lerp"),
    *("group_norm", "layer_norm", "batch_norm", "instance_norm", "rms_norm"),
)
