r"""Samplers: from a schedule to the coefficients of every step.

A step takes x_t to x_t' at the next, less noisy timestep t' (primes below; abar' = 1 at the end):

    x0_hat = u x_t + w pred
    x_t'   = A x_t + B clip(x0_hat) + C x0_prev + sigma z,     z ~ N(0, I)

A sampler is a function from a schedule to these numbers for K steps, a `StepTable`. `SAMPLERS` is the registry: a
sampler that is added to it is found by its name, by `GaussianDiffusion`, configs and the command line.

Symbols: a = sqrt(abar) and s = sqrt(1 - abar) at t, a' and s' at t', lambda = log(a / s).
"""

__all__ = [
    "SAMPLERS",
    "StepTable",
    "ancestral",
    "ddim",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "karras_timesteps",
    "make",
    "strided_timesteps",
]

from collections.abc import Callable, Sequence
from typing import Any

from ..checks import choice
from ..checks import options as check_options
from ..schedules import NoiseSchedule
from .ancestral import ancestral
from .ddim import ddim
from .dpm_solver import dpmpp_2m, dpmpp_2m_sde
from .step_table import StepTable
from .timesteps import karras_timesteps, strided_timesteps

# A function from (schedule, objective, steps) and options of its own to a StepTable.
SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


def make(
    name: str,
    schedule: NoiseSchedule,
    objective: str,
    steps: int | Sequence[int] | None = None,
    **options: Any,
) -> StepTable:
    """The steps of a sampler by its name.

    Args:
        name: one of `SAMPLERS`: ddpm (`ancestral`), ddim, dpmpp_2m, dpmpp_2m_sde.
        schedule: of the forward process.
        objective: what the network predicts; a name in `parameterization.OBJECTIVES`.
        steps: how many, or the timesteps themselves; None for all.
        options: the sampler's own arguments, such as `eta` of ddim or `variance` of ddpm.

    Raises:
        ValueError: an unknown name or option, or steps that cannot be.
    """
    sampler = SAMPLERS[choice("sampler", name, SAMPLERS)]
    check_options(f"sampler {name!r}", sampler, options, skip=3)
    return sampler(schedule, objective, steps, **options)
