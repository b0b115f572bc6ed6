import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast import GaussianDiffusion, noise
from ddpm_fast.parameterization import OBJECTIVES, loss_weight
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.schedules import NoiseSchedule


class Net(nn.Module):
    """A network of any rank that mixes channels and looks at t."""

    def __init__(self, channels=2):
        super().__init__()
        self.channels = channels
        self.mix = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)

    def forward(self, x, t):
        y = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        return self.dropout(torch.tanh(y)) + t.view(-1, *[1] * (x.ndim - 1)).to(y.dtype) / 1000


SIZES = {"images": (4, 6), "sequences": (9,), "vectors": ()}


def make(size=(4, 6), **arguments):
    return GaussianDiffusion(Net(), **({"image_size": size, "timesteps": 20, "beta_schedule": "cosine"} | arguments))


def images(n=5, size=(4, 6)):
    return noise.gaussian((n, 2, *size), seed=99).sigmoid()


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


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(size, sampler):
    diffusion = make(size)
    whole = diffusion.sample(8, sampler=sampler, eta=0.7 if sampler == "ddim" else None, seed=5)
    for first, n in [(0, 1), (3, 1), (2, 4)]:
        part = diffusion.sample(n, sampler=sampler, eta=0.7 if sampler == "ddim" else None, seed=5, sample_offset=first)
        # The noise has the same bits; a matrix product may round otherwise in another batch.
        torch.testing.assert_close(part, whole[first : first + n], rtol=0, atol=20 * 2**-22)
    assert not torch.allclose(whole, diffusion.sample(8, sampler=sampler, seed=6))


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


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_mean_plus_deviation_times_noise(objective, variance):
    diffusion = make(objective=objective, variance=variance).eval()
    x, z = noise.gaussian((3, 2, 4, 6), seed=1), noise.gaussian((3, 2, 4, 6), seed=2)
    for t in (19, 7, 1, 0):
        mean, var, log_var, x_start = diffusion.p_mean_variance(x, torch.full((3,), t))
        stepped, found = diffusion.p_sample(x, t, noise=z)
        torch.testing.assert_close(found, x_start)
        torch.testing.assert_close(stepped, mean + (var.sqrt() * z if t else 0), rtol=1e-5, atol=1e-5)
        if t:
            torch.testing.assert_close(log_var, var.log())


def test_the_loop_is_its_steps():
    """Streams: 0 is x_T, k + 1 the noise of the k-th step taken."""
    diffusion = make()
    diffusion.eval()
    x = noise.gaussian((3, 2, 4, 6), seed=8)
    states = [x]
    for t in reversed(range(20)):
        x, _ = diffusion.p_sample(x, t, seed=8)
        states.append(x)
    expected = (torch.stack(states, dim=1) + 1) / 2
    torch.testing.assert_close(diffusion.sample(3, seed=8, return_all_timesteps=True), expected)
    torch.testing.assert_close(diffusion.p_sample_loop((3, 2, 4, 6), seed=8), expected[:, -1])


def test_progressive_sampling_yields_every_kth_state():
    diffusion = make()
    whole = diffusion.sample(3, seed=8, return_all_timesteps=True)
    assert whole.shape == (3, 21, 2, 4, 6)
    states = list(diffusion.sample_progressive(3, every=6, seed=8))
    assert [s.step for s in states] == [0, 6, 12, 18, 20]
    assert [s.t for s in states] == [19, 13, 7, 1, -1]
    for state in states:
        torch.testing.assert_close(state.x, whole[:, state.step])
    assert states[0].x_start is None
    torch.testing.assert_close(states[-1].x_start, states[-1].x)
    for sampler in ("ddpm", "dpmpp_2m", "dpmpp_2m_sde"):
        with pytest.raises(ValueError, match=f"sampler '{sampler}' has no argument 'eta'; it takes"):
            diffusion.sample(3, sampler=sampler, steps=5, eta=0.5)
    with pytest.raises(ValueError, match="every"):
        diffusion.sample_progressive(3, every=0)  # at once, not at the first state
    with pytest.raises(ValueError, match="unknown sampler 'plms'; there are ddpm, ddim"):
        diffusion.sample_progressive(3, sampler="plms")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multistep_samplers_are_given_the_guess_before(sampler, dtype):
    """C x0_prev, the clipped x0_hat; all states and guesses are those of the steps one by one."""
    diffusion = make().eval().to(dtype)
    table = diffusion.step_table(sampler, 6)
    x = noise.gaussian((3, 2, 4, 6), seed=4)
    x_start, expected, guesses = torch.zeros_like(x), [x], []
    for k in range(6):
        u, w, A, B, C, sigma = table.rows[k].float()
        with torch.no_grad():
            pred = diffusion.model(x.to(dtype), table.t[k].expand(3))
        guess = (u * x + w * pred).clamp(-1, 1)
        x = A * x + B * guess + C * x_start + sigma * noise.gaussian(x.shape, seed=4, stream=k + 1)
        x_start = guess
        expected.append(x)
        guesses.append(guess)
    states = list(diffusion.sample_progressive(3, sampler=sampler, steps=6, seed=4))
    # In bfloat16, x rounds to the network's input: 2^-8 where the last bits of x differ.
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-2}
    torch.testing.assert_close(torch.stack([s.x for s in states]), (torch.stack(expected) + 1) / 2, **close)
    torch.testing.assert_close(torch.stack([s.x_start for s in states[1:]]), (torch.stack(guesses) + 1) / 2, **close)
    whole = diffusion.sample(3, sampler=sampler, steps=6, seed=4, return_all_timesteps=True)
    torch.testing.assert_close(whole, torch.stack([s.x for s in states], dim=1), rtol=0, atol=0)


def test_the_sampler_follows_from_the_steps_where_none_is_named():
    """sampling_timesteps means DDIM, as in denoising_diffusion_pytorch; fewer `steps` mean DPM-Solver++(2M)."""

    def same(diffusion, chosen, **named):
        return torch.equal(diffusion.step_table(**chosen).rows, diffusion.step_table(**named).rows)

    diffusion, strided = make(), make(sampling_timesteps=5, ddim_sampling_eta=0.5)
    assert same(diffusion, {}, sampler="ddpm", steps=20)
    assert same(strided, {}, sampler="ddim", steps=5, eta=0.5)
    assert same(strided, {"eta": 1.0}, sampler="ddim", steps=5, eta=1.0)
    for module in (diffusion, strided):
        assert same(module, {"steps": 20}, sampler="ddpm", steps=20)
        for steps in (1, 2, 7, 19, [2, 9, 4]):
            assert same(module, {"steps": steps}, sampler="dpmpp_2m", steps=steps)
            assert same(module, {"steps": steps, "eta": 0.0}, sampler="ddim", steps=steps, eta=0.0)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_multistep_samplers_take_any_number_of_steps(sampler, steps, rng):
    samples = make(rng=rng).sample(3, sampler=sampler, steps=steps, return_all_timesteps=True)
    assert samples.shape == (3, steps + 1, 2, 4, 6)
    assert samples.isfinite().all()
    assert 0 <= samples[:, -1].min() <= samples[:, -1].max() <= 1


def test_torch_noise_is_drawn_for_every_step_but_the_last():
    """Even where sigma is 0: whoever draws after a run finds the generator where other packages leave it."""
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    make(rng="torch").sample(3, sampler="ddim", steps=5, eta=0.0, seed=ours)
    for _ in range(5):
        torch.randn(3, 2, 4, 6, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_strided_and_chosen_timesteps():
    diffusion = make(sampling_timesteps=5)
    assert diffusion.is_ddim_sampling
    assert diffusion.step_table().t.tolist() == [19, 15, 11, 7, 3]
    assert diffusion.step_table(steps=[2, 9]).t.tolist() == [9, 2]
    a = diffusion.ddim_sample((3, 2, 4, 6), seed=8)
    torch.testing.assert_close(a, diffusion.sample(3, sampler="ddim", steps=5, eta=0.0, seed=8))
    assert not torch.allclose(a, diffusion.sample(3, sampler="ddpm", steps=5, seed=8))
    whole = diffusion.sample(3, sampler="ddpm", steps=20, seed=8)
    torch.testing.assert_close(diffusion.p_sample_loop((3, 2, 4, 6), seed=8), whole)
    assert len(diffusion.step_table("ddpm", steps=20)) == 20


def test_predictions_follow_the_clipped_x0_hat_where_asked():
    diffusion = make(objective="pred_noise").eval()
    x, t = 3 * noise.gaussian((4, 2, 4, 6), seed=1), torch.tensor([19, 12, 5, 1])
    raw = diffusion.model_predictions(x, t)
    assert torch.equal(raw.pred_noise, diffusion.model(x, t))
    torch.testing.assert_close(raw.pred_x_start, diffusion.predict_start_from_noise(x, t, raw.pred_noise))
    clipped = diffusion.model_predictions(x, t, clip_x_start=True)
    assert torch.equal(clipped.pred_x_start, raw.pred_x_start.clamp(-1, 1))
    assert torch.equal(clipped.pred_noise, raw.pred_noise)
    derived = diffusion.model_predictions(x, t, clip_x_start=True, rederive_pred_noise=True)
    expected = diffusion.predict_noise_from_start(x, t, clipped.pred_x_start)
    torch.testing.assert_close(derived.pred_noise, expected)
    assert not torch.allclose(derived.pred_noise, raw.pred_noise)


def test_clipping_may_be_said_for_one_call():
    diffusion = make(objective="pred_noise").eval()
    x, t = 3 * noise.gaussian((4, 2, 4, 6), seed=1), torch.tensor([19, 12, 5, 0])
    raw = diffusion.model_predictions(x, t).pred_x_start
    for bounds, expected in {None: raw.clamp(-1, 1), False: raw, (-0.5, 0.2): raw.clamp(-0.5, 0.2)}.items():
        mean, _, log_var, x_start = diffusion.p_mean_variance(x, t, clip_denoised=bounds)
        torch.testing.assert_close(x_start, expected)
        torch.testing.assert_close(mean, diffusion.q_posterior(expected, x, t)[0])
        assert log_var.flatten()[3].item() == pytest.approx(math.log(1e-20))


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
        torch.testing.assert_close(vlb, loss_weight(schedule, objective, "vlb", variance_kind="beta").float())


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
    with pytest.raises(ValueError, match=r"x_T and must have the shape \(3, 2, 4, 6\); got \(2, 2, 4, 6\)"):
        diffusion.sample(3, noise=x_T[:2])


def test_seeds_generators_and_the_default_generator():
    for rng in ("philox", "torch"):
        diffusion = make(rng=rng)
        assert torch.equal(diffusion.sample(2, seed=4), diffusion.sample(2, seed=4))
        a = diffusion.sample(2, seed=torch.Generator().manual_seed(1))
        assert torch.equal(a, diffusion.sample(2, seed=torch.Generator().manual_seed(1)))
        torch.manual_seed(0)
        b = diffusion.sample(2)
        assert not torch.equal(b, diffusion.sample(2))
        torch.manual_seed(0)
        assert torch.equal(b, diffusion.sample(2))


def test_given_noise_leaves_the_generator_alone():
    diffusion, x = make().eval(), images(3)
    before = torch.get_rng_state()
    diffusion(x, torch.randn(x.shape, generator=torch.Generator()), times=torch.arange(3))
    diffusion.sample(3, sampler="ddim", noise=torch.zeros(3, 2, 4, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_switches_dropout_off_and_back_on():
    diffusion = make()
    diffusion.model.mix.eval()
    assert torch.equal(diffusion.sample(2, seed=1), diffusion.sample(2, seed=1))
    assert diffusion.model.training
    assert diffusion.model.dropout.training
    assert not diffusion.model.mix.training


@pytest.mark.parametrize("bounds", [True, False, (-0.2, 0.3)])
def test_clipping_bounds_x0_hat(bounds):
    diffusion = make(clip_denoised=bounds, auto_normalize=False)
    with torch.no_grad():
        diffusion.model.mix.weight.mul_(20)
    low, high = diffusion.sample(64, seed=0).aminmax()
    if bounds is False:
        assert high > 1
    else:
        expected = (-1, 1) if bounds is True else bounds
        assert (low.item(), high.item()) == pytest.approx(expected, abs=1e-6)


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


def test_runs_side_by_side_do_not_wake_each_others_dropout():
    diffusion = make()
    expected = diffusion.sample(3, seed=2)
    a, b = (diffusion.sample_progressive(3, seed=seed) for seed in (1, 2))
    next(a), next(b)
    assert diffusion.model.training  # also while a run is held
    list(a)
    assert torch.equal(list(b)[-1].x, expected)


def test_the_loss_compiles_into_a_full_graph():
    diffusion, x, t = make().eval(), images(), torch.arange(5)
    compiled = torch.compile(diffusion, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, times=t, seed=3), diffusion(x, times=t, seed=3))


def test_numpys_numbers_are_numbers():
    n = np.int64
    diffusion = GaussianDiffusion(Net(), image_size=n(4), timesteps=n(20), beta_schedule="cosine")
    a = diffusion.sample(n(2), seed=n(3), steps=n(5), sample_offset=n(1))
    assert torch.equal(a, diffusion.sample(2, seed=3, steps=5, sample_offset=1))
    for bad in (1.5, "7", torch.tensor(0.5), True):
        for rng in ("philox", "torch"):
            with pytest.raises(ValueError, match="seed must be an integer"):
                make(rng=rng).sample(2, seed=bad)


def test_interpolation_begins_with_noise_of_its_timestep():
    diffusion = make().eval()
    x1, x2 = images(3) * 2 - 1, images(3).flip(0) * 2 - 1
    t = 5
    eps = [noise.gaussian(x1.shape, seed=3, stream=stream) for stream in (0, noise.SECOND_IMAGE)]
    times = torch.full((3,), t)
    x = 0.75 * diffusion.q_sample(x1, times, eps[0]) + 0.25 * diffusion.q_sample(x2, times, eps[1])
    for i in reversed(range(t + 1)):
        x, _ = diffusion.p_sample(x, i, seed=3)
    torch.testing.assert_close(diffusion.interpolate(x1, x2, t=t, lam=0.25, seed=3), x)
    assert diffusion.interpolate(x1, x2).shape == x1.shape


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
        ({"variance": "learned"}, "unknown variance 'learned'; there are beta, posterior"),
        ({"loss_type": "mse"}, "unknown loss_type 'mse'; there are l2, l1, huber"),
        ({"loss_weight": "p2"}, "unknown loss_weight 'p2'"),
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


@pytest.mark.parametrize("t", [20, -1, 1.0, True])
def test_a_step_at_a_timestep_that_cannot_be_is_refused(t):
    with pytest.raises(ValueError, match=r"integer in \[0, 20\)"):
        make().p_sample(torch.rand(2, 2, 4, 6), t)


def test_a_network_that_returns_another_shape_is_named():
    class Wide(Net):
        def forward(self, x, t):
            return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match=r"return the shape of its input, \(2, 2, 4, 4\); it returned \(2, 4, 4, 4\)"):
        GaussianDiffusion(Wide(), image_size=4)(torch.rand(2, 2, 4, 4))
