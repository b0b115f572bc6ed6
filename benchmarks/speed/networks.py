"""The networks that are compared: a preset of ddpm_fast, and the same or the nearest one of other packages."""

import importlib
import sys
import warnings
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from diffusers_weights import to_ddpm_fast, unet_2d_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ddpm_fast import UNet
from ddpm_fast.nn.unet import PRESETS

T = 1000  # timesteps, and steps of a sampling run
OURS, DIFFUSERS, LUCIDRAINS = FAMILIES = ("ddpm_fast", "diffusers", "denoising_diffusion_pytorch")


class Networks(NamedTuple):
    """`ours` and `diffusers` have the same weights. For a package that is not installed, None and a reason."""

    ours: UNet
    diffusers: nn.Module | None
    lucidrains: nn.Module | None  # a GaussianDiffusion with a network of its own, of the same widths
    missing: dict[str, str]  # package -> why it is left out


def networks(preset: str, device: str) -> Networks:
    """Builds the networks of a preset, with random weights, on the device."""
    modules, missing = {}, {}
    for name in (DIFFUSERS, LUCIDRAINS):
        try:
            with warnings.catch_warnings():  # they warn about their own dependencies
                warnings.simplefilter("ignore")
                modules[name] = importlib.import_module(name)
                _ = getattr(modules[name], "UNet2DModel", None)  # diffusers imports most of itself on first access
        except (ImportError, RuntimeError) as error:
            modules.pop(name, None)
            missing[name] = f'{error}; pip install ".[compat]"'
            print(f"{name} is left out: {missing[name]}", file=sys.stderr)

    ours, diffusers, lucidrains = UNet.preset(preset, dropout=0.0), None, None
    if DIFFUSERS in modules:
        diffusers = _randomized(modules[DIFFUSERS].UNet2DModel(**unet_2d_config(preset)))
        to_ddpm_fast(diffusers, ours)
        diffusers.to(device)
    else:
        _randomized(ours)
    if LUCIDRAINS in modules:
        widths = {"dim": PRESETS[preset].get("dim", 128), "dim_mults": PRESETS[preset]["dim_mults"]}
        network = modules[LUCIDRAINS].Unet(**widths, channels=ours.channels)
        arguments = {"timesteps": T, "objective": "pred_noise", "beta_schedule": "linear"}
        lucidrains = modules[LUCIDRAINS].GaussianDiffusion(network, image_size=ours.image_size, **arguments).to(device)
    return Networks(ours.to(device), diffusers, lucidrains, missing)


@torch.no_grad()
def _randomized(network: nn.Module) -> nn.Module:
    """Draws all weights: the zeros that networks are initialised with at their ends would hide errors before them."""
    for p in network.parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.add_(torch.randn_like(p), alpha=0.1)
    return network


def in_channels_last(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    network = deepcopy(network).to(memory_format=torch.channels_last)
    return network.bfloat16() if dtype == torch.bfloat16 else network  # `to` of diffusers warns of a dtype


def diffusers_scheduler(device: str) -> Any:
    scheduler = importlib.import_module(DIFFUSERS).DDPMScheduler(T, variance_type="fixed_small", clip_sample=True)
    scheduler.set_timesteps(T, device=device)
    return scheduler


def compiled(network: nn.Module, device: str) -> dict[str, nn.Module]:
    """The network compiled in the modes that are for speed on the device: {what a table calls it: the network}."""
    if device != "cuda":
        return {"compiled": torch.compile(network)}
    modes = ("reduce-overhead", "max-autotune")
    return {f"compiled, {mode}": torch.compile(network, mode=mode) for mode in modes}


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with the formulas that it lacks for attention on the CPU."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)
