r"""Samplers: from a schedule to the coefficients of every step.

A step takes x_t to x_t' at the next, less noisy timestep t' (primes below; abar' = 1 at the end):

    x0_hat = u x_t + w pred
    x_t'   = A x_t + B clip(x0_hat) + C x0_prev + sigma z,     z ~ N(0, I)

A sampler is a function from a schedule to these numbers for K steps, a `StepTable`. `SAMPLERS` is the registry: a
sampler that is added to it is found by its name, by `GaussianDiffusion`, configs and the command line. `SPACINGS` is
the registry of the ways in which K timesteps are spread over the schedule.

Symbols: a = sqrt(abar) and s = sqrt(1 - abar) at t, a' and s' at t', lambda = log(a / s).
"""

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "FittedTable",
    "StepTable",
    "ancestral",
    "check_table",
    "conditions",
    "ddim",
    "ddim_inversion",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "find",
    "heun",
    "is_count",
    "karras_timesteps",
    "make",
    "spaced_timesteps",
    "strided_timesteps",
    "unipc",
]

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..checks import choice
from ..checks import options as check_options
from ..schedules import NoiseSchedule
from .ancestral import ancestral
from .ddim import ddim
from .ddim_inversion import ddim_inversion
from .dpm_solver import dpmpp_2m, dpmpp_2m_sde
from .fitted import FittedTable, check_table, conditions, find
from .heun import heun
from .step_table import StepTable
from .timesteps import SPACINGS, is_count, karras_timesteps, spaced_timesteps, strided_timesteps
from .unipc import unipc

# A function from (schedule, objective, steps) and options of its own to a StepTable.
SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "heun": heun,
}


def make(
    name: str,
    schedule: NoiseSchedule,
    objective: str,
    steps: int | Sequence[int] | None = None,
    *,
    spacing: str | None = None,
    **options: Any,
) -> StepTable:
    """The steps of a sampler by its name.

    Args:
        name: one of `SAMPLERS`: ddpm (`ancestral`), ddim, dpmpp_2m, dpmpp_2m_sde, unipc, heun.
        schedule: of the forward process.
        objective: what the network predicts; a name in `parameterization.OBJECTIVES`.
        steps: how many (calls of the network), or the timesteps themselves; None for all.
        spacing: of the timesteps, a name in `SPACINGS`; None for the sampler's own: even for ddpm and ddim, karras for
            the others.
        options: the sampler's own arguments, such as `eta` of ddim or `variance` of ddpm.

    Raises:
        ValueError: an unknown name or option, steps that cannot be, or a spacing of timesteps that are given.
    """
    sampler = SAMPLERS[choice("sampler", name, SAMPLERS)]
    check_options(f"sampler {name!r}", sampler, options, skip=3)
    if spacing is not None:
        if steps is not None and not is_count(steps):
            raise ValueError(f"timesteps that are given have their own spacing; got spacing={spacing!r} too")
        if "spacing" in inspect.signature(sampler).parameters:  # heun, which does not call the network once a timestep
            options["spacing"] = spacing
        else:
            steps = spaced_timesteps(schedule, len(schedule) if steps is None else steps, spacing)
    return sampler(schedule, objective, steps, **options)
