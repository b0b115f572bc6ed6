import pytest
import torch

from ddpm_fast import samplers, schedules

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
