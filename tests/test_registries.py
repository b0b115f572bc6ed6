"""A sampler, an objective and a schedule from outside the package: one function and one row of a registry each."""

import pytest
import torch

from ddpm_fast import GaussianDiffusion, loss_weights, parameterization, samplers, schedules, variances
from ddpm_fast.training.config import ConfigError, build_diffusion, check

SCHEDULE = schedules.make("cosine", 20)


def euler(schedule, objective, steps=None, *, stretch=1.0):
    """DDIM, which is Euler's method for the probability flow, with an option of its own."""
    table = samplers.ddim(schedule, objective, steps)
    return samplers.StepTable(
        t=table.t, u=table.u, w=table.w, A=table.A * stretch, B=table.B, C=table.C, sigma=table.sigma
    )


def scaled_noise(schedule):
    """The network predicts 2 eps."""
    return torch.zeros_like(schedule.betas), torch.full_like(schedule.betas, 2.0)


def square(timesteps, beta_end=0.5):
    return torch.linspace(0.1, 1, timesteps, dtype=torch.float64) ** 2 * beta_end


def middle(schedule):
    return (schedule.betas + schedule.posterior_variance) / 2


def late(schedule, w):
    return torch.arange(len(w), dtype=torch.float64)


def late_half(schedule, steps):
    """Every timestep from K - 1 on: little noise alone."""
    return torch.arange(steps - 1, -1, -1)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(samplers.SPACINGS, "late_half", late_half)
    monkeypatch.setitem(samplers.SAMPLERS, "euler", euler)
    monkeypatch.setitem(parameterization.OBJECTIVES, "scaled_noise", scaled_noise)
    monkeypatch.setitem(variances.VARIANCES, "middle", middle)
    monkeypatch.setitem(loss_weights.LOSS_WEIGHTS, "late", late)
    monkeypatch.setitem(schedules.SCHEDULES, "square", square)


CONFIG = {
    "data": {"name": "digits"},
    "model": {"preset": "digits-8", "dim": 8, "norm_groups": 4},
    "diffusion": {
        "timesteps": 20,
        "objective": "scaled_noise",
        "beta_schedule": "square",
        "variance": "middle",
        "loss_weight": "late",
        "sampler": "euler",
        "sampling_timesteps": 10,
        "spacing": "late_half",
    },
    "training": {"steps": 1, "batch_size": 4, "lr": 1e-3},
}


@pytest.mark.usefixtures("added")
def test_a_json_config_names_what_was_added():
    diffusion = build_diffusion(check(CONFIG))
    assert torch.equal(diffusion.schedule.betas, square(20))
    assert torch.equal(diffusion.loss_rows[:, 1], torch.full((20,), 2.0))
    assert torch.equal(diffusion.loss_weight, torch.arange(20.0))
    torch.testing.assert_close(diffusion.variance_rows[:, 0].double(), middle(diffusion.schedule))
    visited = list(range(10))
    assert torch.equal(diffusion.step_table().rows, euler(diffusion.schedule, "scaled_noise", visited).rows)
    table = diffusion.step_table(steps=20, spacing="even")  # what a call says comes first
    assert torch.equal(table.rows, euler(diffusion.schedule, "scaled_noise").rows)
    assert diffusion.step_table(steps=[3, 1]).t.tolist() == [3, 1]
    diffusion(torch.rand(2, 1, 8, 8)).backward()
    assert diffusion.sample(2, seed=0).isfinite().all()


def test_a_config_with_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"diffusion.*'euler'.*ddpm, ddim, dpmpp_2m, dpmpp_2m_sde"):
        build_diffusion(check({**CONFIG, "diffusion": {"sampler": "euler"}}))


@pytest.mark.usefixtures("added")
def test_a_sampler_is_made_by_name_with_its_own_options():
    table = samplers.make("euler", SCHEDULE, "pred_v", 5, stretch=0.5)
    assert torch.equal(table.A, samplers.ddim(SCHEDULE, "pred_v", 5).A * 0.5)
    with pytest.raises(ValueError, match="sampler 'euler' has no argument 'eta'; it takes stretch"):
        samplers.make("euler", SCHEDULE, "pred_v", 5, eta=0.5)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_step_table_samples_what_its_name_samples(name, tiny_network):
    diffusion = GaussianDiffusion(tiny_network, image_size=4, timesteps=20, beta_schedule="cosine")
    table = samplers.make(name, diffusion.schedule, diffusion.objective, 7)
    by_name = diffusion.sample(3, sampler=name, steps=7, eta=0.0 if name == "ddim" else None, seed=5)
    assert torch.equal(diffusion.sample(3, sampler=table, seed=5), by_name)
    with pytest.raises(ValueError, match="a StepTable has its steps"):
        diffusion.sample(3, sampler=table, steps=7)


def test_a_step_table_that_does_not_fit_is_an_error(tiny_network):
    diffusion = GaussianDiffusion(tiny_network, image_size=4, timesteps=10, beta_schedule="cosine")
    with pytest.raises(ValueError, match=r"timesteps in \[0, 10\)"):
        diffusion.sample(1, sampler=samplers.ddim(SCHEDULE, "pred_v"))
    table = samplers.ddim(SCHEDULE, "pred_v", 3)
    with pytest.raises(ValueError, match="as many finite numbers in A"):
        samplers.StepTable(t=table.t, u=table.u, w=table.w, A=table.A / 0, B=table.B, C=table.C, sigma=table.sigma)


def test_the_weights_former_names_still_work():
    for former, name in {"snr": "l_simple", "simple": "uniform"}.items():
        for objective in parameterization.OBJECTIVES:
            weights = [loss_weights.loss_weight(SCHEDULE, objective, kind) for kind in (former, name)]
            assert torch.equal(*weights)


@pytest.mark.parametrize("eta", [1.5, 3.0])
def test_ddim_refuses_an_eta_whose_variance_exceeds_that_of_the_next_state(eta):
    """sigma^2 <= 1 - abar' is what the square root of d needs; beyond it there is no such step."""
    abar = SCHEDULE.alphas_cumprod
    sigma2 = eta**2 * (1 - abar[:-1]) / (1 - abar[1:]) * (1 - abar[1:] / abar[:-1])
    assert (sigma2 > 1 - abar[:-1]).any()
    with pytest.raises(ValueError, match=f"eta = {eta} gives some of these 20 steps more noise"):
        samplers.ddim(SCHEDULE, "pred_v", eta=eta)
