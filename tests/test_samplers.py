import math

import pytest
import torch

from ddpm_fast import samplers, schedules
from ddpm_fast.parameterization import OBJECTIVES

SCHEDULE = schedules.make("linear", 1000)


def test_full_ancestral_rows_are_the_posterior():
    table = samplers.ancestral(SCHEDULE, "pred_noise", variance="posterior")
    assert table.t.tolist() == list(range(999, -1, -1))
    order = table.t
    # 1 - abar / abar' against beta: rounding of abar, relative to the smallest beta, 1e-4.
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(table.A, SCHEDULE.posterior_mean_coef2[order], **close)
    torch.testing.assert_close(table.B, SCHEDULE.posterior_mean_coef1[order], **close)
    torch.testing.assert_close(table.sigma**2, SCHEDULE.posterior_variance[order], **close)
    beta = samplers.ancestral(SCHEDULE, "pred_noise", variance="beta").sigma ** 2
    torch.testing.assert_close(beta[:-1], SCHEDULE.betas[order[:-1]], **close)
    assert beta[-1] == 0


@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance(steps):
    """Song et al. (2021), sec. 4.1."""
    ddim = samplers.ddim(SCHEDULE, "pred_v", steps, eta=1.0)
    ancestral = samplers.ancestral(SCHEDULE, "pred_v", steps)
    torch.testing.assert_close(ddim.rows, ancestral.rows, rtol=1e-9, atol=1e-10)


def test_every_sampler_keeps_the_marginals_where_it_should():
    """A x_t + B x_0 + sigma z must be distributed as q(x_t' | x_0): Song et al. (2021), lemma 1."""
    abar = SCHEDULE.alphas_cumprod
    tables = [samplers.ddim(SCHEDULE, "pred_noise", 20, eta=eta) for eta in (0.0, 0.5, 1.0)]
    for table in [*tables, samplers.ancestral(SCHEDULE, "pred_noise", 20)]:
        here, after = abar[table.t], torch.cat([abar[table.t][1:], torch.ones(1, dtype=torch.float64)])
        torch.testing.assert_close(table.A * here.sqrt() + table.B, after.sqrt())
        torch.testing.assert_close(table.A**2 * (1 - here) + table.sigma**2, 1 - after, rtol=1e-9, atol=1e-12)
    none, half, whole = (table.sigma for table in tables)
    assert not none.any()
    torch.testing.assert_close(half, whole / 2)


MULTISTEP = (samplers.dpmpp_2m, samplers.dpmpp_2m_sde)


@pytest.mark.parametrize("sde", [False, True])
def test_dpm_solver_pp_is_the_papers_recursion(sde):
    """Lu et al. (2022), algorithm 2 and its SDE form, on numbers for what the network and the noise would be."""
    steps = [999, 900, 850, 500, 320, 100]
    alpha = [math.sqrt(SCHEDULE.alphas_cumprod[t]) for t in steps]
    sigma = [math.sqrt(1 - SCHEDULE.alphas_cumprod[t]) for t in steps]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    x0, z = torch.randn(2, len(steps), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    table = MULTISTEP[sde](SCHEDULE, "pred_noise", steps)
    assert table.t.tolist() == steps
    expected = x = 1.7
    for i in range(1, len(steps)):
        h, D = lam[i] - lam[i - 1], x0[i - 1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * x0[i - 1] - 1 / (2 * r) * x0[i - 2]
        if sde:
            expected = sigma[i] / sigma[i - 1] * math.exp(-h) * expected + alpha[i] * (1 - math.exp(-2 * h)) * D
            expected += sigma[i] * math.sqrt(1 - math.exp(-2 * h)) * z[i]
        else:
            expected = sigma[i] / sigma[i - 1] * expected - alpha[i] * (math.exp(-h) - 1) * D
        A, B, C, deviation = table.rows[i - 1, 2:].tolist()
        x = A * x + B * x0[i - 1] + C * (x0[i - 2] if i > 1 else math.nan if C else 0) + deviation * z[i]
        assert x == pytest.approx(expected, rel=1e-12)
    assert table.rows[-1, 2:].tolist() == [0, 1, 0, 0]  # lambda = infinity: x0_hat, without noise


@pytest.mark.parametrize("steps", [1000, 50, 3, 2, 1])
@pytest.mark.parametrize("sde", [False, True])
def test_dpm_solver_pp_with_two_equal_guesses_is_ddim(sde, steps):
    """Its first order is DDIM, with eta = 1 for the SDE: Lu et al. (2022). One step or two are all of first order."""
    table = MULTISTEP[sde](SCHEDULE, "pred_v", steps)
    ddim = samplers.ddim(SCHEDULE, "pred_v", table.t.tolist(), eta=float(sde))
    close = {"rtol": 1e-9, "atol": 1e-10}
    for a, b in ((table.A, ddim.A), (table.B + table.C, ddim.B), (table.sigma, ddim.sigma)):
        torch.testing.assert_close(a, b, **close)
    assert torch.equal(table.rows[:, :2], ddim.rows[:, :2])
    assert table.C[0] == table.C[-1] == 0
    assert (table.C[1:-1] < 0).all()


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dpm_solver_pp_rows_are_finite(name, objective):
    schedule = schedules.make(name, 100)
    for steps in (1, 2, 3, 20, 100):
        for sde in (False, True):
            assert MULTISTEP[sde](schedule, objective, steps).rows.isfinite().all()


def test_dpm_solver_pp_of_a_schedule_that_ends_without_signal_begins_at_x0_hat():
    """lambda -> -infinity: x_T says nothing of x_0, and v says -x_0. Lin et al. (2024)."""
    schedule = schedules.NoiseSchedule([*SCHEDULE.betas.tolist(), 1 - 2**-53])
    a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    assert a[-1] < 1e-9
    for sde in (False, True):
        table = MULTISTEP[sde](schedule, "pred_v", 20)
        assert table.rows.isfinite().all()
        signal, noise = a[table.t[1]].item(), s[table.t[1]].item()
        noisy = [0.0, signal, 0.0, noise] if sde else [noise, signal, 0.0, 0.0]
        assert table.rows[0].tolist() == pytest.approx([0.0, -1.0, *noisy], abs=1e-6)


def test_karras_timesteps_are_even_in_the_seventh_root_of_the_noise():
    """Karras et al. (2022), eq. 5, with sigma = s / a: nearest timesteps, each once."""
    assert samplers.karras_timesteps(SCHEDULE, [3, 9]).tolist() == [9, 3]
    with torch.device("meta"):
        assert samplers.karras_timesteps(SCHEDULE, 5).device.type == "cpu"
    for name in schedules.SCHEDULES:
        schedule = schedules.make(name, 1000)
        sigma = [((1 - abar) / abar) ** 0.5 for abar in schedule.alphas_cumprod.tolist()]
        largest, smallest = min(sigma[-1], 80), sigma[0]
        for steps in (1, 2, 10, 25):
            found = samplers.karras_timesteps(schedule, steps).tolist()
            assert (len(found), found[0]) == (steps, 999)
            assert found == sorted(set(found), reverse=True)
            for i in range(1, steps):
                root = largest ** (1 / 7) + i / (steps - 1) * (smallest ** (1 / 7) - largest ** (1 / 7))
                nearest = min(range(1000), key=lambda t: abs(math.log(sigma[t]) - 7 * math.log(root)))
                assert found[i] == min(nearest, found[i - 1] - 1)
        for steps in (100, 500, 999, 1000):  # more than there are timesteps in places
            found = samplers.karras_timesteps(schedule, steps)
            assert len(found) == steps
            assert (found.diff() < 0).all()
            assert (found[0], found[-1] >= 0) == (999, True)


def test_strided_timesteps_end_with_the_noisiest_and_may_be_given():
    assert samplers.strided_timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    assert samplers.strided_timesteps(10, 1).tolist() == [9]
    assert samplers.strided_timesteps(10, [3, 9, 0]).tolist() == [9, 3, 0]
    assert samplers.ddim(SCHEDULE, "pred_x0", [10, 500, 999]).t.tolist() == [999, 500, 10]


@pytest.mark.parametrize("steps", [0, 1001, -3, [0, 0], [1000], [-1], [], [0.5], True, "ddim50"])
def test_steps_that_cannot_be_are_refused(steps):
    with pytest.raises((ValueError, TypeError)):
        samplers.strided_timesteps(1000, steps)


def test_eta_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        samplers.ddim(SCHEDULE, "pred_noise", 10, eta=-0.1)
    with pytest.raises(ValueError, match="more noise"):
        samplers.ddim(SCHEDULE, "pred_noise", 10, eta=3.0)
