"""The optimizer of a run, and its learning rate."""

__all__ = ["lr_factor", "make_optimizer", "parameter_groups", "set_lr"]

import math
from typing import Any

import torch
from torch import Tensor

from ..diffusion import GaussianDiffusion
from .config import TrainingConfig


def parameter_groups(diffusion: GaussianDiffusion) -> list[dict[str, Any]]:
    """The network's parameters, and those of the diffusion itself, such as `log_variance`, which do not decay."""
    groups: list[dict[str, Any]] = [{"params": list(diffusion.model.parameters())}]
    if own := list(diffusion.parameters(recurse=False)):
        groups.append({"params": own, "weight_decay": 0.0})
    return groups


def make_optimizer(diffusion: GaussianDiffusion, c: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW of all parameters. On a GPU, the learning rate is a tensor, which a captured step reads."""
    on_gpu = diffusion.device.type == "cuda"
    return torch.optim.AdamW(
        parameter_groups(diffusion),
        lr=torch.full((), c.lr, device=diffusion.device) if on_gpu else c.lr,
        betas=c.betas,
        weight_decay=c.weight_decay,
        fused=True,
        capturable=on_gpu,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_factor(step: int, c: TrainingConfig) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    factor = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    if c.cosine_decay:
        factor *= 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return factor
