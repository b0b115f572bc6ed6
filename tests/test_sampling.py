import math

import pytest
import torch
from small_diffusion import SIZES, images, make

from ddpm_fast import noise
from ddpm_fast.parameterization import OBJECTIVES
from ddpm_fast.samplers import SAMPLERS


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


def test_runs_side_by_side_do_not_wake_each_others_dropout():
    diffusion = make()
    expected = diffusion.sample(3, seed=2)
    a, b = (diffusion.sample_progressive(3, seed=seed) for seed in (1, 2))
    next(a), next(b)
    assert diffusion.model.training  # also while a run is held
    list(a)
    assert torch.equal(list(b)[-1].x, expected)


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


@pytest.mark.parametrize("t", [20, -1, 1.0, True])
def test_a_step_at_a_timestep_that_cannot_be_is_refused(t):
    with pytest.raises(ValueError, match=r"integer in \[0, 20\)"):
        make().p_sample(torch.rand(2, 2, 4, 6), t)
