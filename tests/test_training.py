"""What a training does: its steps, what it writes, and that it learns."""

import json

import pytest
import safetensors.torch
import torch
from PIL import Image
from test_config import changed
from test_data import FASHION
from training_runs import finished, losses, small, weights, without_curve  # noqa: F401  (fixtures)

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.noise import derive_seed
from ddpm_fast.training import data, report, trainer
from ddpm_fast.training.config import ConfigError, build_diffusion, check, load
from ddpm_fast.training.run import RunError


def test_a_run_leaves_what_it_promises(finished):  # noqa: F811
    folder = finished.folder
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.json", "checkpoints", "previews", "samples.png", "denoising.png", "loss.png",
        "loss_by_timestep.png", "progress.jsonl",
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]
    assert sorted(p.name for p in (folder / "previews").iterdir()) == ["step-00000005.png", "step-00000010.png"]
    assert check(json.loads((folder / "config.json").read_text())) == finished.config
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["seed"] == 0
    assert metrics["steps"] == 12
    assert metrics["loss"] > 0
    assert metrics["images_per_second"] > 0
    assert {"ddpm_fast", "python", "torch"} <= set(metrics["versions"])
    assert [step for step, _ in metrics["history"]] == list(range(1, 13))
    assert metrics["skipped_steps"] == 0
    assert {t for t, _ in metrics["loss_by_timestep"]} <= set(range(10))
    with Image.open(folder / "denoising.png") as picture:
        assert picture.size == ((11 * 9 + 1) * 6, (8 * 9 + 1) * 6)  # 11 columns, 8 rows, enlarged six times


def test_training_learns(tmp_path):
    changes = {"training__steps": 60, "training__batch_size": 16, "training__save_every": 60, "training__lr": 5e-3}
    result = trainer.train(small(**changes, model__dropout=0.0, training__sample_every=100), tmp_path / "run")
    assert losses(result)[0] == pytest.approx(1.0, abs=0.2)  # a fresh network predicts 0, and eps has variance 1
    assert result.metrics["loss"] < 0.6


def test_each_step_draws_its_own_timesteps_images_and_noise(tmp_path, monkeypatch):
    seen = []
    p_losses = GaussianDiffusion.p_losses

    def spy(self, x_start, t, *arguments, seed, sample_offset):
        nothing = torch.zeros(x_start.shape)
        seen.append((x_start, t, self.q_sample(nothing, t, seed=seed, sample_offset=sample_offset)))
        return p_losses(self, x_start, t, *arguments, seed=seed, sample_offset=sample_offset)

    monkeypatch.setattr(GaussianDiffusion, "p_losses", spy)
    trainer.train(small(diffusion__timesteps=1000, training__batch_size=16), tmp_path / "run")
    for values in zip(*seen, strict=True):
        assert len({tuple(value.flatten().tolist()) for value in values}) == 12
    t = torch.cat([t for _, t, _ in seen]).double()
    assert t.mean().item() == pytest.approx(499.5, abs=5 * 288.7 / len(t) ** 0.5)


def test_the_noise_of_training_is_not_that_of_samples_with_the_same_seed(tmp_path, monkeypatch):
    """Stream 0 of a seed is eps in training and x_T in sampling: samples would begin where images were."""
    seeds, first, forward = set(), [], GaussianDiffusion.forward

    def spy(self, images, **arguments):
        seeds.add(arguments["seed"])
        first.append(int(arguments["sample_offset"]))
        return forward(self, images, **arguments)

    monkeypatch.setattr(GaussianDiffusion, "forward", spy)
    config = small(seed=5, training__steps=3)
    trainer.train(config, tmp_path / "run")
    assert seeds == {derive_seed(5, trainer.NOISE)}
    assert first == [0, config.training.batch_size, 2 * config.training.batch_size]
    assert 5 not in seeds


def fresh(config):
    torch.manual_seed(config.seed)
    return build_diffusion(config).model.state_dict()


def test_the_learning_rate_reaches_the_weights(tmp_path):
    """Adam's first step is the learning rate in size, unless the gradient is far below its epsilon, 1e-8."""
    config = small(training__steps=1, training__warmup=10, training__lr=0.01)
    trainer.train(config, tmp_path / "run")
    moved = weights(tmp_path / "run", "model")["conv_out.weight"] - fresh(config)["conv_out.weight"]
    assert moved.abs().max().item() == pytest.approx(0.001, rel=1e-3)


def test_the_gradient_is_clipped_before_the_update(tmp_path, monkeypatch):
    """Of every step: the optimizer sees a norm no larger than grad_clip, and without clipping it would be larger."""
    norms = {}
    for clip in (1e-3, None):
        config = small(training__steps=3, training__grad_clip=clip, training__save_every=3)
        seen, step = norms.setdefault(clip, []), torch.optim.AdamW.step

        def spy(self, seen=seen, step=step):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(torch.nn.utils.get_total_norm(gradients).item())
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            trainer.train(config, tmp_path / str(clip))
    assert norms[1e-3] == pytest.approx([1e-3] * 3, rel=1e-2)  # clip_grad_norm_ adds 1e-6 to the norm it divides by
    assert min(norms[None]) > 1e-2


def test_the_average_is_the_one_configured(tmp_path):
    config = small(training__steps=2, training__save_every=1, training__ema_decay=0.9)
    trainer.train(config, tmp_path / "run")
    first, second = (tmp_path / "run" / "checkpoints" / f"step-0000000{i}" for i in (1, 2))

    def load_weights(folder, name):
        return safetensors.torch.load_file(folder / f"{name}.safetensors")

    assert [trainer.ema_decay(step, 0.9) for step in (0, 1, 10**6)] == [0.0, 2 / 11, 0.9]
    assert all(torch.equal(x, load_weights(first, "model")[name]) for name, x in load_weights(first, "ema").items())
    for name, average in load_weights(second, "ema").items():
        decay = 2 / 11  # of the second step: the configured one is for later
        expected = decay * load_weights(first, "model")[name] + (1 - decay) * load_weights(second, "model")[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flip", [True, False])
def test_about_half_of_the_images_are_mirrored_if_configured(tmp_path, monkeypatch, flip):
    config = small(data__flip=flip, training__batch_size=20)
    seen, forward = [], GaussianDiffusion.forward
    monkeypatch.setattr(GaussianDiffusion, "forward", lambda self, x, **kw: (seen.append(x), forward(self, x, **kw))[1])
    trainer.train(config, tmp_path / "run")
    digits = data.open_data(config.data)
    order = data.ShuffledBatches(len(digits), 20, seed=0, first_step=0, last_step=12)
    originals, shown = torch.cat([digits[batch] for batch in order]), torch.cat(seen)
    same, mirrored = ((shown == x).flatten(1).all(1) for x in (originals, originals.flip(-1)))
    assert (same | mirrored).all()
    assert same.float().mean().item() == pytest.approx(0.5 if flip else 1.0, abs=0.16 if flip else 0)  # 5 deviations


def test_the_learning_rate_rises_and_falls_as_configured():
    c = small(training__steps=100, training__warmup=10, training__cosine_decay=True).training
    factors = [trainer.lr_factor(step, c) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors.index(max(factors)) == 9
    assert factors[50] == pytest.approx(0.5)
    assert factors[99] < 0.001
    assert trainer.lr_factor(5, small().training) == 1.0


def test_images_that_the_model_does_not_take_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the images are \(1, 8, 8\) .* but the model takes \(1, 16, 16\)"):
        trainer.train(small(model__image_size=16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_in_several_processes_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="training runs in one process, but a launcher has started 2"):
        trainer.train(small(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_preview_that_cannot_be_written_does_not_stop_the_training(tmp_path, capsys, monkeypatch):
    def full(images, path, receipt):
        raise OSError("no space left on device")

    monkeypatch.setattr(report, "save_grid", full)
    result = trainer.train(small(training__steps=6), tmp_path / "run")
    assert result.metrics["steps"] == 6
    assert "no preview of step 5: no space left on device" in capsys.readouterr().out


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_trains(tmp_path):
    """The shipped config, shortened: the loss, first 1, falls below 0.75 within 12 steps (to 0.55 with seed 0)."""
    values = load("fashion_mnist").model_dump(mode="json")
    values["training"] |= {"steps": 12, "batch_size": 16, "warmup": 4, "lr": 2e-3}
    result = trainer.train(check(values), tmp_path / "fashion")
    assert losses(result)[0] == pytest.approx(1.0, abs=0.1)
    assert losses(result)[-1] < 0.75


def test_training_in_bfloat16_tracks_float32(tmp_path):
    """The same images, timesteps and noise: only rounding differs. (Over 600 steps of the demo, 2.9 % at most.)"""
    curves = []
    for precision in ("fp32", "bf16"):
        changes = {"training__steps": 40, "training__save_every": 40, "training__sample_every": 1000}
        config = check(changed(**changes, training__lr=5e-3, training__precision=precision))
        result = trainer.train(config, tmp_path / precision)
        assert all(p.dtype == torch.float32 for p in result.diffusion.model.parameters())
        curves.append(torch.tensor(losses(result)))
    exact, rounded = curves
    assert exact[-5:].mean() < exact[:5].mean() / 1.5  # they have learned something
    assert ((rounded - exact).abs() / exact).max() < 0.05
