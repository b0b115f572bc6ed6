"""Sums that the next group norm computes.

A convolution's bias, a residual and a skip connection are each a pass over memory. On a GPU the group norm that follows
adds them while it reads its input, so that they cost nothing. On a CPU the convolution adds them.
"""

__all__ = ["DeferredSum", "convolved", "normalised", "normalised_alone", "pointwise"]

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.add_group_norm_silu import Normalised, add_and_normalise, fuses
from ..ops.recompute_group_norm_silu import Statistics
from .group_norm import GroupNorm, unhooked
from .packed_weights import Conv2d


class DeferredSum(NamedTuple):
    """x + bias + residual, not added yet.

    Attributes:
        x: (N, C, H, W).
        bias: (C,) or (N, C).
        residual: of the shape of x.
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def tensor(self) -> Tensor:
        """The sum, in the dtype of x."""
        x = self.x
        if self.bias is not None:
            x = x + self.bias.to(x.dtype).view(-1, x.shape[1], 1, 1)
        return x if self.residual is None else x + self.residual


def convolved(
    conv: nn.Module, x: Tensor, *, bias: Tensor | None = None, plus: Tensor | None = None, overwrite: bool = False
) -> DeferredSum:
    """conv(x) + plus, of which the convolution adds what it can add for nothing.

    Args:
        bias: (C,) or (N, C), used instead of the module's; only for a `Conv2d` without hooks.
        plus: of the shape of the result.
        overwrite: whether the result may be written into plus.
    """
    if not unhooked(conv, Conv2d):
        return DeferredSum(conv(x), None, plus)
    bias = conv.bias if bias is None else bias
    if fuses(x) or (bias is not None and bias.dim() == 2):
        return DeferredSum(conv(x, biased=False), bias, plus)
    return DeferredSum(conv(x, bias=bias, plus=plus, overwrite=overwrite))


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x) of a convolution of 1 x 1; on a GPU as a product, to which cuBLAS adds the bias in the same launch."""
    if not (fuses(x) and unhooked(conv, Conv2d)):
        return conv(x)
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def normalised(norm: nn.Module, x: DeferredSum, skip: Tensor | None = None) -> Normalised:
    """norm(h), and h = cat([x, skip])."""
    if fuses(x.x) and unhooked(norm, GroupNorm):
        return _fused(norm, x, skip)
    h = x.tensor()
    if skip is not None:
        h = torch.cat([h, skip], dim=1)
    return Normalised(norm(h), h, None)


def normalised_alone(norm: nn.Module, x: DeferredSum) -> tuple[Tensor, DeferredSum, Statistics | None]:
    """(norm(h), h, statistics) where nothing else takes h: a sum with a bias alone need not be stored."""
    if fuses(x.x) and unhooked(norm, GroupNorm) and x.residual is None:
        y, _, statistics = _fused(norm, x, keep=False)
        return y, x, statistics
    y, h, statistics = normalised(norm, x)
    return y, DeferredSum(h), statistics


def _fused(norm: GroupNorm, x: DeferredSum, skip: Tensor | None = None, keep: bool = True) -> Normalised:
    how = {"silu": norm.silu, "input_bias": x.bias, "residual": x.residual, "skip": skip, "keep": keep}
    return add_and_normalise(x.x, norm.weight, norm.bias, norm.num_groups, norm.eps, **how)
