"""Denoising diffusion models in PyTorch: training, sampling, and noise that belongs to an image."""

__all__ = ["GaussianDiffusion", "UNet", "__version__", "noise", "ops", "samplers", "schedules"]

from importlib.metadata import version

from . import noise, ops, samplers, schedules
from .diffusion import GaussianDiffusion
from .unet import UNet

__version__ = version("ddpm_fast")
