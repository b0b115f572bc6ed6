import pytest
import torch

from ddpm_fast import schedules
from ddpm_fast.loss_weights import LOSS_WEIGHTS, loss_weight
from ddpm_fast.parameterization import OBJECTIVES, target_rows, x_start_rows

SCHEDULE = schedules.make("cosine", 1000)


def definition(objective, s, x_start, eps):
    """The target as the papers write it, from x_0 and eps."""
    a, sigma = s.alphas_cumprod.sqrt(), (1 - s.alphas_cumprod).sqrt()
    x_t = a * x_start + sigma * eps
    return {
        "pred_noise": eps.expand_as(a),
        "pred_x0": x_start.expand_as(a),
        "pred_v": a * eps - sigma * x_start,
        "pred_mean": s.posterior_mean_coef1 * x_start + s.posterior_mean_coef2 * x_t,
    }[objective], x_t


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_target_is_the_definition_and_x0_hat_finds_x0(objective):
    x_start, eps = torch.tensor(0.37, dtype=torch.float64), torch.tensor(-1.21, dtype=torch.float64)
    target, x_t = definition(objective, SCHEDULE, x_start, eps)
    p, q = target_rows(SCHEDULE, objective)
    torch.testing.assert_close(p * x_start + q * eps, target, rtol=1e-12, atol=1e-14)
    u, w = x_start_rows(SCHEDULE, objective)
    # x_0 = (x_t - s eps) / a loses what 1 / a blows up: eps(float64) / a, 5e-4 at the end of this schedule.
    tolerance = 1e-14 / SCHEDULE.sqrt_alphas_cumprod.min().item()
    torch.testing.assert_close(u * x_t + w * target, x_start.expand_as(u), rtol=0, atol=tolerance)


def test_the_mean_that_follows_from_eps_is_the_papers():
    """Ho et al. (2020), eq. 11: c0 x0_hat + cx x_t = (x_t - beta / s eps) / sqrt(alpha)."""
    s = schedules.make("linear", 1000)
    u, w = x_start_rows(s, "pred_noise")
    c0, cx = s.posterior_mean_coef1, s.posterior_mean_coef2
    # 1 - abar has lost up to 1 / beta_1 = 1e4 of its digits.
    close = {"rtol": 1e4 * 8 * torch.finfo(torch.float64).eps, "atol": 0}
    torch.testing.assert_close(c0 * u + cx, s.alphas.rsqrt(), **close)
    torch.testing.assert_close(c0 * w, -s.betas / s.sqrt_one_minus_alphas_cumprod * s.alphas.rsqrt(), **close)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weight_snr_is_the_simple_loss_on_eps(objective):
    """Perturb what is predicted, see how far eps moves: the weighted squares must agree."""
    a, s = SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod
    _, w = x_start_rows(SCHEDULE, objective)
    error = 0.01
    eps_error = -a / s * (w * error)  # eps = (x_t - a x_0) / s
    weighted = loss_weight(SCHEDULE, objective, "snr") * error**2
    torch.testing.assert_close(weighted, eps_error**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_weight_vlb_is_the_divergence_of_two_gaussians(objective, variance):
    """KL(N(m1, v) || N(m2, v)) = (m1 - m2)^2 / 2v, the means being those of q and p for an error of x_0."""
    s = SCHEDULE
    _, w = x_start_rows(s, objective)
    sigma2 = s.betas if variance == "beta" else s.posterior_variance
    error = 0.3
    distance = s.posterior_mean_coef1 * w * error
    kl = (distance**2 / (2 * sigma2))[1:]
    weight = loss_weight(s, objective, "vlb", variance=variance)
    torch.testing.assert_close(weight[1:] * error**2, kl, rtol=1e-12, atol=0)
    first = sigma2[0] if variance == "beta" else sigma2[1]
    assert weight[0].item() == pytest.approx((w[0] ** 2 / (2 * first)).item())
    if variance == "posterior":  # Kingma et al. (2021), eq. 13: half the fall of the SNR
        fall = 0.5 * (s.snr[:-1] - s.snr[1:]) * w[1:] ** 2
        torch.testing.assert_close(weight[1:], fall, rtol=1e-6, atol=0)


def test_weight_min_snr_is_bounded_on_x0():
    weight = loss_weight(SCHEDULE, "pred_x0", "min_snr", min_snr_gamma=5.0)
    torch.testing.assert_close(weight, SCHEDULE.snr.clamp(max=5.0))
    assert (loss_weight(SCHEDULE, "pred_v", "simple") == 1).all()


def test_weights_of_ones_own_are_checked():
    assert torch.equal(loss_weight(SCHEDULE, "pred_v", torch.arange(1000.0)), torch.arange(1000.0).double())
    with pytest.raises(ValueError, match=r"1000 finite numbers of at least 0.*\(3,\)"):
        loss_weight(SCHEDULE, "pred_v", [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        loss_weight(SCHEDULE, "pred_v", torch.full((1000,), torch.nan))
    with pytest.raises(ValueError, match=", ".join(LOSS_WEIGHTS)):
        loss_weight(SCHEDULE, "pred_v", "minsnr")
    with pytest.raises(ValueError, match="pred_noise, pred_x0"):
        target_rows(SCHEDULE, "eps")
