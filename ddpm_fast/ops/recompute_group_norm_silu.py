"""The output of a group norm, recomputed from its input and the statistics of the forward pass.

The backward pass of the layers that take the output needs it again. From the mean and rstd of each group, this is one
read of x and one write of y, whatever the size of the plane, and no sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, layout, reference
from .group_norm_silu import in_their_dtypes

__all__ = ["Statistics", "input_bias_rows", "recompute_group_norm_silu"]


class RecomputeGroupNormSiluArguments(NamedTuple):
    """The strict op's arguments, as csrc/common/arguments.h has them in struct RecomputeGroupNormSilu."""

    x: Tensor  # (N, C, ...), channels-last
    input_bias: Tensor | None  # (C,) or (N, C), in which rows may be apart; x's dtype or float32
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    silu: bool


class Statistics(NamedTuple):
    """What a kernel normalised by.

    Attributes:
        mean, rstd: (N, groups), float32.
        backend: the one that computed them; None for the automatic one.
    """

    mean: Tensor
    rstd: Tensor
    backend: str | None


def input_bias_rows(x: Tensor, input_bias: Tensor | None) -> Tensor | None:
    """The form of an input_bias that kernels take: in x's dtype or float32, rows dense and not overlapping."""
    if input_bias is None:
        return None
    if input_bias.dtype not in (x.dtype, torch.float32):
        input_bias = input_bias.float()
    if input_bias.stride(-1) != 1 or input_bias.stride(0) < input_bias.shape[-1]:
        input_bias = input_bias.contiguous()
    return input_bias


def recompute_group_norm_silu(
    x: Tensor,
    input_bias: Tensor | None,
    statistics: Statistics,
    weight: Tensor,
    bias: Tensor,
    *,
    silu: bool,
) -> Tensor:
    """SiLU(GroupNorm(x + input_bias)) in the bits of the forward pass, which was given the same tensors.

    It has no gradient, since mean and rstd are functions of x.
    """
    weight, bias, _, _ = in_their_dtypes(x, weight, bias, None, None)
    mean, rstd, backend = statistics
    given = (x, input_bias_rows(x, input_bias), mean, rstd, weight, bias, mean.shape[1], silu)
    return _op.kernel_of(backend)(*RecomputeGroupNormSiluArguments(*given))


def _reference(x, input_bias, mean, rstd, weight, bias, groups, silu):
    h = reference.add_inputs(x, input_bias, None, None)
    y = reference.normalise(h, mean, rstd, weight, bias, None, None, groups, silu)
    return y.contiguous(memory_format=layout.memory_format(x))


def _fake(x, input_bias, mean, rstd, weight, bias, groups, silu):
    return torch.empty_like(x, memory_format=layout.memory_format(x))


_op = dispatch.define(
    "recompute_group_norm_silu",
    "(Tensor x, Tensor? input_bias, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, int groups, bool silu) "
    "-> Tensor y",
    arguments=RecomputeGroupNormSiluArguments,
    kernel=_reference,
    reference=_reference,
    fake=_fake,
)
