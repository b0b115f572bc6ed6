"""Which tensors were made as 1 + scale, found out without reading their values.

`ops.group_norm_silu` takes `scale`, while other networks multiply by a factor 1 + scale. Where the factor is near 0,
the factor minus 1 is not exact, and to find out whether it is means to wait for a GPU. Within a call of an optimised
network every function is seen, so the scale that a factor was made of is noted with the factor.
"""

__all__ = ["note", "noted_scale", "readable"]

from typing import Any

import torch
from torch import Tensor

_ADDITIONS = (Tensor.add, torch.add)  # what 1 + scale and scale + 1 call, too
_NOTE = "_ddpm_fast_scale"


def note(func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Notes the scale with the result of a function, if it is 1 + scale and on another device than a CPU."""
    if func not in _ADDITIONS or len(args) != 2 or kwargs or type(result) is not Tensor or readable(result):
        return
    scale, one = args if isinstance(args[0], Tensor) else reversed(args)
    if type(scale) is Tensor and isinstance(one, int | float) and one == 1 and scale.dtype == result.dtype:
        setattr(result, _NOTE, (scale, _version(scale), _version(result)))


def noted_scale(factor: Tensor) -> Tensor | None:
    """The scale that the factor was made of; None where it is not known, or does not stand for the factor any more."""
    scale, *versions = vars(factor).get(_NOTE, (None,))
    if scale is None or versions != [_version(scale), _version(factor)]:
        return None
    # A factor that was detached from the graph, or whose own gradient is wanted.
    if scale.requires_grad != factor.requires_grad or factor.retains_grad or factor._backward_hooks:
        return None
    return scale


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def readable(x: Tensor) -> bool:
    """Whether the values can be read without waiting; then nothing needs to be noted."""
    return x.device.type == "cpu"
