"""The same numbers as the packages this one replaces: pip install ".[compat]"."""

import warnings

import pytest
import torch
from diffusers_weights import to_ddpm_fast, unet_2d_config
from PIL import Image
from torch import nn

from ddpm_fast import GaussianDiffusion, UNet, samplers, schedules

# Their imports warn, and some of their schedules are in float32.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lucidrains():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("denoising_diffusion_pytorch", exc_type=ImportError)


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", exc_type=ImportError)


class Net(nn.Module):
    """What both take for a network."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)

    def forward(self, x, t, x_self_cond=None):
        return torch.tanh(self.conv(x) + t[:, None, None, None] / 1000)


def pair(lucidrains, **arguments):
    theirs = lucidrains.GaussianDiffusion(Net(), image_size=8, **arguments)
    ours = GaussianDiffusion(Net(), image_size=8, rng="torch", **arguments)
    return theirs, ours


def both(theirs, ours, call):
    results = []
    for diffusion in (theirs, ours):
        torch.manual_seed(5)
        results.append(call(diffusion))
    return results


CASES = [
    {},
    {"objective": "pred_noise", "beta_schedule": "linear"},
    {"objective": "pred_x0", "beta_schedule": "cosine", "timesteps": 100},
    {"objective": "pred_v", "min_snr_loss_weight": True, "timesteps": 50},
    {"objective": "pred_noise", "beta_schedule": "sigmoid", "timesteps": 50, "offset_noise_strength": 0.1},
    {"objective": "pred_x0", "timesteps": 50, "schedule_fn_kwargs": {"start": 0, "tau": 0.9}},
    {"timesteps": 60, "sampling_timesteps": 13},
    {"timesteps": 60, "sampling_timesteps": 13, "ddim_sampling_eta": 0.6, "objective": "pred_noise"},
]


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_the_default_class_is_denoising_diffusion_pytorchs(lucidrains, arguments):
    theirs, ours = pair(lucidrains, **arguments)
    their_state, our_state = theirs.state_dict(), ours.state_dict()
    assert list(their_state) != []
    assert set(their_state) == set(our_state)
    for name in their_state:
        # v_start and v_end of their sigmoid are float32: 6e-8 of a difference of about 0.9, then a ratio.
        torch.testing.assert_close(our_state[name], their_state[name], rtol=2e-4, atol=1e-6, msg=name)
    ours.load_state_dict(their_state)

    images = torch.rand(6, 3, 8, 8)
    a, b = both(theirs, ours, lambda d: d(images))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    a, b = both(theirs, ours, lambda d: d(images, loss_reduction="none", times=torch.arange(6)))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    t = torch.arange(0, 48, 8)
    a, b = both(theirs, ours, lambda d: d.q_sample(images, t))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a, b = both(theirs, ours, lambda d: d.p_mean_variance(images, t))
    torch.testing.assert_close(tuple(b), tuple(a), rtol=1e-3, atol=1e-4)
    a, b = both(theirs, ours, lambda d: tuple(d.model_predictions(images, t, clip_x_start=True)))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", CASES[2:], ids=str)
def test_the_default_sampling_draws_the_same_images(lucidrains, arguments):
    theirs, ours = pair(lucidrains, **arguments)
    ours.load_state_dict(theirs.state_dict())
    a, b = both(theirs, ours, lambda d: d.sample(batch_size=4))
    torch.testing.assert_close(b, a, rtol=0, atol=1e-3)
    a, b = both(theirs, ours, lambda d: d.sample(batch_size=4, return_all_timesteps=True))
    assert a.shape == b.shape
    assert torch.equal(a[:, 0], b[:, 0])  # the same stream, to the bit
    torch.testing.assert_close(b[:, -1], a[:, -1], rtol=0, atol=1e-3)


UNETS = {  # as published
    "ddpm-cifar10-32": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
    "ddpm-256": {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
}


@pytest.mark.parametrize(("name", "size"), [("ddpm-cifar10-32", 32), ("ddpm-256", 64)])
def test_the_presets_are_the_networks_of_diffusers(diffusers, name, size):
    config = unet_2d_config(name)
    assert config.items() >= UNETS[name].items()
    theirs = diffusers.UNet2DModel(**config).eval()
    ours = UNet.preset(name).eval()
    to_ddpm_fast(theirs, ours)
    x, t = torch.randn(2, 3, size, size), torch.tensor([3, 977])
    with torch.no_grad():
        # 60 layers, each a sum of up to 9 * 512 products in another order.
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-3, atol=5e-5)


PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("objective", PREDICTIONS)
def test_ancestral_steps_are_those_of_diffusers(diffusers, objective, variance):
    prediction = PREDICTIONS[objective]
    kind = {"posterior": "fixed_small", "beta": "fixed_large"}[variance]
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, variance_type=kind)
    ours = GaussianDiffusion(Net(), image_size=8, objective=objective, beta_schedule="linear", variance=variance)
    x = torch.randn(2, 3, 8, 8)
    for t in (999, 500, 20, 1, 0):
        pred = ours.model(x, torch.full((2,), t))
        theirs = scheduler.step(pred, t, x, generator=torch.Generator().manual_seed(3)).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        # Their 1 - abar is float32, off by 2e-4 at t = 0.
        torch.testing.assert_close(ours.p_sample(x, t, noise=z)[0], theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(diffusers, eta):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    ours = GaussianDiffusion(Net(), image_size=8, objective="pred_noise", beta_schedule="linear", rng="torch")
    x = theirs = torch.randn(2, 3, 8, 8)
    table = ours.step_table("ddim", 20, eta)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = torch.randn(x.shape, generator=generator)
            pred = ours.model(theirs, t.expand(2))
            theirs = scheduler.step(
                pred, t, theirs, eta=eta, use_clipped_model_output=True, variance_noise=noise if eta else None
            ).prev_sample
    sampled = ours.sample(2, sampler="ddim", steps=20, eta=eta, seed=torch.Generator().manual_seed(3), noise=x)
    torch.testing.assert_close(sampled, (theirs + 1) / 2, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize("steps", [20, 8, 2, 1])  # both sides of 15, where their lower_order_final ends
def test_dpm_solver_pp_steps_are_those_of_diffusers(diffusers, sampler, objective, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=PREDICTIONS[objective],
        algorithm_type={"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}[sampler],
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    ours = GaussianDiffusion(
        Net(), image_size=8, objective=objective, beta_schedule="linear", rng="torch", clip_denoised=False
    )
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    generator, states = torch.Generator().manual_seed(3), [x]
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = torch.randn(x.shape, generator=generator)
            pred = ours.model(states[-1], t.expand(2))
            states.append(scheduler.step(pred, t, states[-1], variance_noise=noise).prev_sample)
    expected = torch.stack(states, dim=1)
    given = {"steps": scheduler.timesteps.tolist(), "seed": torch.Generator().manual_seed(3), "noise": x}
    sampled = ours.sample(2, sampler=sampler, return_all_timesteps=True, **given)
    # Both in float32, theirs its coefficients too: 20 steps of a few roundings each, of the largest number there is.
    torch.testing.assert_close(2 * sampled - 1, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize("steps", [20, 8, 2, 1])
def test_unipc_steps_are_those_of_diffusers(diffusers, objective, steps):
    """At their solver_order=1, whose corrector makes it of order 2; their default of 2 needs two earlier x0_hat."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type=PREDICTIONS[objective], solver_order=1, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    ours = GaussianDiffusion(Net(), image_size=8, objective=objective, beta_schedule="linear", clip_denoised=False)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    states = [x]
    with torch.no_grad():
        for t in scheduler.timesteps:
            states.append(scheduler.step(ours.model(states[-1], t.expand(2)), t, states[-1]).prev_sample)
    expected = torch.stack(states, dim=1)
    sampled = ours.sample(2, sampler="unipc", steps=steps, spacing="trailing", noise=x, return_all_timesteps=True)
    # Both in float32, theirs its coefficients too: 20 steps of a few roundings each, of the largest number there is.
    torch.testing.assert_close(2 * sampled - 1, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize("visited", [[900, 700, 400, 150, 3], [500, 20], [10]], ids=str)
def test_heun_steps_are_those_of_diffusers(diffusers, objective, visited):
    """From s / a below 80. From above, our steps are Euler's; and they count steps where we count calls."""
    scheduler = diffusers.HeunDiscreteScheduler(
        prediction_type=PREDICTIONS[objective], beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    scheduler.set_timesteps(timesteps=visited)
    ours = GaussianDiffusion(Net(), image_size=8, objective=objective, beta_schedule="linear", clip_denoised=False)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    state = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5  # theirs is x / a
    expected = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected.append(scheduler.scale_model_input(state, t))
            state = scheduler.step(ours.model(expected[-1], t.long().expand(2)), t, state).prev_sample
    expected = torch.stack([*expected, state], dim=1)
    sampled = ours.sample(2, sampler="heun", steps=visited, noise=x, return_all_timesteps=True)
    assert sampled.shape[1] == 2 * len(visited)
    # Both in float32, theirs its coefficients too, from a schedule in float32: 1 - abar is off by 2e-4 at little noise.
    torch.testing.assert_close(2 * sampled - 1, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_spacings_are_those_of_diffusers(diffusers, spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    schedule = schedules.make("linear", 1000)
    for steps in (1, 2, 3, 7, 20, 50, 300, 333, 600, 1000):
        scheduler.set_timesteps(steps)
        assert samplers.spaced_timesteps(schedule, steps, spacing).tolist() == scheduler.timesteps.tolist()


def test_their_trainer_and_unet_take_the_class(lucidrains, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(100):
        Image.new("RGB", (20, 20), (i, 2 * i, 50)).save(tmp_path / "images" / f"{i}.png")
    model = lucidrains.Unet(dim=16, dim_mults=(1, 2))
    diffusion = GaussianDiffusion(model, image_size=16, timesteps=50, sampling_timesteps=4)
    trainer = lucidrains.Trainer(
        diffusion,
        tmp_path / "images",
        train_num_steps=2,
        save_and_sample_every=1,
        num_samples=4,
        calculate_fid=False,
        results_folder=tmp_path / "results",
    )
    trainer.train()
    trainer.load(2)
    assert (tmp_path / "results" / "sample-2.png").exists()
