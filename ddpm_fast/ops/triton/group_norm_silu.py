"""Group norm, a scale and a shift, and SiLU: the case of add_group_norm_silu that adds nothing."""

__all__ = ["group_norm_silu", "group_norm_silu_backward"]

from torch import Tensor

from .add_group_norm_silu import add_group_norm_silu, add_group_norm_silu_backward


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (x, None, None, None, weight, bias, scale, shift, groups, eps, silu, False)
    y, _, mean, rstd = add_group_norm_silu(*given)
    return y, mean, rstd


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (grad, None, x, None, mean, rstd, weight, bias, scale, shift, groups, silu, True, x.shape[1])
    grad_x, _, _, *grads = add_group_norm_silu_backward(*given)
    return grad_x, *grads
