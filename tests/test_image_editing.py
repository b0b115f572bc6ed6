"""Sampling that begins with given images."""

import pytest
import torch
from small_diffusion import SIZES, Net, images, make

from ddpm_fast import noise, samplers
from ddpm_fast.image_editing import _path

ROUNDING = {"rtol": 0, "atol": 20 * 2**-22}  # as of batches: the noise has the same bits, a product may round otherwise


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize(("strength", "kept"), [(1, 8), (0.6, 5), (0.5, 4), (0.01, 1)])
def test_images_to_begin_with_are_noised_to_the_last_share_of_the_timesteps(sampler, strength, kept):
    """Noise: stream 0 is added to the images, and k + 1 is that of the k-th step taken."""
    diffusion, init = make(), images(3)
    visited = samplers.spaced_timesteps(diffusion.schedule, 8, "even")[-kept:]
    steps = 8 if sampler != "heun" else 14  # calls: the first step, from s / a > 80, and the last one have one each
    table = samplers.make(sampler, diffusion.schedule, diffusion.objective, visited.tolist())
    x = diffusion.q_sample(2 * init - 1, visited[:1].expand(3), noise.gaussian(init.shape, seed=3))
    expected = diffusion.sample(3, sampler=table, noise=x, seed=3)
    how = {"sampler": sampler, "steps": steps, "spacing": "even", "strength": strength, "seed": 3}
    torch.testing.assert_close(diffusion.sample(init=init, **how), expected)
    states = diffusion.sample(init=init, return_all_timesteps=True, **how)
    assert states.shape == (3, len(table) + 1, *init.shape[1:])
    torch.testing.assert_close(states[:, 0], (x + 1) / 2)
    torch.testing.assert_close(list(diffusion.sample_progressive(init=init, **how))[-1].x, expected)


def test_the_sampler_of_an_edit_is_that_of_the_whole_run():
    """Fewer timesteps because of the strength do not change the default."""
    init = images(2)
    for diffusion, name in [(make(), "ddpm"), (make(sampling_timesteps=10), "ddim")]:
        visited = diffusion.step_table().t
        expected = samplers.make(name, diffusion.schedule, diffusion.objective, visited[len(visited) // 2 :].tolist())
        found = diffusion.sample(init=init, strength=0.5, seed=1)
        torch.testing.assert_close(found, diffusion.sample(init=init, sampler=expected, strength=1.0, seed=1))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_an_edited_image_is_the_same_in_any_batch(size):
    diffusion, init = make(size), images(4, size)
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[0] = True
    edits = {
        "init": lambda x, first: diffusion.sample(init=x, strength=0.5, seed=5, sample_offset=first),
        "encode": lambda x, first: diffusion.encode(x, steps=6),
        "inpaint": lambda x, first: diffusion.inpaint(
            x, mask, steps=10, jump=2, resample=2, seed=5, sample_offset=first
        ),
    }
    for edit in edits.values():
        whole = edit(init, 0)
        torch.testing.assert_close(edit(init[2:3], 2), whole[2:3], **ROUNDING)


def test_images_may_be_bytes():
    diffusion = make().eval()
    bytes_ = (images(3) * 255).round().byte()
    floating, mask = bytes_ / 255, torch.ones(4, 6, dtype=torch.bool).triu()
    torch.testing.assert_close(
        diffusion.sample(init=bytes_, strength=0.5, seed=1), diffusion.sample(init=floating, strength=0.5, seed=1)
    )
    torch.testing.assert_close(diffusion.encode(bytes_, steps=4), diffusion.encode(floating, steps=4))
    filled = diffusion.inpaint(bytes_, mask, steps=4, seed=1)
    torch.testing.assert_close(filled, diffusion.inpaint(floating, mask, steps=4, seed=1))
    assert torch.equal((filled * 255).round().byte()[mask.expand(filled.shape)], bytes_[mask.expand(filled.shape)])


def test_encoding_draws_nothing_and_leaves_the_mode_of_the_network():
    for rng in ("philox", "torch"):
        diffusion, before = make(rng=rng), torch.get_rng_state()
        x_T = diffusion.encode(images(3), steps=5)
        assert (x_T.shape, x_T.dtype) == ((3, 2, 4, 6), torch.float32)
        assert torch.equal(torch.get_rng_state(), before)
        assert diffusion.model.training
        assert torch.equal(x_T, diffusion.encode(images(3), steps=5))


def steps_of_repaint(t_T, jump_length, jump_n_sample):
    """The timesteps of Lugmayr et al. (2022), appendix, where a jump is single steps up."""
    jumps = dict.fromkeys(range(0, t_T - jump_length, jump_length), jump_n_sample - 1)
    t, ts = t_T, []
    while t >= 1:
        t -= 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                ts.append(t)
    return [*ts, -1]


@pytest.mark.parametrize(("steps", "jump", "resample"), [(250, 10, 10), (20, 3, 4), (7, 1, 2), (5, 10, 10), (1, 1, 5)])
def test_the_path_of_inpainting_is_the_papers(steps, jump, resample):
    path = _path(steps, jump, resample)
    single = [path[0]]
    for position in path[1:]:
        single += [position] if position < single[-1] else range(single[-1] + 1, position + 1)
    assert single == steps_of_repaint(steps, jump, resample)
    if (steps, jump, resample) == (250, 10, 10):
        assert len(single) - 1 == 4570  # as published


@pytest.mark.parametrize("sampler", [None, "ddim"])
def test_known_pixels_are_kept_exactly_and_unknown_ones_do_not_matter(sampler):
    diffusion, given = make(), images(3)
    mask = torch.rand(3, 1, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    how = {"sampler": sampler, "steps": 8, "jump": 3, "resample": 2, "seed": 4}
    filled = diffusion.inpaint(given, mask, **how)
    everywhere = mask.expand(given.shape)
    assert torch.equal(filled[everywhere], given[everywhere])
    assert not torch.isclose(filled, given)[~everywhere].all()
    assert torch.equal(filled, diffusion.inpaint(torch.where(mask, given, 0.5), mask, **how))
    assert torch.equal(diffusion.inpaint(given, torch.tensor(True), **how), given)


class WithVariance(Net):
    """Predicts v of the variance too."""

    def forward(self, x, t):
        return torch.cat([super().forward(x, t), x.tanh()], dim=1)


@pytest.mark.parametrize("variance", ["posterior", "learned_range"])
def test_inpainting_with_nothing_known_and_no_jumps_is_sampling(variance):
    diffusion = make(variance=variance)
    if variance == "learned_range":
        diffusion.model = WithVariance()
    nothing = torch.zeros(3, 2, 4, 6, dtype=torch.bool)
    filled = diffusion.inpaint(images(3), nothing, resample=1, seed=4)
    assert torch.equal(filled, diffusion.sample(3, sampler="ddpm", seed=4))


def test_known_pixels_and_jumps_by_hand():
    """The noise of the i-th move is stream INPAINTING + i, and that of the k-th step stream k + 1."""
    diffusion, given = make().eval(), images(3)
    mask = torch.rand(3, 2, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    table, x_start = diffusion.step_table("ddpm", 4), 2 * given - 1
    abar = diffusion.schedule.alphas_cumprod[table.t]
    x, k = noise.gaussian(given.shape, seed=4), 0
    # Rows 0, 1, 2 down to the last timestep, 2 up, rows 1 and 2 again, and the last.
    for i, row in enumerate([0, 1, 2, "up", 1, 2, 3]):
        z = noise.gaussian(given.shape, seed=4, stream=noise.INPAINTING + i)
        if row == "up":
            alpha = (abar[1] / abar[3]).item()
            x = alpha**0.5 * x + (1 - alpha) ** 0.5 * z
            continue
        u, w, A, B, _, sigma = table.rows[row].float()
        with torch.no_grad():
            guess = (u * x + w * diffusion.model(x, table.t[row].expand(3))).clamp(-1, 1)
        k += 1
        x = A * x + B * guess + sigma * noise.gaussian(given.shape, seed=4, stream=k)
        if row < 3:
            x = torch.where(mask, abar[row + 1].sqrt().float() * x_start + (1 - abar[row + 1]).sqrt().float() * z, x)
    expected = torch.where(mask, given, (x + 1) / 2)
    torch.testing.assert_close(diffusion.inpaint(given, mask, steps=4, jump=2, resample=2, seed=4), expected)


def test_a_subclass_method_is_called_in_every_edit():
    class Counting(type(make())):
        calls = 0

        def model_predictions(self, *args, **kwargs):
            self.calls += 1
            return super().model_predictions(*args, **kwargs)

    plain = make()
    counting = Counting(plain.model, image_size=(4, 6), timesteps=20, beta_schedule="cosine")
    given, mask = images(2), torch.ones(4, 6, dtype=torch.bool).triu()
    for edit in (
        lambda d: d.sample(init=given, strength=0.5, steps=8, seed=1),
        lambda d: d.encode(given, steps=4),
        lambda d: d.inpaint(given, mask, steps=4, jump=1, resample=2, seed=1),
    ):
        counting.calls = 0
        torch.testing.assert_close(edit(counting), edit(plain), rtol=1e-4, atol=2e-5)
        assert counting.calls >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": images(3)}, "init .* and strength .* need each other"),
        ({"strength": 0.5}, "init .* and strength .* need each other"),
        ({"init": images(3), "strength": 0}, "above 0 and up to 1; got 0"),
        ({"init": images(3), "strength": 1.5}, "above 0 and up to 1; got 1.5"),
        ({"init": images(3), "strength": float("nan")}, "above 0 and up to 1; got nan"),
        ({"init": images(3) * 255, "strength": 0.5}, "Divide by 255"),
        ({"init": images(3)[:, :1], "strength": 0.5}, r"must have the shape \(N, 2, 4, 6\)"),
        ({"init": images(3), "strength": 0.5, "batch_size": 4}, "batch_size is that of init, 3"),
        (
            {"init": images(3), "strength": 0.5, "sampler": samplers.ddim(make().schedule, "pred_v", 8)},
            "a StepTable is taken as a whole",
        ),
    ],
)
def test_what_an_edit_cannot_begin_with_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().sample(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(4, 6)}, "mask must be a bool tensor, True where a pixel is known; got torch.float32"),
        ({"mask": torch.ones(3, 3, 4, 6, dtype=torch.bool)}, r"must broadcast .* \(3, 2, 4, 6\); got \(3, 3, 4, 6\)"),
        ({"sampler": "dpmpp_2m"}, "no earlier x0_hat is of use: it takes ddpm, ddim .*; got 'dpmpp_2m'"),
        ({"jump": 0}, "jump must be an integer of at least 1"),
        ({"resample": 0}, "resample must be an integer of at least 1"),
        ({"images": images(3) - 5}, r"must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_inpainted_is_refused(arguments, message):
    given = {"images": images(3), "mask": torch.ones(4, 6, dtype=torch.bool), "steps": 5} | arguments
    with pytest.raises(ValueError, match=message):
        make().inpaint(**given)
