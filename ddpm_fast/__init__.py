"""Denoising diffusion models in PyTorch: training, sampling, and noise that belongs to an image."""

__all__ = [
    "GaussianDiffusion",
    "UNet",
    "__version__",
    "backend",
    "fit_sampler",
    "noise",
    "ops",
    "optimize",
    "restore",
    "samplers",
    "schedules",
    "verify",
]

from importlib.metadata import version

from . import noise, ops, samplers, schedules
from .diffusion import GaussianDiffusion
from .fitting import fit_sampler
from .nn.optimize import optimize, restore
from .nn.unet import UNet
from .nn.verification import verify
from .ops import backend

__version__ = version("ddpm_fast")
