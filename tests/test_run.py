"""A trained model is loaded, sampled and shown."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import assert_same_weights, finished, small, weights, without_curve  # noqa: F401  (fixtures)

from ddpm_fast.app import demo
from ddpm_fast.app.generate import write_samples
from ddpm_fast.training import checkpoint, data, run, trainer
from ddpm_fast.training.pictures import save_grid, save_images, to_uint8
from ddpm_fast.training.run import RunError, load_run, sample_batches, write_pictures


def test_a_trained_model_is_loaded_with_its_average(finished):  # noqa: F811
    loaded = load_run(finished.folder)
    assert torch.equal(loaded.diffusion.sample(3, seed=1), finished.diffusion.sample(3, seed=1))
    average, last = weights(finished.folder, "ema"), weights(finished.folder, "model")
    assert not torch.equal(average["conv_in.weight"], last["conv_in.weight"])
    older = load_run(finished.folder / "checkpoints" / "step-00000008")
    assert not torch.equal(older.diffusion.sample(3, seed=1), loaded.diffusion.sample(3, seed=1))


def test_batches_are_dealt_to_processes_and_are_those_of_one(finished):  # noqa: F811
    """Batches of 4, as in training; each process reports all steps of its images."""
    steps = len(finished.diffusion.step_table())
    alone = dict(sample_batches(finished, 10, seed=3))
    assert {first: len(images) for first, images in alone.items()} == {0: 4, 4: 4, 8: 2}
    reports = [[], []]
    shares = [
        dict(sample_batches(finished, 10, seed=3, rank=rank, count=2, report=reports[rank].append)) for rank in (0, 1)
    ]
    assert [list(share) for share in shares] == [[0, 8], [4]]
    assert [sum(report) for report in reports] == [6 * steps, 4 * steps]
    for first, images in itertools.chain(*(share.items() for share in shares)):
        assert torch.equal(images, alone[first])
        assert torch.equal(images, finished.diffusion.sample(len(images), seed=3, sample_offset=first))
    (dealt,) = sample_batches(finished, 2, rank=1, count=2)  # too few for whole batches
    assert (dealt[0], len(dealt[1])) == (1, 1)


def test_pictures_show_the_samples_and_eleven_states(finished, tmp_path):  # noqa: F811
    sampled = finished.in_precision(finished.metrics["precision"])  # as the pictures were
    samples = torch.cat([images for _, images in sample_batches(sampled, 9, seed=0)])
    save_grid(samples, tmp_path / "samples.png", receipt=sampled.receipt(9))
    states = sampled.diffusion.sample(8, seed=0, return_all_timesteps=True)
    receipt = sampled.receipt(8, batch_size=8).of_states(range(11))
    save_grid(states.flatten(0, 1), tmp_path / "denoising.png", columns=11, receipt=receipt)
    for name in ("samples.png", "denoising.png"):
        assert (tmp_path / name).read_bytes() == (finished.folder / name).read_bytes()
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.getpixel((9, 9)) == to_uint8(samples)[0, 0, 0, 0]  # six times as large, after a gap of one


def test_pictures_that_are_missing_or_older_than_the_checkpoint_are_due(finished, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    assert not run.pictures_are_due(load_run(folder))
    (folder / "denoising.png").unlink()
    assert run.pictures_are_due(load_run(folder))
    write_pictures(load_run(folder), n=1)
    assert not run.pictures_are_due(load_run(folder))
    trainer.train(small(training__steps=13), folder, resume=True)
    assert run.pictures_are_due(load_run(folder))


def test_samples_are_the_same_in_a_grid_and_in_files_and_for_any_number(finished, tmp_path):  # noqa: F811
    assert "2 images" in write_samples(finished, tmp_path / "files", n=2, seed=3)
    assert "6 images" in write_samples(finished, tmp_path / "more", n=6, seed=3)  # two batches
    names = [f"{i:06d}.png" for i in range(6)]
    assert sorted(p.name for p in (tmp_path / "more").iterdir()) == names
    pixels = [torch.tensor(list(Image.open(tmp_path / "more" / name).tobytes())) for name in names]
    for i in range(2):
        alone = torch.tensor(list(Image.open(tmp_path / "files" / names[i]).tobytes()))
        assert (alone - pixels[i]).abs().max() <= 1  # a convolution may round otherwise in another batch
    write_samples(finished, tmp_path / "new" / "grid.png", n=6, seed=3, sampler="ddim", steps=5)
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.size == ((3 * 9 + 1) * 6, (2 * 9 + 1) * 6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        write_samples(finished, tmp_path / "none", n=0)


def test_samples_that_are_not_finite_are_an_error_and_no_black_picture(tmp_path):
    """Of weights that are finite, but so large that the first products overflow."""
    result = trainer.train(small(training__steps=1), tmp_path / "run")
    with torch.no_grad():
        result.diffusion.model.conv_in.weight.fill_(3e38)
    message = "4 of 4 sampled images have values that are not finite: the training has diverged"
    for out in ("images", "grid.png"):
        with pytest.raises(RunError, match=message):
            write_samples(result, tmp_path / out, n=4)
    with pytest.raises(RunError, match=message):
        write_pictures(result, n=4)
    assert {path.name for path in tmp_path.rglob("*.png")} == {"loss.png", "loss_by_timestep.png"}


def test_a_run_whose_weights_overflow_names_the_last_good_checkpoint_again_and_again(tmp_path):
    config = small(training__lr=1e30, training__save_every=1)
    advice = "the last good checkpoint is step-00000001: lower training.lr or training.grad_clip and go on from it"
    for resume in (False, True):
        told = "the loss is (nan|inf) at step 11, and the last 10 updates are skipped"
        with pytest.raises(RunError, match=f"{told}; {advice}"):
            trainer.train(config, tmp_path / "run", resume=resume)
        assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_loss_that_is_not_finite_stops_the_run_and_the_advice_works(tmp_path, monkeypatch):
    folder, forward = tmp_path / "run", trainer.GaussianDiffusion.forward

    def broken(self, images, **arguments):
        loss = forward(self, images, **arguments)
        return loss * float("nan") if arguments["sample_offset"] >= 4 * 6 else loss

    with monkeypatch.context() as patch:
        patch.setattr(trainer.GaussianDiffusion, "forward", broken)
        config = small(training__steps=2000, training__max_skipped=1)  # read in the middle of a window
        with pytest.raises(RunError, match="the loss is nan at step 7; the last good checkpoint is step-00000004"):
            trainer.train(config, folder)
    assert all(tensor.isfinite().all() for tensor in weights(folder, "model").values())
    assert trainer.train(small(training__lr=1e-5), folder, resume=True).metrics["steps"] == 12


def broken_in(patch, *steps, how=float("nan"), samples=slice(None)):
    """The losses of some samples in some steps, counted from 1, are not finite."""
    forward = trainer.GaussianDiffusion.forward

    def broken(self, images, **arguments):
        losses = forward(self, images, **arguments)
        factor = torch.ones_like(losses)
        if int(arguments["sample_offset"]) // len(images) + 1 in steps:
            factor[samples] = how
        return losses * factor

    patch.setattr(trainer.GaussianDiffusion, "forward", broken)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_told(tmp_path, monkeypatch, capsys, precision):
    config = small(training__save_every=1, training__precision=precision, training__ema_decay=0.0)
    broken_in(monkeypatch, 3, 4, samples=1)
    times, sample = [], trainer.TimestepLosses.add
    monkeypatch.setattr(trainer.TimestepLosses, "add", lambda self, t, x: (times.append(t), sample(self, t, x)))
    result = trainer.train(config, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert told == [
        f"step {step}: the loss is nan at the timesteps {times[step - 1][1]}; the update is skipped" for step in (3, 4)
    ]
    assert result.metrics["skipped_steps"] == 2
    assert result.metrics["steps"] == 12
    assert [step for step, _ in result.metrics["history"]] == [1, 2, *range(5, 13)]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_steps"] == 2
    state = checkpoint.load_state(checkpoint.latest(tmp_path / "run"))
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (2, 0)
    moments = torch.load(checkpoint.latest(tmp_path / "run") / "optimizer.pt", weights_only=True)["state"]
    assert moments[0]["step"] == 10


def test_a_gradient_that_is_not_finite_is_told_as_such(tmp_path, monkeypatch, capsys):
    forward = trainer.GaussianDiffusion.forward

    def broken(self, images, **arguments):
        losses = forward(self, images, **arguments)
        if arguments["sample_offset"] == 4 * 4:
            losses.register_hook(lambda gradient: gradient * torch.inf)
        return losses

    monkeypatch.setattr(trainer.GaussianDiffusion, "forward", broken)
    result = trainer.train(small(training__precision="fp32"), tmp_path / "run")
    assert "step 5: the norm of the gradients is not finite at the timesteps " in capsys.readouterr().out
    assert result.metrics["skipped_steps"] == 1


def test_no_checkpoint_is_saved_while_steps_are_skipped(tmp_path, monkeypatch):
    """The weights may be at fault, and they would take the place of those that were not."""
    saved, save = [], trainer.Trainer.save
    monkeypatch.setattr(trainer.Trainer, "save", lambda self: (saved.append(self.progress.step), save(self)))
    broken_in(monkeypatch, 4, 5, 8, 12)
    trainer.train(small(), tmp_path / "run")
    assert saved == [6, 9, 12]  # the last step is saved in any case


def test_steps_that_are_skipped_in_a_row_are_counted_over_a_stop(tmp_path, monkeypatch):
    broken_in(monkeypatch, *range(3, 9))
    for steps in (4, 6):
        trainer.train(small(training__steps=steps), tmp_path / "run", resume=steps > 4)
        assert checkpoint.load_state(checkpoint.latest(tmp_path / "run"))["skipped_in_a_row"] == steps - 2
    with pytest.raises(RunError, match="the loss is nan at step 7, and the last 5 updates are skipped"):
        trainer.train(small(training__max_skipped=5), tmp_path / "run", resume=True)
    result = trainer.train(small(training__max_skipped=7), tmp_path / "run", resume=True)
    assert result.metrics["skipped_steps"] == 6


def test_a_resumed_run_with_skipped_steps_is_the_one_that_was_not_interrupted(tmp_path, monkeypatch):
    broken_in(monkeypatch, 1, 2, 7)
    whole = trainer.train(small(), tmp_path / "whole")
    trainer.train(small(training__steps=1), tmp_path / "run")  # with moments that have taken no step
    result = trainer.train(small(), tmp_path / "run", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    for key in ("history", "loss_by_timestep", "skipped_steps"):
        assert result.metrics[key] == whole.metrics[key]


def test_an_update_that_leaves_weights_that_are_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The loss of a step is from before its update, so it says nothing of the weights that are saved."""
    step = torch.optim.AdamW.step

    def overflow(self):
        step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(torch.inf)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        message = "step 1 is not saved: .* is not finite; lower training.lr or training.grad_clip and start again"
        with pytest.raises(checkpoint.CheckpointError, match=message):
            trainer.train(small(training__steps=1), tmp_path / "run")
    assert not checkpoint.steps(tmp_path / "run")
    assert trainer.train(small(training__steps=1), tmp_path / "run").metrics["steps"] == 1


def test_an_interrupted_save_leaves_the_image_that_was_there(tmp_path, monkeypatch):
    images = torch.rand(2, 3, 8, 8)
    save_images(images, tmp_path)
    save_grid(images, tmp_path / "grid.jpg")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["000000.png", "000001.png", "grid.jpg"]

    def half(self, path, *arguments, **chunks):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    for save in (lambda: save_images(1 - images, tmp_path), lambda: save_grid(1 - images, tmp_path / "grid.jpg")):
        with pytest.raises(KeyboardInterrupt):
            save()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_classifier_knows_digits_from_noise():
    digits = data.open_data(small().data).images / 255
    share, counts = demo.recognised_share(digits[:500])
    assert share > 0.95
    assert min(counts) > 30
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shuffled = digits[:200].flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    for other in (noise, shuffled.view(-1, 1, 8, 8), torch.zeros(10, 1, 8, 8)):
        assert demo.recognised_share(other)[0] < 0.05


# The folder of a run


USERS = {"photo.png": "mine", "samples.png": "mine", "config.json": '{"mine": 1}', "checkpoints/model.pt": "mine"}


@pytest.mark.parametrize("name", USERS)
def test_a_folder_with_files_of_the_user_is_refused_and_left_alone(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(USERS[name])
    with pytest.raises(
        RunError, match=rf"run is not empty and holds no run \({name.partition('/')[0]}\); choose a new"
    ):
        trainer.train(small(training__steps=1), tmp_path / "run")
    assert path.read_text() == USERS[name]
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == [path]


def test_a_config_written_by_hand_into_the_folder_is_not_overwritten(tmp_path):
    values = small(training__steps=1).model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"holds no run \(config.json\)"):
        trainer.train(small(training__steps=1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == values


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(trainer.GaussianDiffusion, "forward", broken)
        with pytest.raises(RuntimeError):
            trainer.train(small(), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    preview = tmp_path / "run" / "previews" / "step-00000001.png"
    preview.parent.mkdir()
    preview.write_text("of the run that ended")
    config = small(training__steps=2, training__sample_every=1, seed=3)
    assert trainer.train(config, tmp_path / "run").config.seed == 3
    with Image.open(preview) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("name", ["config.json", "metrics.json.tmp", "checkpoints", "previews", "loss.png", ".lock"])
def test_links_in_the_folder_of_a_run_are_not_written_through(finished, tmp_path, name):  # noqa: F811
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.touch()
    (folder / name).symlink_to(outside)
    with pytest.raises(RunError, match=f"{name} is a symbolic link, and a run writes only into its own folder"):
        trainer.train(small(training__steps=13), folder, resume=True)


def test_a_folder_takes_one_training_at_a_time_and_a_lock_left_behind_does_not_count(tmp_path, monkeypatch):
    folder, step = tmp_path / "run", trainer.Trainer.step
    (tmp_path / "run").mkdir()
    (folder / ".lock").touch()  # of a process that was killed

    def second(self, images):
        with pytest.raises(RunError, match="another process is training in this folder; choose another folder"):
            trainer.train(small(training__steps=1), folder)
        step(self, images)

    monkeypatch.setattr(trainer.Trainer, "step", second)
    assert trainer.train(small(training__steps=1), folder).metrics["steps"] == 1
    assert not (folder / ".lock").exists()
    monkeypatch.undo()
    assert trainer.train(small(training__steps=2), folder, resume=True).metrics["steps"] == 2
