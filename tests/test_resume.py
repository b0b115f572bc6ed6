"""A run that was stopped goes on as if nothing had happened, and never as another run."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import TINY, assert_same_weights, finished, losses, small, weights, without_curve  # noqa: F401  (fixtures)

from ddpm_fast.app import cli
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.training import checkpoint, data, progress, trainer
from ddpm_fast.training.config import check
from ddpm_fast.training.run import RunError
from ddpm_fast.training.signals import Stopped

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def folder(finished, tmp_path):  # noqa: F811
    """A copy of a finished run."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def raise_in_step(patch, step: int, *numbers: int) -> None:
    """Signals that arrive while a step, counted from 1, is being computed."""
    forward = GaussianDiffusion.forward

    def interrupted(self, images, **arguments):
        if arguments["sample_offset"] == len(images) * (step - 1):
            for number in numbers:
                signal.raise_signal(number)
        return forward(self, images, **arguments)

    patch.setattr(GaussianDiffusion, "forward", interrupted)


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(finished, tmp_path, stop):  # noqa: F811
    folder = tmp_path / "run"
    trainer.train(small(training__steps=stop), folder)
    before = checkpoint.load_state(checkpoint.latest(folder))
    assert before["step"] == stop
    result = trainer.train(small(), folder, resume=True)
    assert_same_weights(finished.folder, folder)
    assert result.metrics["seconds"] >= before["seconds"]
    assert losses(result) == losses(finished)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), *((number, 7) for number in SIGNALS)])
def test_a_signal_saves_the_step_and_the_run_goes_on_as_if_nothing_had_happened(
    finished,  # noqa: F811
    tmp_path,
    monkeypatch,
    number,
    step,
):
    folder = tmp_path / "run"
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with monkeypatch.context() as patch:
        raise_in_step(patch, step, number)
        with pytest.raises(Stopped, match=f"stopped after step {step}; go on with --resume") as raised:
            trainer.train(small(), folder)
    assert raised.value.number == number
    assert isinstance(raised.value, KeyboardInterrupt)
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    assert json.loads((folder / "metrics.json").read_text())["steps"] == step
    assert (folder / "loss.png").exists()
    result = trainer.train(small(), folder, resume=True)
    assert_same_weights(finished.folder, folder)
    assert losses(result) == losses(finished)


def test_a_closed_terminal_that_sends_sighup_twice_still_saves(tmp_path, monkeypatch):
    raise_in_step(monkeypatch, 3, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
    with pytest.raises(Stopped) as raised:
        trainer.train(small(), tmp_path / "run")
    assert raised.value.number == signal.SIGHUP
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-00000003"]


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    raise_in_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer.train(small(), tmp_path / "run")
    assert not isinstance(raised.value, Stopped)
    assert not checkpoint.steps(tmp_path / "run")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_ends_with_the_status_that_a_shell_gives_a_signal(tmp_path, monkeypatch, capsys, number):
    (tmp_path / "mine.json").write_text(json.dumps(small().model_dump(mode="json")))
    raise_in_step(monkeypatch, 1, number)
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run")])
    assert raised.value.code == 128 + number
    assert "ddpm-fast train: stopped after step 1; go on with --resume" in capsys.readouterr().err


class SignalsIgnored(data.ImageFiles):
    """Instead of images: whether the process that should read them ignores each of the signals."""

    def __getitem__(self, indices):
        return torch.tensor([signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS])


def test_the_processes_that_read_images_leave_signals_to_the_training():
    order = data.ShuffledBatches(1, 1, seed=0, first_step=0, last_step=1)
    (ignored,) = data.batches(SignalsIgnored([Path("none.png")], 8), order, workers=1)
    assert ignored.all()
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, monkeypatch):
    raise_in_step(monkeypatch, 3, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert trainer.train(small(training__steps=4), tmp_path / "run").metrics["steps"] == 4
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_a_preview_gives_the_preview_up_and_the_resumed_run_draws_it(tmp_path, monkeypatch):
    folder, step = tmp_path / "run", GaussianDiffusion.sample_progressive

    def interrupted(self, *arguments, **more):
        signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GaussianDiffusion, "sample_progressive", interrupted)
        with pytest.raises(Stopped, match="stopped after step 6"):  # the preview is of step 5
            trainer.train(small(), folder)
    assert not (folder / "previews" / "step-00000005.png").exists()


def test_a_preview_that_is_due_at_the_resumed_step_is_drawn(tmp_path):
    trainer.train(small(training__steps=5), tmp_path / "run")
    assert not (tmp_path / "run" / "previews").exists()
    trainer.train(small(training__steps=6), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "previews" / "step-00000005.png").exists()


def test_a_resumed_run_has_the_loss_of_the_whole_window(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LOSS_POINTS", 4)  # windows of three steps
    whole = trainer.train(small(), tmp_path / "whole")
    assert [step for step, _ in whole.metrics["history"]] == [3, 6, 9, 12]
    with monkeypatch.context() as patch:
        raise_in_step(patch, 5, signal.SIGINT)  # in the middle of a window
        with pytest.raises(Stopped):
            trainer.train(small(), tmp_path / "run")
    assert losses(trainer.train(small(), tmp_path / "run", resume=True)) == losses(whole)


def test_an_error_in_the_data_loses_no_step(tmp_path, monkeypatch):
    batches = trainer.batches

    def broken(data, order, *, workers):
        yield from (batch for _, batch in zip(range(3), batches(data, order, workers=workers), strict=False))
        raise RuntimeError("a worker was killed")

    monkeypatch.setattr(trainer, "batches", broken)
    with pytest.raises(RuntimeError, match="a worker was killed"):
        trainer.train(small(), tmp_path / "run")
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-00000003"]


# Runs that have ended


def test_a_finished_run_writes_again_what_an_end_after_the_last_checkpoint_has_lost(finished, folder):  # noqa: F811
    for name in ("metrics.json", "loss.png"):
        (folder / name).unlink()
    result = trainer.train(small(), folder, resume=True)
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 12
    assert (folder / "loss.png").exists()
    assert losses(result) == losses(finished)
    assert torch.equal(result.diffusion.sample(2, seed=0), finished.diffusion.sample(2, seed=0))


def test_a_run_that_has_taken_more_steps_than_asked_for_is_refused(folder):
    with pytest.raises(RunError, match=r"taken 12 steps already, and training\.steps is 10"):
        trainer.train(small(training__steps=10), folder, resume=True)


def test_nothing_to_resume_is_an_error_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(RunError, match=r"nowhere: no checkpoint here to go on from; leave out --resume to start a run"):
        trainer.train(small(), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


# What may change


def test_a_folder_that_holds_a_run_is_not_overwritten(folder):
    before = weights(folder, "model")
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        trainer.train(small(), folder)
    assert all(torch.equal(before[k], v) for k, v in weights(folder, "model").items())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"model": TINY | {"dropout": 0.1, "norm_groups": 2}}, "model.norm_groups was 4, now 2"),
        ({"diffusion__timesteps": 11}, "diffusion.timesteps was 10, now 11"),
        ({"training__batch_size": 8}, "training.batch_size was 4, now 8"),
        ({"data__flip": False}, "data.flip was True, now False"),
        (
            {"training__timestep_sampling": "loss_second_moment"},
            "training.timestep_sampling was 'uniform', now 'loss_second_moment'",
        ),
        (
            {"seed": 2, "training__betas": [0.9, 0.99]},
            "seed was 0, now 2; training.betas was [0.9, 0.999], now [0.9, 0.99]",
        ),
    ],
)
def test_another_run_is_refused_with_each_key_and_its_old_and_new_value(folder, changes, difference):
    message = f"--resume cannot change what the run was started with: {difference}"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        trainer.train(small(training__steps=16, **changes), folder, resume=True)
    assert [p.name for p in checkpoint.steps(folder)] == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": TINY | {"dropout": 0.1, "norm_groups": 4, "gradient_checkpointing": True}},
        {"diffusion__sampling_timesteps": 5},
        {"training__save_every": 1, "training__sample_every": 100, "training__max_skipped": 1},
        {"training__lr": 1e-4, "training__warmup": 20, "training__cosine_decay": True, "training__grad_clip": 0.5},
    ],
)
def test_what_does_not_change_the_past_may_change(folder, changes):
    assert trainer.train(small(training__steps=13, **changes), folder, resume=True).metrics["steps"] == 13


def images(folder: Path, seed: int, n: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(generator.integers(0, 255, (8, 8 + seed), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def of_folder(path: str | Path, steps: int):
    values = small(training__steps=steps, training__sample_every=100).model_dump(mode="json")
    return check(values | {"data": {"name": "folder", "path": str(path), "image_size": 8, "channels": 1}})


def test_the_same_images_elsewhere_go_on_and_other_images_in_the_same_place_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = images(tmp_path / "images", seed=0)
    trainer.train(of_folder(here, 1), tmp_path / "run")
    moved = here.rename(tmp_path / "moved")
    for steps, path in ((2, moved), (3, "moved")):
        assert trainer.train(of_folder(path, steps), tmp_path / "run", resume=True).metrics["steps"] == steps
    for seed, n in ((1, 6), (0, 7)):
        shutil.rmtree(moved)
        images(moved, seed=seed, n=n)
        with pytest.raises(RunError, match=r"the images are not those that the run was started with: .*moved"):
            trainer.train(of_folder(moved, 4), tmp_path / "run", resume=True)


def test_a_checkpoint_that_knows_nothing_of_its_images_needs_them_in_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = images(tmp_path / "images", seed=0)
    trainer.train(of_folder(here, 1), tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run")
    (path / "SHA256SUMS").unlink()
    state = json.loads((path / "state.json").read_text())
    del state["format"], state["data"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match=r"data\.path was '.*/images', now '.*/more'"):
        trainer.train(of_folder(images(tmp_path / "more", seed=0), 2), tmp_path / "run", resume=True)
    assert trainer.train(of_folder("images", 2), tmp_path / "run", resume=True).metrics["steps"] == 2
