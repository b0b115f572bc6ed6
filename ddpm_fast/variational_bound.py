r"""The rows from which `ops.vlb_terms` computes a term of the variational bound. Ho et al. (2020), eq. 5.

    L_{t-1}  = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))     normals whose means are c0 x_0 + cx x_t and
    L_0      = -ln p(x_0 | x_1)                                  c0 x0_hat + cx x_t

A decoder turns the last normal, N(x0_hat, sigma_1^2), into a probability of x_0: `discretized` is the mass in the bin
around x_0 of images on 256 levels (eq. 13), `gaussian` the density of continuous data.
"""

__all__ = ["DECODERS", "bound_rows", "decoder_constant"]

import math

import torch
from torch import Tensor

from . import variances
from .parameterization import x_start_rows
from .schedules import NoiseSchedule

DECODERS = ("discretized", "gaussian")

# The log variance of a normal so narrow that its divergence from p, plus its entropy, is -ln p at its mean.
NARROW = -32.0


def bound_rows(schedule: NoiseSchedule, objective: str, variance: str, decoder: str) -> Tensor:
    """(u, w, c0, cx, log variance of q, log variance of p) of each timestep, float64.

    Args:
        variance: a name in `variances.NAMES`. With one that is learned, two columns more have the logs of its bounds;
            those of `learnable` are -1 and 1, with which v is the log variance.
        decoder: `discretized` or `gaussian`. The op takes the row 0 as the discretized decoder's. For the Gaussian
            one, the rows therefore begin with one that is never used, t = 0 has the row 1, and its term is the
            divergence of a narrow normal, to which `decoder_constant` is added.

    Returns:
        (T, 6) or (T, 8); with the Gaussian decoder a row more.
    """
    log_q = variances.positive(schedule.posterior_variance, schedule).log()
    log_p, bounds = log_q, []
    if variance in variances.LEARNED_VARIANCES:
        bounds = [variances.log_bounds(schedule, variance)]
    elif variance == variances.LEARNABLE:
        bounds = [torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu").expand(len(schedule), 2)]
    else:
        log_p = variances.positive(variances.variance(schedule, variance), schedule).log()
    if decoder == "gaussian":
        log_q = torch.cat([log_q.new_full((1,), NARROW), log_q[1:]])
    columns = [*x_start_rows(schedule, objective), schedule.posterior_mean_coef1, schedule.posterior_mean_coef2]
    rows = torch.column_stack([*columns, log_q, log_p, *bounds])
    return torch.cat([rows[:1], rows]) if decoder == "gaussian" else rows


def decoder_constant(size: int) -> float:
    """What the Gaussian decoder's divergence lacks of -ln p(x_0 | x_1): the entropy of the narrow normal, in nats.

    Args:
        size: numbers in a sample.
    """
    return size * (NARROW + 1 + math.log(2 * math.pi)) / 2
