import pytest
import torch
from small_diffusion import images, make
from torch import nn

from ddpm_fast import noise
from ddpm_fast.loss_weights import loss_weight
from ddpm_fast.parameterization import OBJECTIVES


def test_training_noise_of_an_image_does_not_depend_on_its_batch():
    diffusion, x, t = make(), images(6), torch.arange(6)
    diffusion.eval()
    whole = diffusion(x, times=t, seed=3, loss_reduction="none")
    parts = [diffusion(x[i : i + 1], times=t[i : i + 1], seed=3, sample_offset=i) for i in range(6)]
    torch.testing.assert_close(whole, torch.stack(parts))


def test_loss_is_the_weighted_mean_square_by_the_papers_formula():
    for objective in OBJECTIVES:
        diffusion = make(objective=objective, loss_weight=torch.arange(20.0)).eval()
        x, t = images(6), torch.tensor([0, 3, 7, 11, 19, 19])
        eps = noise.gaussian(x.shape, seed=3)
        x0, extract = x * 2 - 1, lambda name: getattr(diffusion, name)[t][:, None, None, None]  # noqa: B023
        x_t = extract("sqrt_alphas_cumprod") * x0 + extract("sqrt_one_minus_alphas_cumprod") * eps
        target = {
            "pred_noise": eps,
            "pred_x0": x0,
            "pred_v": diffusion.predict_v(x0, t, eps),
            "pred_mean": diffusion.q_posterior(x0, x_t, t)[0],
        }[objective]
        error = diffusion.model(x_t, t) - target
        for loss_type, penalty in {
            "l2": error**2,
            "l1": error.abs(),
            "huber": torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5),
        }.items():
            diffusion.loss_type = loss_type
            expected = penalty.mean(dim=(1, 2, 3)) * t
            torch.testing.assert_close(diffusion(x, times=t, seed=3, loss_reduction="none"), expected)
            torch.testing.assert_close(diffusion(x, times=t, seed=3), expected.mean())
            torch.testing.assert_close(diffusion(x, eps, times=t), expected.mean())


def test_half_precision_images_are_noised_in_float32():
    """In bfloat16, x_t would hold 8 bits of what the first timesteps add."""
    diffusion = make(objective="pred_noise").eval()
    seen = []
    diffusion.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x, t = images().bfloat16(), torch.arange(5)
    for img in (x, x.float()):
        diffusion(img, times=t, seed=1)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])


def test_uint8_images_are_the_same_images():
    diffusion = make().eval()
    pixels = (images() * 255).to(torch.uint8)
    t = torch.arange(5)
    torch.testing.assert_close(diffusion(pixels, times=t, seed=1), diffusion(pixels / 255, times=t, seed=1))


def test_offset_noise_is_one_number_a_channel_from_its_own_stream():
    diffusion = make(offset_noise_strength=0.3).eval()
    x, t = images(), torch.arange(5)
    eps = noise.gaussian(x.shape, seed=3)
    offset = noise.gaussian(x.shape[:2], seed=3, stream=noise.OFFSET)[:, :, None, None]
    torch.testing.assert_close(diffusion(x, times=t, seed=3), diffusion(x, eps + 0.3 * offset, 0.0, times=t))
    assert min(noise.OFFSET, noise.SECOND_IMAGE) > 10**6  # no step of any run


def test_images_reach_the_network_channels_last():
    diffusion = make()
    seen = []
    diffusion.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    diffusion(images().contiguous())
    diffusion.sample(2, steps=2)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_weights_use_the_arguments_given():
    schedule = make().schedule
    for objective in OBJECTIVES:
        given = {"loss_weight": "min_snr", "min_snr_gamma": 2.0}, {"min_snr_loss_weight": True, "min_snr_gamma": 2.0}
        expected = loss_weight(schedule, objective, "snr") * (2.0 / schedule.snr).clamp(max=1)
        for arguments in given:
            torch.testing.assert_close(make(objective=objective, **arguments).loss_weight, expected.float())
        vlb = make(objective=objective, variance="beta", loss_weight="vlb").loss_weight
        torch.testing.assert_close(vlb, loss_weight(schedule, objective, "vlb", variance="beta").float())


def test_noise_may_be_given_and_is_not_changed():
    diffusion = make(offset_noise_strength=0.1).eval()
    with pytest.raises(ValueError, match="integer of at least 1, got 0"):
        diffusion.sample(0)
    x_T = torch.randn(3, 2, 4, 6)
    before = x_T.clone()
    a = diffusion.sample(3, sampler="ddim", noise=x_T)
    assert torch.equal(a, diffusion.sample(3, sampler="ddim", noise=x_T, seed=77))
    diffusion(images(3), x_T)
    assert torch.equal(x_T, before)
    with pytest.raises(ValueError, match=r"noise must have the shape of x_T, \(3, 2, 4, 6\); got \(2, 2, 4, 6\)"):
        diffusion.sample(3, noise=x_T[:2])


def test_the_loss_compiles_into_a_full_graph():
    diffusion, x, t = make().eval(), images(), torch.arange(5)
    compiled = torch.compile(diffusion, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, times=t, seed=3), diffusion(x, times=t, seed=3))


def test_immiscible_noise_is_permuted_in_input_and_target():
    diffusion = make(immiscible=True, objective="pred_noise").eval()
    seen = {}

    class Spy(nn.Module):
        def forward(self, x, t):
            seen["x"] = x
            return torch.zeros_like(x)

    diffusion.model = Spy()
    x, t = images(6), torch.full((6,), 10)
    loss = diffusion(x, times=t, seed=3, loss_reduction="none")
    eps = diffusion.predict_noise_from_start(seen["x"], t, x * 2 - 1)  # that of the input
    torch.testing.assert_close(loss, eps.square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    drawn = noise.gaussian(x.shape, seed=3)
    matches = torch.cdist(eps.flatten(1), drawn.flatten(1)).min(dim=1)
    assert (matches.values < 1e-2).all()
    assert sorted(matches.indices.tolist()) == list(range(6))
    before = (x * 2 - 1 - drawn).flatten(1).norm(dim=1).sum()
    assert (x * 2 - 1 - eps).flatten(1).norm(dim=1).sum() <= before


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(2, 2, 4, 6) * 255, r"lie in \[0, 1\]; these reach from .* Divide by 255"),
        (torch.rand(2, 2, 4, 6) * 2 - 1, r"Map \[-1, 1\] to \[0, 1\], or set auto_normalize=False"),
        (torch.full((2, 2, 4, 6), 1.01), r"reach from 1.01 to 1.01"),
        (torch.full((2, 2, 4, 6), -0.01), r"reach from -0.01 to -0.01"),
        (torch.rand(2, 2, 4, 6).index_fill(0, torch.tensor([1]), torch.nan), "hold NaN"),
        (torch.rand(2, 3, 4, 6), r"shape \(N, 2, 4, 6\), channels first; got \(2, 3, 4, 6\)"),
        (torch.rand(2, 4, 6, 2), r"got \(2, 4, 6, 2\)"),
        (torch.rand(2, 2, 6, 4), r"got \(2, 2, 6, 4\)"),
        (torch.rand(2, 4, 6), r"got \(2, 4, 6\)"),
        (torch.rand(0, 2, 4, 6), "empty"),
        (torch.ones(2, 2, 4, 6, dtype=torch.int64), "uint8 in .*; got torch.int64"),
    ],
)
def test_images_that_cannot_be_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        make()(batch)


def test_integers_are_refused_where_only_the_network_s_range_goes():
    diffusion, x, t = make(), torch.zeros(2, 2, 4, 6, dtype=torch.int64), torch.tensor([1, 2])
    for call in (
        lambda: diffusion.q_sample(x, t),
        lambda: diffusion.p_losses(x, t),
        lambda: diffusion.interpolate(x, x),
    ):
        with pytest.raises(ValueError, match=r"must be floating, .* \[-1, 1\]; got torch.int64"):
            call()


def test_bytes_are_the_images_that_they_hold():
    diffusion, t = make().eval(), torch.tensor([1, 2])
    x = torch.randint(256, (2, 2, 4, 6), dtype=torch.uint8)
    for method in (diffusion.q_sample, diffusion.p_losses):
        assert torch.equal(method(x, t, seed=3), method(diffusion.normalize(x), t, seed=3))


@pytest.mark.parametrize("n", [4, 5, 12])
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "kl", "hybrid"])
def test_the_shares_of_the_samples_are_their_mean_bit_for_bit(n, loss_type):
    """And so is their gradient, for a number of samples that is no power of 2, too."""
    variance = "learnable" if loss_type == "hybrid" else "posterior"
    diffusion, found = make(loss_type=loss_type, variance=variance).eval(), []
    x, t = images(n), torch.arange(n)
    for reduction in ("mean", "share"):
        loss = diffusion(x, times=t, seed=3, loss_reduction=reduction).sum()
        found.append([loss, *torch.autograd.grad(loss, [*diffusion.model.parameters()])])
    assert all(map(torch.equal, *found))
    shares, losses = (diffusion(x, times=t, seed=3, loss_reduction=r) for r in ("share", "none"))
    torch.testing.assert_close(shares * n, losses)
