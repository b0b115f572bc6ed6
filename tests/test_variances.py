"""Variances that are learned: in training, in sampling and in what a module says of a step."""

import math

import pytest
import torch
from small_diffusion import Net, TwoHalves, images, make
from torch import nn
from torch.distributions import Normal, kl_divergence

from ddpm_fast import GaussianDiffusion, UNet, samplers, schedules, variances
from ddpm_fast.noise import gaussian
from ddpm_fast.parameterization import OBJECTIVES, target_rows, x_start_rows
from ddpm_fast.variances import LEARNED_VARIANCES

SCHEDULE = schedules.make("cosine", 20)
LEARNED = (*LEARNED_VARIANCES, "learnable")


def learned(variance, **arguments):
    network = TwoHalves() if variance in LEARNED_VARIANCES else Net()
    if variance == "learned":
        network.middle = -4.0  # log sigma^2 itself
    arguments = {"image_size": (4, 6), "timesteps": 20, "beta_schedule": "cosine", "variance": variance} | arguments
    diffusion = GaussianDiffusion(network, **arguments).eval()
    if diffusion.log_variance is not None:
        with torch.no_grad():
            diffusion.log_variance += torch.linspace(-0.3, 0.3, 20)
    return diffusion


def log_variance_at(diffusion, t, v, table=None, k=None):
    """log sigma^2 of step t of all, or of step k of a table."""
    if diffusion.variance == "learnable":
        return diffusion.log_variance[t]
    if table is None:
        beta, posterior = SCHEDULE.betas[t], SCHEDULE.posterior_variance[max(t, 1)]
    else:
        abar, abar_next = SCHEDULE.alphas_cumprod[t], 1.0
        if k + 1 < len(table):
            abar_next = SCHEDULE.alphas_cumprod[table.t[k + 1]]
        beta = 1 - abar / abar_next
        posterior = beta * (1 - abar_next) / (1 - abar)
    if diffusion.variance == "learned":
        return v + (beta / SCHEDULE.betas[t]).log()
    return (1 - v) / 2 * posterior.log() + (1 + v) / 2 * beta.log()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variance", LEARNED_VARIANCES)
@pytest.mark.parametrize("steps", [20, 6])
def test_ancestral_steps_take_the_variance_of_the_network(variance, objective, steps):
    diffusion = learned(variance, objective=objective).double()
    table = diffusion.step_table("ddpm", steps)
    x = gaussian((3, 2, 4, 6), seed=7, dtype=torch.float64)
    for k, t in enumerate(table.t.tolist()):
        pred, v = diffusion.model(x, torch.full((3,), t)).chunk(2, dim=1)
        u, w = (column[t] for column in x_start_rows(SCHEDULE, objective))
        x = table.A[k] * x + table.B[k] * (u * x + w * pred).clamp(-1, 1)
        if k + 1 < len(table):
            sigma = (0.5 * log_variance_at(diffusion, t, v, table, k)).exp()
            x = x + sigma * gaussian(x.shape, seed=7, stream=k + 1, dtype=torch.float64)
    found = diffusion.sample(3, sampler="ddpm", steps=steps, seed=7)
    torch.testing.assert_close(found, (x + 1) / 2, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", LEARNED)
def test_a_run_is_its_steps_by_p_sample_and_by_p_mean_variance(variance):
    diffusion = learned(variance)
    x = gaussian((3, 2, 4, 6), seed=7)
    y = x.clone()
    for t in reversed(range(20)):
        times = torch.full((3,), t)
        mean, sigma2, log_sigma2, _ = diffusion.p_mean_variance(y, times)
        torch.testing.assert_close(sigma2, log_sigma2.exp())
        z = gaussian(x.shape, seed=7, stream=20 - t)
        y = mean + (t > 0) * (0.5 * log_sigma2).exp() * z
        x, _ = diffusion.p_sample(x, t, seed=7)
    with torch.no_grad():
        found = diffusion.sample(3, seed=7)
    # 20 steps of a few roundings each, of numbers of about 1
    torch.testing.assert_close(found, (x + 1) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, (y.detach() + 1) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("sampler", [name for name in samplers.SAMPLERS if name != "ddpm"])
def test_other_samplers_take_the_prediction_alone(variance, sampler):
    class FirstHalf(TwoHalves):
        def forward(self, x, t):
            return super().forward(x, t)[:, :2]

    diffusion = learned(variance)
    fixed = make(variance="posterior").eval()
    if variance in LEARNED_VARIANCES:
        fixed.model = FirstHalf().eval()
    found, expected = (d.sample(3, sampler=sampler, steps=5, seed=2) for d in (diffusion, fixed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the halves lie otherwise in memory


def expected_loss(diffusion, x_start, x_t, t, eps, pred, v):
    """kl and hybrid by torch.distributions, for the timestep t > 0, of each sample."""
    s, objective = SCHEDULE, diffusion.objective
    u, w = (column[t] for column in x_start_rows(s, objective))

    def bits(pred):
        x_hat = u * x_t + w * pred
        c0, cx = s.posterior_mean_coef1[t], s.posterior_mean_coef2[t]
        log_p = torch.as_tensor(log_variance_at(diffusion, t, v))
        if diffusion.variance in variances.VARIANCES:
            log_p = variances.variance(s, diffusion.variance)[t].log()
        q = Normal(c0 * x_start + cx * x_t, s.posterior_variance[t].sqrt())
        return kl_divergence(q, Normal(c0 * x_hat + cx * x_t, (0.5 * log_p).exp())).flatten(1).mean(1) / math.log(2)

    if diffusion.loss_type == "kl":
        return 20 * bits(pred)
    p, q = (column[t] for column in target_rows(s, objective))
    simple = diffusion.loss_weight[t] * (pred - p * x_start - q * eps).square().flatten(1).mean(1)
    return simple + 20 / 1000 * bits(pred.detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("variance", "loss_type"),
    [(v, loss) for v in LEARNED for loss in ("kl", "hybrid")] + [("posterior", "kl"), ("beta", "kl")],
)
def test_losses_and_gradients_of_the_bound_are_those_of_the_formula(variance, loss_type, objective):
    diffusion = learned(variance, objective=objective, loss_type=loss_type).double()
    x_start = images().double() * 2 - 1
    eps = gaussian(x_start.shape, seed=3, dtype=torch.float64)
    for t in (1, 7, 19):
        times = torch.full((5,), t)
        found = diffusion.p_losses(x_start, times, eps, loss_reduction="none")
        x_t = diffusion.q_sample(x_start, times, eps)
        pred, *v = diffusion.model(x_t, times).split(2, dim=1)
        if variance == "learnable":
            v = [None]
        expected = expected_loss(diffusion, x_start, x_t, t, eps, pred, *(v or [torch.zeros(())]))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(diffusion.p_losses(x_start, times, eps), expected.mean(), rtol=1e-10, atol=1e-12)
        parameters = list(diffusion.parameters())
        for a, b in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_best_variance_is_the_posteriors_for_a_point_and_beta_for_normal_data(name):
    """It is that of x_{t-1} given x_t, and for x_0 ~ N(0, v) the two are jointly normal. Ho et al. (2020), sec. 3.2."""
    schedule = schedules.make(name, 1000)
    abar, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev

    def best(v):
        joint = schedule.alphas.sqrt() * (before * v + 1 - before)  # the covariance of x_{t-1} and x_t
        return before * v + 1 - before - joint**2 / (abar * v + 1 - abar)

    # Differences of numbers of at most 1, of a product of 1000 factors
    close = {"rtol": 1e-9, "atol": 1000 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(variances.variance(schedule, "posterior"), best(0.0), **close)
    torch.testing.assert_close(variances.variance(schedule, "beta"), best(1.0), **close)
    for v in (0.01, 0.2, 0.9):
        assert (best(v) >= variances.variance(schedule, "posterior") - close["atol"]).all()
        assert (best(v) <= variances.variance(schedule, "beta") + close["atol"]).all()


@pytest.mark.parametrize("variance", LEARNED)
def test_the_hybrid_loss_trains_the_prediction_as_l2_does(variance):
    diffusion = learned(variance)
    assert diffusion.loss_type == "hybrid"
    plain = GaussianDiffusion(
        nn.Identity(), image_size=(4, 6), channels=2, timesteps=20, beta_schedule="cosine", loss_type="l2"
    )
    plain.model = diffusion.model
    t = torch.arange(5) * 4
    weights = [p for name, p in diffusion.model.named_parameters() if "second" not in name]
    found = torch.autograd.grad(diffusion(images(), times=t, seed=1), weights)
    diffusion.model.register_forward_hook(lambda module, inputs, output: output[:, :2])
    expected = torch.autograd.grad(plain(images(), times=t, seed=1), weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_uint8_images_and_half_precision_have_the_bound_of_float32():
    """x_t goes into the bound as it is, whatever the network computes in."""
    pixels = (images() * 255).round().to(torch.uint8)
    for loss_type in ("kl", "hybrid"):
        diffusion, t = learned("learned_range", loss_type=loss_type), torch.tensor([0, 1, 5, 11, 19])
        by_bytes, by_floats = (diffusion(x, times=t, seed=1, loss_reduction="none") for x in (pixels, pixels / 255))
        torch.testing.assert_close(by_bytes, by_floats, rtol=1e-4, atol=1e-5)
        diffusion.model.bfloat16()
        half = diffusion(pixels, times=t, seed=1, loss_reduction="none")
        assert half.dtype == torch.float32
        assert half.isfinite().all()


def test_a_network_of_the_package_predicts_its_variance():
    network = UNet.preset("digits-8", learned_variance=True)
    diffusion = GaussianDiffusion(network, image_size=8, timesteps=10, variance="learned_range", beta_schedule="cosine")
    loss = diffusion(torch.rand(4, 1, 8, 8), seed=0)
    loss.backward()
    assert network.conv_out.weight.grad[1].any()
    assert diffusion.sample(2, seed=1, steps=10).isfinite().all()
    assert diffusion.sample(2, seed=1, steps=4).shape == (2, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r"twice the channels of its input, \(4, 2, 8, 8\); it returned \(4, 1, 8, 8\)"
    ):
        GaussianDiffusion(UNet.preset("digits-8"), image_size=8, timesteps=10, variance="learned")(
            torch.rand(4, 1, 8, 8)
        )


def test_the_learnable_variance_is_a_parameter_in_float32():
    diffusion = learned("learnable")
    assert next(name for name, _ in diffusion.named_parameters()) == "log_variance"
    exact = diffusion.log_variance.detach().clone()
    diffusion.bfloat16()
    assert diffusion.log_variance.dtype == torch.float32
    assert torch.equal(diffusion.log_variance, exact)
    assert diffusion.double().log_variance.dtype == torch.float64
    other = learned("learnable")
    other.load_state_dict(diffusion.state_dict())
    assert torch.equal(other.log_variance, exact)
    # A run has the variances that the parameter has come to.
    torch.testing.assert_close(diffusion.step_table("ddpm").sigma[:-1], (0.5 * exact.double().flip(0)[:-1]).exp())


def test_an_overridden_method_must_hand_on_the_variance():
    class Changed(GaussianDiffusion):
        third = True

        def model_predictions(self, x, t, *args, **kwargs):
            prediction = super().model_predictions(x, t, *args, **kwargs)
            return prediction if self.third else prediction[:2]

    diffusion = Changed(TwoHalves(), image_size=(4, 6), timesteps=20, beta_schedule="cosine", variance="learned_range")
    expected = learned("learned_range").sample(2, seed=1)
    torch.testing.assert_close(diffusion.sample(2, seed=1), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="ancestral steps of a learned variance go through p_sample"):
        diffusion.sample(2, sampler="ddpm", steps=5)
    assert diffusion.sample(2, sampler="ddim", steps=5).isfinite().all()
    diffusion.third = False
    with pytest.raises(ValueError, match="model_predictions must return a third tensor, its v"):
        diffusion.sample(2)


@pytest.mark.parametrize("objective", ["pred_v", "pred_x0", "pred_mean"])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_terminal_snr_of_zero(name, objective):
    schedule = schedules.make(name, 1000)
    rescaled = schedule.with_zero_terminal_snr()
    assert rescaled.alphas_cumprod[-1] == 0
    torch.testing.assert_close(rescaled.alphas_cumprod[0], schedule.alphas_cumprod[0])
    # Idempotent, and linear in sqrt(abar).
    torch.testing.assert_close(rescaled.with_zero_terminal_snr().betas, rescaled.betas, rtol=1e-6, atol=1e-12)
    a, b = schedule.sqrt_alphas_cumprod, rescaled.sqrt_alphas_cumprod
    slope = (b[0] - b[-1]) / (a[0] - a[-1])
    torch.testing.assert_close(b, slope * (a - a[-1]), rtol=0, atol=1e-7)

    diffusion = GaussianDiffusion(
        Net(), image_size=(4, 6), objective=objective, beta_schedule=name, zero_terminal_snr=True, loss_weight="min_snr"
    ).eval()
    t = torch.tensor([0, 10, 500, 998, 999])
    diffusion(images(), times=t, seed=1).backward()
    assert all(p.grad.isfinite().all() for p in diffusion.parameters())
    assert (diffusion.loss_weight > 0).all()
    x_T = gaussian((2, 2, 4, 6), seed=1)
    for sampler in samplers.SAMPLERS:
        assert diffusion.sample(2, sampler=sampler, steps=10, noise=x_T).isfinite().all()
    assert diffusion.p_sample(x_T, 999, seed=1)[0].isfinite().all()
    eps, x_start = diffusion.model_predictions(x_T, torch.full((2,), 999))
    torch.testing.assert_close(eps, x_T)  # x_T is eps
    assert x_start.isfinite().all()
    assert diffusion.likelihood((images() * 255).to(torch.uint8), steps=5).total_bpd.isfinite().all()
    other = GaussianDiffusion(
        Net(), image_size=(4, 6), objective=objective, beta_schedule=name, zero_terminal_snr=True, loss_weight="min_snr"
    )
    other.load_state_dict(diffusion.state_dict())


def test_betas_that_end_in_one_are_taken_where_they_are_meant():
    betas = SCHEDULE.with_zero_terminal_snr().betas
    with pytest.raises(ValueError, match="beta = 1 at t = 19"):
        make(beta_schedule=betas)
    diffusion = make(beta_schedule=betas, zero_terminal_snr=True, loss_weight="uniform")
    torch.testing.assert_close(diffusion.schedule.betas, betas)
    with pytest.raises(ValueError, match="beta = 1 at t = 1"):
        schedules.NoiseSchedule([0.1, 1.0, 0.2], zero_terminal_snr=True)


def test_min_snr_and_p2_are_the_published_weights_of_the_error_of_eps():
    snr = SCHEDULE.snr
    for objective, of_eps in {"pred_noise": 1, "pred_x0": snr, "pred_v": snr / (snr + 1)}.items():
        p2 = make(objective=objective, loss_weight="p2", p2_gamma=0.5, p2_k=2.0).loss_weight
        torch.testing.assert_close(p2.double(), of_eps / (2.0 + snr) ** 0.5, rtol=1e-6, atol=0)
    zero = SCHEDULE.with_zero_terminal_snr()
    found = make(objective="pred_v", zero_terminal_snr=True, loss_weight="min_snr").loss_weight
    torch.testing.assert_close(found.double(), (zero.snr + 1).clamp(max=5) / (zero.snr + 1), rtol=1e-6, atol=0)
