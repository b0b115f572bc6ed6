r"""How the error of a prediction is weighted at each timestep.

An error e of the prediction is an error w e of x0_hat = u x_t + w pred, so a weight on the error of x0_hat is w^2 times
a weight on the error of the prediction, whatever the network predicts. `LOSS_WEIGHTS` is a registry: a function added
to it is found by its name, by `GaussianDiffusion`, configs and the command line.
"""

__all__ = ["LOSS_WEIGHTS", "loss_weight"]

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import variances
from .checks import choice, finite, numbers
from .parameterization import x_start_rows
from .schedules import NoiseSchedule


def l_simple(schedule: NoiseSchedule, w: Tensor) -> Tensor:
    """SNR on the error of x_0, which is 1 on that of eps: L_simple for every objective. Ho et al. (2020), eq. 14."""
    return schedule.snr * w**2


def uniform(schedule: NoiseSchedule, w: Tensor) -> Tensor:
    """1, whatever the objective."""
    return torch.ones_like(w)


def min_snr(schedule: NoiseSchedule, w: Tensor, *, min_snr_gamma: float) -> Tensor:
    """min(SNR, gamma) on the error of x_0. Hang et al. (2023).

    With a terminal SNR of 0 it is min(SNR + 1, gamma), as diffusers has it for v: x_T would have no weight otherwise.
    """
    min_snr_gamma = finite("min_snr_gamma", min_snr_gamma, 0)
    if not min_snr_gamma:
        raise ValueError("min_snr_gamma must be above 0, got 0")
    snr = schedule.snr if schedule.snr[-1] else schedule.snr + 1
    return snr.clamp(max=min_snr_gamma) * w**2


def p2(schedule: NoiseSchedule, w: Tensor, *, p2_gamma: float, p2_k: float) -> Tensor:
    """L_simple over (k + SNR)^gamma: less weight where there is little noise. Choi et al. (2022), eq. 8."""
    p2_gamma, p2_k = finite("p2_gamma", p2_gamma, 0), finite("p2_k", p2_k, 0)
    if not p2_k:
        raise ValueError("p2_k must be above 0, got 0")
    return schedule.snr / (p2_k + schedule.snr) ** p2_gamma * w**2


def vlb(schedule: NoiseSchedule, w: Tensor, *, sigma2: Tensor) -> Tensor:
    """The term of the variational bound, in nats: |mu - mu_hat|^2 / (2 sigma^2). Ho et al. (2020), eq. 8 and 12.

    At t = 0, where the posterior variance is 0, the variance of t = 1 is taken.
    """
    sigma2 = variances.positive(sigma2, schedule)
    return schedule.posterior_mean_coef1**2 / (2 * sigma2) * w**2


# A function takes (schedule, w) and, by name if it wants them, `sigma2`, `min_snr_gamma`, `p2_gamma` and `p2_k`.
LOSS_WEIGHTS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (l_simple, uniform, min_snr, p2, vlb)}
_FORMER_NAMES = {"snr": "l_simple", "simple": "uniform"}


def loss_weight(
    schedule: NoiseSchedule,
    objective: str,
    kind: str | Tensor | Sequence[float],
    *,
    variance: str = "posterior",
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """The weight of |pred - target|^2 at each timestep, (T,), float64.

    Args:
        kind: a name in `LOSS_WEIGHTS`: `l_simple`, `uniform`, `min_snr`, `p2` or `vlb` (`snr` and `simple` are former
            names of the first two); or the weights themselves, shape (T,), finite and not negative.
        variance: sigma_t^2 of the reverse process, for `vlb`; a name in `variances.VARIANCES`.
        min_snr_gamma: for `min_snr`, above 0.
        p2_gamma, p2_k: for `p2`, at least 0 and above 0.

    Raises:
        ValueError: an unknown name, a table that does not fit, `vlb` of a variance that is learned, or a named weight
            that is 0 at the last timestep, where sampling begins.
    """
    _, w = x_start_rows(schedule, objective)
    if not isinstance(kind, str):
        return _table(kind, len(w))
    name = choice("loss_weight", _FORMER_NAMES.get(kind, kind), LOSS_WEIGHTS)
    wanted = inspect.signature(LOSS_WEIGHTS[name]).parameters
    given = {"min_snr_gamma": min_snr_gamma, "p2_gamma": p2_gamma, "p2_k": p2_k}
    if "sigma2" in wanted:
        if variance not in variances.VARIANCES:
            raise ValueError(
                f"loss_weight {name!r} follows from a table of sigma^2, and variance {variance!r} is learned; for the "
                f"bound itself take loss_type 'kl' or 'hybrid'"
            )
        given["sigma2"] = variances.variance(schedule, variance)
    weight = LOSS_WEIGHTS[name](schedule, w, **{name: value for name, value in given.items() if name in wanted})
    if not schedule.snr[-1] and not weight[-1]:
        raise ValueError(
            f"loss_weight {name!r} is 0 at the last timestep, whose SNR is 0, and sampling begins there; take "
            f"'min_snr' or 'uniform'"
        )
    return weight


def _table(weights: Tensor | Sequence[float], timesteps: int) -> Tensor:
    table = numbers("loss_weight", weights, torch.float64)
    if table.shape != (timesteps,) or not (table >= 0).all() or table.isinf().any():
        values = f" with values from {table.min():.4g} to {table.max():.4g}" if table.numel() else ""
        raise ValueError(
            f"loss_weight as a table must hold {timesteps} finite numbers of at least 0, one for each timestep; "
            f"got the shape {tuple(table.shape)}{values}"
        )
    return table
