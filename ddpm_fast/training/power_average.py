r"""Averages over a training that weigh the weights by a power of the time, and post-hoc EMA.

The power-function average after t steps is (Karras et al. 2024, section 3.1)

    average(t) = int_0^t p(tau) w(tau) dtau,     p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

with the weights w(tau) = w_k of step k for k - 1 < tau <= k. Unlike that of an EMA, its profile p scales with t: its
standard deviation is sigma_rel t, whatever t is, and w at the beginning of the training has no part in it. In each step

    average(t) = beta(t) average(t - 1) + (1 - beta(t)) w_t,     beta(t) = (1 - 1 / t)^(gamma + 1)

Two such averages are computed during a training, and snapshots of them are kept. Profiles of any other gamma are
close to linear combinations of theirs, and so are the averages, by the same coefficients (post-hoc EMA).

Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine (2024), "Analyzing and improving the training dynamics of
diffusion models", section 3 and appendix C.
"""

__all__ = ["WIDEST", "Combination", "combine", "exponent", "power_decay", "relative_width"]

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Numbers = np.ndarray | float
WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the mean of all weights


def relative_width(gamma: float) -> float:
    """sigma_rel, the standard deviation of a profile divided by t (their eq. 123).

    Args:
        gamma: at least 0.
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent(sigma_rel: float) -> float:
    """gamma of a profile with a relative width (their eq. 126 and algorithm 2), by the largest root of

        (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2

    Raises:
        ValueError: `sigma_rel` is not in (0, 12^-0.5], where gamma is at least 0.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel must be above 0 and at most 12^-0.5 = {WIDEST:.4f}, got {sigma_rel}")
    r = sigma_rel**-2
    return max(0.0, np.roots([1, 7, 16 - r, 12 - r]).real.max().item())


def power_decay(step: int, gamma: float) -> float:
    """beta(t) of a step, counted from 0: t = step + 1 (their eq. 127). The first step copies the weights."""
    return (1 - 1 / (step + 1)) ** (gamma + 1)


class Combination(NamedTuple):
    """A profile as a linear combination of others.

    Attributes:
        coefficients: one for each of the others; their sum is 1.
        error: the norm of what is left, divided by that of the profile, in L2 over [0, t]. The average by the
            combination differs from that by the profile by at most `error` times the norm of the profile,
            (gamma + 1) / sqrt((2 gamma + 1) t), times the norm of w - c over [0, t], whatever the constant c is.
    """

    coefficients: list[float]
    error: float


def combine(times: Sequence[float], gammas: Sequence[float], t: float, gamma: float) -> Combination:
    """The combination of profiles that is nearest to another one (their algorithm 3), all in float64.

    Their sum is 1, so that weights that do not change are their own average. The paper's algorithm leaves the sum free.

    Args:
        times, gammas: of each profile that there is; no two are the same.
        t, gamma: of the profile that is needed.
    """
    times, gammas = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    # Of profiles of norm 1, which reach from the first snapshot to the last otherwise.
    norms, norm = _product(times, gammas, times, gammas) ** 0.5, _product(t, gamma, t, gamma) ** 0.5
    products = _product(times[:, None], gammas[:, None], times, gammas) / np.outer(norms, norms)
    wanted = _product(times, gammas, t, gamma) / norms / norm
    integrals = norm / norms  # of a profile of norm 1, in units of that of the one that is needed
    nearest, towards = np.linalg.solve(products, np.stack([wanted, integrals], 1)).T
    x = nearest + towards * (1 - integrals @ nearest) / (integrals @ towards)
    left = 1 - 2 * (x @ wanted) + x @ products @ x
    return Combination((x * integrals).tolist(), math.sqrt(max(0.0, left)))


def _product(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> Numbers:
    """The integrals of the products of profiles, each until the earlier of their times (their eq. 151)."""
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    later = np.where(t_a < t_b, gamma_b, gamma_a)  # exponent of the profile that ends later
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**later / np.maximum(t_a, t_b)
