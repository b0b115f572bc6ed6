"""The dtype that a network is computed in, by the names of configs and of the command line."""

__all__ = ["PRECISIONS", "autocast", "chosen", "in_precision"]

import copy

import torch

from ..diffusion import GaussianDiffusion
from ..nn.optimize import computes_in_bfloat16

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def chosen(precision: str, device: torch.device) -> str:
    """A name of `PRECISIONS`: for `auto`, the fastest on the device.

    That is bf16 where the device computes in it (GPUs since Ampere, processors with AMX or AVX512-BF16), fp16 on the
    GPUs of the two generations before, and fp32 anywhere else.
    """
    if precision != "auto":
        return precision
    if computes_in_bfloat16(device.type):
        return "bf16"
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (7, 0):
        return "fp16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """For the forward pass of training: convolutions and products in the dtype, weights and losses in float32.

    Args:
        precision: a name of `PRECISIONS`.
    """
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def in_precision(diffusion: GaussianDiffusion, precision: str) -> GaussianDiffusion:
    """For sampling: the diffusion around a copy of its network with weights in the dtype; itself for fp32.

    Args:
        precision: `auto` or a name of `PRECISIONS`.
    """
    dtype = PRECISIONS[chosen(precision, diffusion.device)]
    if dtype == torch.float32:
        return diffusion
    reduced = copy.copy(diffusion)
    reduced._modules = dict(diffusion._modules, model=copy.deepcopy(diffusion.model).to(dtype))
    return reduced
