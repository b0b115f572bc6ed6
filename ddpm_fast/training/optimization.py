"""The optimizer of a run, its learning rate, and the average of the weights (EMA)."""

__all__ = ["ema_decay", "lr_factor", "make_optimizer", "parameter_groups", "set_lr", "update_average"]

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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


def ema_decay(step: int, c: TrainingConfig) -> float:
    """The decay of the average at a step, counted from 0.

    It rises to the configured one, so that the average of a short run does not consist of its initial weights.
    """
    return min(c.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: AveragedModel, module: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) weights; a decay of 0 copies the weights.

    `AveragedModel.update_parameters` copies a number to the GPU in every call, for which the host waits. It copies all
    buffers as well: those of a GaussianDiffusion around a `UNet` never change.
    """
    averages, weights = list(average.module.parameters()), list(module.parameters())
    if decay == 0:
        torch._foreach_copy_(averages, weights)
    else:
        torch._foreach_lerp_(averages, weights, 1 - decay)
    average.n_averaged += 1


def lr_factor(step: int, c: TrainingConfig) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    factor = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
    if c.cosine_decay:
        factor *= 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return factor
