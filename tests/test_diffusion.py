import copy
import math

import numpy as np
import pytest
import torch
from small_diffusion import SIZES, Net, images, make
from torch import nn

from ddpm_fast import GaussianDiffusion
from ddpm_fast.parameterization import OBJECTIVES
from ddpm_fast.schedules import NoiseSchedule


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_every_rank_of_data_trains_and_samples(size, objective, rng):
    diffusion = make(size, objective=objective, rng=rng)
    loss = diffusion(images(size=size))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert diffusion.model.mix.weight.grad.abs().sum() > 0
    samples = diffusion.sample(3)
    assert samples.shape == (3, 2, *size)
    assert 0 <= samples.min() <= samples.max() <= 1
    assert not samples.requires_grad


def test_tables_stay_exact_when_the_network_is_halved():
    """In bfloat16, abar would round to 1 and the first timesteps would have no noise."""
    diffusion = make(timesteps=1000, beta_schedule="linear")
    expected = {name: b.clone() for name, b in diffusion.named_buffers() if not name.startswith("model.")}
    diffusion.to(torch.bfloat16)
    assert diffusion.model.mix.weight.dtype == torch.bfloat16
    for name, table in expected.items():
        assert torch.equal(getattr(diffusion, name), table), name
    assert diffusion.sample(2, steps=4).dtype == torch.float32
    assert diffusion(images()).dtype == torch.float32
    assert diffusion.double().betas.dtype == torch.float64
    assert torch.equal(diffusion.betas, diffusion.schedule.betas)


def test_a_module_made_without_memory_has_its_tables_once_it_gets_some():
    with torch.device("meta"):
        diffusion = make()
    assert diffusion.betas.is_meta
    diffusion.to_empty(device="cpu")
    for name, table in make().named_buffers():
        assert torch.equal(getattr(diffusion, name), table), name


def test_buffers_are_those_of_the_class_it_replaces():
    names = {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "loss_weight",
    }
    diffusion = make()
    state = diffusion.state_dict()
    assert set(state) == {*names, "model.mix.weight", "model.mix.bias"}
    assert all(state[name].dtype == torch.float32 and state[name].shape == (20,) for name in names)
    copy.deepcopy(diffusion).load_state_dict(state)
    nearly = make(beta_schedule="cosine", schedule_fn_kwargs={"s": 0.0085})
    with pytest.raises(RuntimeError, match="`betas` is of another schedule"):
        nearly.load_state_dict(state)
    with pytest.raises(RuntimeError, match="`betas` is of another schedule"):
        make(beta_schedule="sigmoid").load_state_dict(state)
    with pytest.raises(RuntimeError, match="`loss_weight` is of another schedule, objective"):
        make(objective="pred_x0").load_state_dict(state)


def test_numpys_numbers_are_numbers():
    n = np.int64
    diffusion = GaussianDiffusion(Net(), image_size=n(4), timesteps=n(20), beta_schedule="cosine")
    a = diffusion.sample(n(2), seed=n(3), steps=n(5), sample_offset=n(1))
    assert torch.equal(a, diffusion.sample(2, seed=3, steps=5, sample_offset=1))
    for bad in (1.5, "7", torch.tensor(0.5), True):
        for rng in ("philox", "torch"):
            with pytest.raises(ValueError, match="seed must be an integer"):
                make(rng=rng).sample(2, seed=bad)


def test_conversions_undo_one_another():
    diffusion = make().double()
    x0, eps = (torch.randn(4, 2, 4, 6, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 5, 12, 18])
    x_t = diffusion.q_sample(x0, t, eps)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(diffusion.predict_start_from_noise(x_t, t, eps), x0, **close)
    torch.testing.assert_close(diffusion.predict_noise_from_start(x_t, t, x0), eps, **close)
    torch.testing.assert_close(diffusion.predict_start_from_v(x_t, t, diffusion.predict_v(x0, t, eps)), x0, **close)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_self_conditioning_gives_the_network_its_last_guess(sampler):
    class SelfConditioned(Net):
        self_condition = True
        seen: list = []  # noqa: RUF012

        def forward(self, x, t, x_self_cond=None):
            self.seen.append(None if x_self_cond is None else x_self_cond.clone())  # the run goes on in place
            return super().forward(x, t)

    diffusion = GaussianDiffusion(SelfConditioned(), image_size=4, timesteps=20, beta_schedule="cosine")
    states = list(diffusion.sample_progressive(2, sampler=sampler, seed=0))
    given = SelfConditioned.seen
    assert given[0] is None
    for guess, state in zip(given[1:], states[1:], strict=False):
        torch.testing.assert_close((guess + 1) / 2, state.x_start)
    given.clear()
    diffusion(images(2, (4, 4)))
    while given[-1] is None:
        diffusion(images(2, (4, 4)))
    assert not given[-1].requires_grad
    given.clear()
    for _ in range(20):
        diffusion(images(2, (4, 4)))
    assert 20 < len(given) < 40  # about half of the losses ask twice


def test_betas_of_ones_own_set_the_timesteps():
    betas = torch.linspace(0.01, 0.3, 33)
    for given in (betas, betas.tolist(), NoiseSchedule(betas)):
        assert make(beta_schedule=given).num_timesteps == 33


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "eps"}, "unknown objective 'eps'; there are pred_noise"),
        ({"beta_schedule": "linear", "timesteps": 15}, r"'linear' with 15 timesteps has beta = .* \(0, 1\)"),
        ({"beta_schedule": [0.1, 1.5]}, "beta = 1.5 at t = 1"),
        ({"schedule_fn_kwargs": {"tau": 2}}, "'cosine' has no argument 'tau'"),
        ({"variance": "fixed"}, "unknown variance 'fixed'; there are .*beta, posterior"),
        ({"variance": "learned", "loss_type": "l2"}, "does not train a variance that is learned; take 'hybrid'"),
        ({"loss_type": "hybrid"}, "trains a variance that is learned; variance 'posterior' is not"),
        ({"variance": "learnable", "loss_weight": "vlb"}, "'learnable' is learned; for the bound itself take"),
        ({"decoder": "laplace"}, "unknown decoder 'laplace'; there are discretized, gaussian"),
        (
            {"zero_terminal_snr": True, "objective": "pred_noise"},
            "x_0 does not follow from .* at t = 19",
        ),
        ({"zero_terminal_snr": True}, "loss_weight 'l_simple' is 0 at the last timestep"),
        ({"loss_weight": "p2", "p2_k": 0.0}, "p2_k must be above 0"),
        ({"loss_weight": "p2", "p2_gamma": -1.0}, "p2_gamma must be a finite number of at least 0"),
        ({"loss_type": "mse"}, "unknown loss_type 'mse'; there are l2, l1, huber"),
        ({"loss_weight": "p3"}, "unknown loss_weight 'p3'"),
        ({"rng": "curand"}, "unknown rng 'curand'; there are philox, torch"),
        ({"sampling_timesteps": 21}, r"steps must be an integer in \[1, 21\)"),
        ({"clip_denoised": (1, -1)}, "low < high"),
        ({"ddim_sampling_eta": -1.0}, "eta must be a finite number of at least 0, got -1.0"),
        ({"ddim_sampling_eta": 9.0}, "more noise"),
        ({"ddim_sampling_eta": math.inf}, "eta must be a finite number"),
        ({"sampler": "plms"}, "unknown sampler 'plms'; there are ddpm, ddim"),
        ({"offset_noise_strength": math.nan}, "offset_noise_strength must be a finite number"),
        ({"size": 8.0}, "image_size must be an integer of at least 1, got 8.0"),
        ({"clip_denoised": None}, r"clip_denoised must be True, False or \(low, high\)"),
        ({"min_snr_loss_weight": True, "loss_weight": "vlb"}, "got loss_weight='vlb' too"),
        ({"loss_weight": "min_snr", "min_snr_gamma": -1.0}, "min_snr_gamma must be a finite number of at least 0"),
        ({"size": (0, 4)}, "image_size must be an integer of at least 1, got 0"),
        ({"channels": 0}, "channels must be an integer"),
        ({"timesteps": 10_000, "beta_schedule": "constant"}, "10000 timesteps leave abar_T = .* of the signal"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_model_without_channels_needs_them_told():
    with pytest.raises(ValueError, match="pass channels="):
        GaussianDiffusion(nn.Identity(), image_size=4)
    assert GaussianDiffusion(nn.Identity(), image_size=4, channels=5).channels == 5


def test_data_in_any_range_is_taken_without_normalisation():
    diffusion = make(auto_normalize=False, clip_denoised=False)
    diffusion(torch.randn(2, 2, 4, 6) * 30)
    for bad in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(ValueError, match="NaN or inf"):
            diffusion(torch.rand(2, 2, 4, 6).index_fill(0, torch.tensor([1]), bad))
    with pytest.raises(ValueError, match="uint8 images need auto_normalize"):
        diffusion(torch.zeros(2, 2, 4, 6, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 20]), r"\[0, 20\), counted from 0; these reach from 0 to 20"),
        (torch.tensor([-1, 3]), "reach from -1"),
        (torch.tensor([0.0, 1.0]), "int64 tensor of shape .*; got torch.float32"),
        (torch.tensor([True, False]), "got torch.bool"),
        (torch.tensor([1]), r"shape \(2,\).*got \(1,\)"),
        (3, "got int"),
    ],
)
def test_timesteps_that_cannot_be_are_refused(t, message):
    diffusion, x = make(), torch.rand(2, 2, 4, 6)
    for call in (
        lambda: diffusion(x, times=t),
        lambda: diffusion.q_sample(x, t),
        lambda: diffusion.predict_start_from_noise(x, t, x),
        lambda: diffusion.p_mean_variance(x, t),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_network_that_returns_another_shape_is_named():
    class Wide(Net):
        def forward(self, x, t):
            return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match=r"return the shape of its input, \(2, 2, 4, 4\); it returned \(2, 4, 4, 4\)"):
        GaussianDiffusion(Wide(), image_size=4)(torch.rand(2, 2, 4, 4))
