"""Power-function averages, and others that are made from them."""

import math

import numpy as np
import pytest

from ddpm_fast.training.power_average import WIDEST, combine, exponent, power_decay, relative_width

EPS = np.finfo(np.float64).eps


def tracked(walk, gamma):
    """The average after each step, as a training computes it: (steps, D)."""
    averages, average = [], np.full_like(walk[0], np.nan)
    for step, weights in enumerate(walk):
        beta = power_decay(step, gamma)
        average = weights if beta == 0 else beta * average + (1 - beta) * weights
        averages.append(average)
    return np.stack(averages)


def norm(gamma, t):
    """Of a profile, in L2 over [0, t]."""
    return (gamma + 1) / math.sqrt((2 * gamma + 1) * t)


@pytest.fixture(scope="module")
def walk():
    """Weights that begin at 5 and walk at random: 400 steps of 50 numbers."""
    return 5 + np.random.default_rng(0).standard_normal((400, 50)).cumsum(0)


def test_the_exponent_is_the_root_of_the_cubic():
    for sigma_rel in np.linspace(0.002, WIDEST, 200):
        assert relative_width(exponent(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
        assert exponent(relative_width(exponent(sigma_rel))) == pytest.approx(exponent(sigma_rel), rel=1e-12, abs=1e-12)
    assert round(exponent(0.05), 2) == 16.97  # in the paper, section 3.1
    assert round(exponent(0.1), 2) == 6.94


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.2887, math.nan, math.inf])
def test_widths_without_an_exponent_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"above 0 and at most 12\^-0.5 = 0.2887, got"):
        exponent(sigma_rel)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 6.94, 16.97])
def test_the_width_is_the_standard_deviation_of_the_profile(gamma):
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # of tau / t, by integration
    assert relative_width(gamma) == pytest.approx(math.sqrt(square - mean**2), rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, WIDEST])
def test_a_step_has_the_integral_of_the_profile_over_it_for_its_weight(sigma_rel):
    """The betas telescope: step k of t has (k^(gamma + 1) - (k - 1)^(gamma + 1)) / t^(gamma + 1)."""
    gamma, t = exponent(sigma_rel), 60
    (found,) = tracked(np.eye(t), gamma)[-1:]
    k = np.arange(t + 1) / t
    # Each of the t factors is rounded, and the power multiplies the rounding of 1 - 1 / t by its exponent.
    np.testing.assert_allclose(found, np.diff(k ** (gamma + 1)), rtol=0, atol=t * (gamma + 4) * EPS)


def test_a_profile_that_there_is_needs_no_other():
    gammas = [exponent(0.05), exponent(0.1)] * 4
    times = np.repeat([100, 200, 300, 400], 2)
    for i in (0, 5, 7):
        found = combine(times, gammas, times[i], gammas[i])
        np.testing.assert_allclose(found.coefficients, np.eye(8)[i], atol=1e-12)
        assert found.error < 1e-7  # the root of what rounding leaves of a square


def test_no_other_combination_is_nearer():
    """Among those of sum 1, what is left has the same product with all profiles: here by quadrature."""
    times, gammas = np.array([3.0, 3.0, 5.0, 5.0, 8.0]), np.array([7.0, 3.0, 7.0, 3.0, 5.0])
    t, gamma = 9.0, 2.0
    found = combine(times, gammas, t, gamma)
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-14)
    x, w = np.polynomial.legendre.leggauss(8)  # exact for the polynomials between the times
    ends = np.array([0.0, 3.0, 5.0, 8.0, 9.0])
    tau = (ends[:-1, None] + np.diff(ends)[:, None] * (x + 1) / 2).ravel()
    w = (np.diff(ends)[:, None] * w / 2).ravel()

    def profile(t, gamma):
        return np.where(tau < t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)

    profiles = np.stack([profile(*each) for each in zip(times, gammas, strict=True)])
    left = found.coefficients @ profiles - profile(t, gamma)
    products = profiles @ (w * left)
    np.testing.assert_allclose(products, products[0], rtol=0, atol=1e-14)
    assert math.sqrt(left**2 @ w) / norm(gamma, t) == pytest.approx(found.error, rel=1e-10)


@pytest.mark.parametrize("end", [400, 390])  # with a snapshot at the end, and between two
@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15, 0.25])
def test_averages_of_any_width_follow_from_snapshots_of_two(walk, sigma_rel, end):
    """Of a random walk, to the bound that the norm of what is left of the profile gives."""
    gamma, known = exponent(sigma_rel), [exponent(0.05), exponent(0.1)]
    averages = [tracked(walk, each) for each in known]
    times = np.array([*range(20, end, 20), end])
    found = combine(np.tile(times, 2), np.repeat(known, len(times)), end, gamma)
    made = found.coefficients @ np.concatenate([each[times - 1] for each in averages])
    direct = tracked(walk, gamma)[end - 1]
    deviation = np.linalg.norm(walk[:end] - walk[:end].mean(0), axis=0)
    rounding = 400 * (20 + 4) * EPS * np.abs(walk).max() * np.abs(found.coefficients).sum()
    assert (np.abs(made - direct) <= found.error * norm(gamma, end) * deviation + rounding).all()
    # The bound is useful: what is made is far nearer than the nearest of the averages that were tracked.
    nearest = min(np.linalg.norm(each[end - 1] - direct) for each in averages)
    assert np.linalg.norm(made - direct) < 0.1 * nearest


def test_weights_that_do_not_change_are_their_own_average():
    found = combine([100, 100, 200, 200], [16.97, 6.94] * 2, 230, 3.0)
    assert sum(found.coefficients) == pytest.approx(1, abs=4 * EPS * np.abs(found.coefficients).sum())
    assert found.error > 0.01  # although the profile is not one of theirs
