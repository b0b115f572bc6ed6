r"""The ops in plain PyTorch: the definition of right, for every device and dtype.

`rows` are tables of coefficients, indexed by the timestep or the step of each sample. Arithmetic and sums are in
float32, or in float64 where the data is.
"""

__all__ = ["LOSS_TYPES", "group_norm_silu", "q_sample", "reverse_step", "weighted_loss"]

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("l2", "l1", "huber")


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _columns(rows: Tensor, index: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The columns of each sample's row, shaped to broadcast against x: (N, 1, ..., 1), or () for one index."""
    picked = rows[index].to(_accumulator(x))  # (N, columns) or (columns,)
    if index.ndim:
        picked = picked.view(*picked.shape, *[1] * (x.ndim - 1))
    return picked.unbind(1 if index.ndim else 0)


def q_sample(x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    a, s = _columns(rows, t, x_start)
    acc = _accumulator(x_start)
    return (a * x_start.to(acc) + s * noise.to(acc)).to(x_start.dtype)


def weighted_loss(
    pred: Tensor, x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor, loss_type: str = "l2"
) -> Tensor:
    """weight * mean over a sample of |pred - (p x_0 + q eps)|^2. Ho et al. (2020), eq. 14 with weights.

    Args:
        pred: what the network predicted, (N, ...), any floating dtype. The only input with a gradient.
        x_start: x_0 in [-1, 1], the shape of pred.
        noise: eps, the shape of pred.
        t: timesteps, (N,), int64, in [0, T).
        rows: (p, q, weight) of each timestep, (T, 3).
        loss_type: `l2`: e^2; `l1`: |e|; `huber`: e^2 / 2 up to |e| = 1, |e| - 1/2 above.

    Returns:
        The loss of each sample, (N,), float32 (float64 for float64 pred).
    """
    p, q, weight = _columns(rows, t, pred)
    acc = _accumulator(pred)
    error = pred.to(acc) - (p * x_start.to(acc) + q * noise.to(acc))
    if loss_type == "l2":
        loss = error.square()
    elif loss_type == "l1":
        loss = error.abs()
    elif loss_type == "huber":
        loss = F.huber_loss(error, torch.zeros_like(error), reduction="none")
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}; there are {', '.join(LOSS_TYPES)}")
    return loss.flatten(1).mean(1) * weight.flatten()


def reverse_step(
    x: Tensor,
    pred: Tensor,
    step: Tensor,
    rows: Tensor,
    *,
    noise: Tensor | None = None,
    x_start_prev: Tensor | None = None,
    clip: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of any sampler: x_next = A x + B clip(x0_hat) + C x0_prev + sigma z, with x0_hat = u x + w pred.

    Args:
        x: the state x_t, (N, ...), float32 or float64.
        pred: what the network predicted from it, the shape of x, any floating dtype.
        step: which row: () for all samples, or (N,); int64, in [0, K).
        rows: (u, w, A, B, C, sigma) of each step, (K, 6).
        noise: z, the shape of x; None leaves the term out.
        x_start_prev: x0_hat of the step before, the shape of x; None leaves the term out.
        clip: (low, high) bounds of x0_hat, or None.

    Returns:
        (x_next, clip(x0_hat)), each of the shape and dtype of x.
    """
    u, w, A, B, C, sigma = _columns(rows, step, x)
    x_start = u * x + w * pred.to(x.dtype)
    if clip is not None:
        x_start = x_start.clamp(*clip)
    x_next = A * x + B * x_start
    if x_start_prev is not None:
        x_next = x_next + C * x_start_prev
    if noise is not None:
        x_next = x_next + sigma * noise
    return x_next, x_start


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = True) -> Tensor:
    """SiLU(GroupNorm(x)), the memory format kept. Wu & He (2018).

    Args:
        x: (N, C, H, W), any floating dtype.
        groups: divides C.
        weight, bias: (C,).
        eps: added to the variance.
        silu: False for the norm alone.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    y = F.group_norm(x, groups, weight, bias, eps)
    if channels_last:  # which CUDA's group norm drops
        y = y.contiguous(memory_format=torch.channels_last)
    return F.silu(y) if silu else y
