"""The loss at each timestep: what is summed, when stretches become one, and what is shown."""

import json

import pytest
import torch
from PIL import Image
from training_runs import assert_same_weights, small, without_curve  # noqa: F401  (fixture)

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import derive_seed
from ddpm_fast.training import checkpoint, data, files, plots, progress, trainer
from ddpm_fast.training.config import build_diffusion
from ddpm_fast.training.timestep_losses import STRETCHES, TimestepLosses, stretch_length


def taken(steps, timesteps=5, n=7):
    """The losses after some steps, and all samples as (step, t, loss)."""
    found, samples = TimestepLosses(timesteps), []
    for step in range(steps):
        torch.manual_seed(step)
        t, losses = torch.randint(0, timesteps, (n,)), torch.rand(n)
        found.begin(step)
        found.add(t, losses)
        samples += zip([step] * n, t.tolist(), losses.tolist(), strict=True)
    return found, samples


def test_a_stretch_is_the_smallest_power_of_two():
    for steps in range(1, 1000):
        length = stretch_length(steps)
        assert length & (length - 1) == 0
        assert steps <= STRETCHES * length
        assert length == 1 or steps > STRETCHES * length // 2


@pytest.mark.parametrize("steps", [1, 5, 64, 65, 130, 300])
def test_sums_are_those_of_the_samples_of_a_stretch(steps):
    found, samples = taken(steps)
    length = stretch_length(steps)
    sums, counts = torch.zeros(STRETCHES, 5, dtype=torch.float64), torch.zeros(STRETCHES, 5, dtype=torch.int64)
    for step, t, loss in samples:
        sums[step // length, t] += loss
        counts[step // length, t] += 1
    assert torch.equal(found.counts, counts)
    error = counts.clamp(min=1) * torch.finfo(torch.float32).eps * sums  # a rounding for each addition
    assert ((found.sums.double() - sums).abs() <= error).all()
    shown, means = found.image(steps)
    assert shown == length
    rows = -(-steps // length)
    torch.testing.assert_close(means, (sums / counts)[:rows], rtol=1e-5, atol=0, equal_nan=True)
    late = [(t, loss) for step, t, loss in samples if step // length >= rows * 3 // 4]
    for t, mean in found.curve(steps):
        of_t = [loss for at, loss in late if at == t]
        assert mean == pytest.approx(sum(of_t) / len(of_t), rel=1e-5)


def test_more_timesteps_than_are_shown_share_bins():
    found = TimestepLosses(250)
    found.begin(0)
    t = torch.arange(250)
    found.add(t, t.float())
    curve = found.curve(1)
    assert len(curve) == 100
    assert all(mean == at for at, mean in curve)  # the mean timestep of a bin
    assert found.image(1)[1].shape == (1, 100)
    assert TimestepLosses(250).curve(0) == []


def test_losses_that_are_not_finite_are_left_out():
    found = TimestepLosses(3)
    found.begin(0)
    found.add(torch.tensor([0, 0, 1]), torch.tensor([1.0, torch.nan, torch.inf]))
    assert found.curve(1) == [(0.0, 1.0)]
    assert found.counts[0].tolist() == [1, 0, 0]


# In runs


@pytest.mark.parametrize("changes", [{"training__batch_size": 6}, {"training__batch_size": 5, "data__flip": False}])
def test_a_run_has_the_losses_that_the_diffusion_gives_by_itself(tmp_path, changes):
    """With uniform timesteps, bit for bit: weights of 1 and sums of shares change nothing."""
    config = small(**changes, training__precision="fp32", training__steps=4, training__grad_clip=None)
    c = config.training
    result = trainer.train(config, tmp_path / "run")
    torch.manual_seed(config.seed)
    diffusion, digits = build_diffusion(config).train(), data.open_data(config.data)
    optimizer = torch.optim.AdamW(diffusion.model.parameters(), lr=c.lr, weight_decay=0.0, fused=True)
    order = data.ShuffledBatches(len(digits), c.batch_size, seed=config.seed, first_step=0, last_step=4)
    losses = []
    for step, indices in enumerate(order):
        torch.manual_seed(derive_seed(config.seed, trainer.STEP, step))
        images = digits[indices]
        if config.data.flip:
            chosen = torch.rand(len(images)) < 0.5
            images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
        loss = diffusion(images, seed=derive_seed(config.seed, trainer.NOISE), sample_offset=step * c.batch_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [loss for _, loss in result.metrics["history"]] == losses
    saved = torch.load(checkpoint.latest(tmp_path / "run") / "optimizer.pt", weights_only=True)["state"]
    for found, p in zip(saved.values(), diffusion.model.parameters(), strict=True):
        assert torch.equal(found["exp_avg"], optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("sampling", ["uniform", "loss_second_moment"])
@pytest.mark.parametrize("stop", [3, 8, 70])
def test_a_resumed_run_knows_what_the_uninterrupted_one_knows(tmp_path, monkeypatch, sampling, stop):
    monkeypatch.setattr(progress, "LOSS_POINTS", 1000)  # windows of one step, whatever the number of steps
    changes = {"training__timestep_sampling": sampling, "training__sample_every": 1000, "training__save_every": 100}
    changes |= {
        "diffusion__timesteps": 4,
        "diffusion__schedule_fn_kwargs": {},
        "training__steps": 74 if stop == 70 else 12,
    }
    whole = trainer.train(small(**changes), tmp_path / "whole")
    trainer.train(small(**changes | {"training__steps": stop}), tmp_path / "run")
    resumed = trainer.train(small(**changes), tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    for key in ("history", "loss_by_timestep", "skipped_steps"):
        assert resumed.metrics[key] == whole.metrics[key]
    one, other = (checkpoint.latest(tmp_path / name) / "timesteps.safetensors" for name in ("whole", "run"))
    assert one.read_bytes() == other.read_bytes()


def test_timesteps_with_larger_losses_are_taken_more_often_once_they_are_known(tmp_path, monkeypatch):
    seen, forward = [], GaussianDiffusion.forward

    def spy(self, images, **arguments):
        seen.append(arguments["times"])
        t = arguments["times"]
        return forward(self, images, **arguments) * torch.where(t == 2, 100.0, 1.0)

    monkeypatch.setattr(GaussianDiffusion, "forward", spy)
    changes = {"training__timestep_sampling": "loss_second_moment", "diffusion__timesteps": 4}
    config = small(**changes, training__batch_size=32, training__sample_every=1000, training__lr=1e-9)
    trainer.train(config, tmp_path / "run")
    shares = [(t == 2).float().mean().item() for t in seen]
    assert sum(shares[:2]) / 2 < 0.5
    assert sum(shares[4:]) / 8 > 0.9  # 100 of 103, if the losses are alike otherwise


def test_checkpoints_of_the_format_before_go_on_without_sums(tmp_path):
    config = small(training__steps=4)
    trainer.train(config, tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run")
    (path / "timesteps.safetensors").unlink()
    state = json.loads((path / "state.json").read_text())
    for key in ("skipped_steps", "skipped_in_a_row"):
        del state[key]
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    lines = (path / "SHA256SUMS").read_text().splitlines()
    digests = {line.split("  ")[1]: line for line in lines if "timesteps" not in line}
    digests["state.json"] = f"{files.digest(path / 'state.json')}  state.json"
    (path / "SHA256SUMS").write_text("".join(f"{line}\n" for line in digests.values()))
    result = trainer.train(small(training__steps=8), tmp_path / "run", resume=True)
    assert result.metrics["steps"] == 8
    assert result.metrics["skipped_steps"] == 0
    assert (checkpoint.latest(tmp_path / "run") / "timesteps.safetensors").exists()


def test_the_plot_shows_any_losses(tmp_path):
    for means in (torch.rand(3, 10), torch.full((3, 10), torch.nan), -torch.rand(3, 10), torch.zeros(0, 10)):
        curve = [(float(t), mean) for t, mean in enumerate(means.nansum(0).tolist())]
        plots.save_timestep_losses(curve, means, 4, 10, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as picture:
            assert picture.format == "PNG"
