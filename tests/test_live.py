"""What a run tells while it goes on: progress.jsonl, the speed and its share of the device's peak, and trackers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import small, trained, without_curve  # noqa: F401  (fixtures)

from ddpm_fast.training import checkpoint, progress_log, speed, trackers, trainer
from ddpm_fast.training.config import ConfigError, build_network
from ddpm_fast.training.optimization import lr_factor
from ddpm_fast.training.progress import Losses, Progress, StepLosses
from ddpm_fast.training.progress_log import ProgressLog, read_course
from ddpm_fast.training.run import RunError
from ddpm_fast.training.speed import Speed
from ddpm_fast.training.trackers import Trackers

VALUES = {"loss", "grad_norm", "learning_rate", "images_per_second"}


def train_and_end_after(monkeypatch, steps, config, folder):
    """The process ends after so many steps, and saves nothing."""
    take = trainer.Trainer.step

    def broken(self, images):
        if self.progress.step == steps:
            raise SystemExit
        take(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", broken)
        with pytest.raises(SystemExit):
            trainer.train(config, folder)


def told(folder):
    """What a run says of its steps, without what is of the moment."""
    of_the_moment = {"time", "images_per_second", "share_of_peak"}
    points = read_course(folder).points
    return [{name: value for name, value in point.items() if name not in of_the_moment} for point in points]


# progress.jsonl


def test_a_run_writes_its_course(trained):  # noqa: F811
    course, c = read_course(trained.folder), trained.config.training
    assert [[point["step"], point["loss"]] for point in course.points] == [list(p) for p in trained.metrics["history"]]
    assert course.ended["ended"] == "finished"
    for point in course.points:
        assert set(point) >= VALUES
        assert point["learning_rate"] == c.lr * lr_factor(point["step"] - 1, c)
        of_ranges = {name.partition("/")[2]: value for name, value in point.items() if "timestep" in name}
        assert set(of_ranges) <= {f"{t}-{t}" for t in range(10)}
        assert min(of_ranges.values()) <= point["loss"] <= max(of_ranges.values())
        assert abs(time.time() - point["time"]) < 3600


def test_a_run_that_was_killed_and_goes_on_is_one_curve(trained, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "run"
    train_and_end_after(monkeypatch, 6, small(), folder)  # the checkpoint is of step 4
    before = read_course(folder)
    assert len(before.points) == 6
    assert before.ended["ended"] == "failed"
    with open(folder / "progress.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a process leaves it that is killed while it writes
    assert len(read_course(folder).points) == 6
    trainer.train(small(), folder, resume=True)
    assert told(folder) == told(trained.folder)
    assert read_course(folder).id == before.id != read_course(trained.folder).id


def test_a_run_that_begins_again_has_nothing_of_the_one_before(tmp_path):
    log = ProgressLog(tmp_path, 0)
    log.point(3, {"loss": 1.0})
    again = ProgressLog(tmp_path, 0)
    assert again.id != log.id
    assert again.last == 0
    assert read_course(tmp_path).points == []
    again.point(5, {"loss": 1.0})
    goes_on = ProgressLog(tmp_path, 4)
    assert (goes_on.last, goes_on.id) == (5, again.id)


def test_a_course_that_cannot_be_written_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError("no space left on device")

    monkeypatch.setattr(progress_log, "write_text", full)
    assert trainer.train(small(training__steps=2), tmp_path / "run").metrics["steps"] == 2
    assert capsys.readouterr().out.count("progress.jsonl is not written any more: no space left on device") == 1


def test_a_point_has_the_means_of_the_steps_that_were_not_skipped():
    config = small(training__steps=800, diffusion__timesteps=1000)  # windows of four steps
    found = Losses(Progress(), config, Path("run"))
    t = torch.tensor([[0, 150, 999, 100], [99, 199, 900, 5], [3, 4, 5, 6], [1, 2, 3, 250]])
    losses = torch.arange(16.0).reshape(4, 4)
    losses[2] = torch.nan
    norms = torch.tensor([1.0, 2.0, torch.inf, 6.0])
    for step in range(4):
        found.progress.step += 1
        skipped = torch.tensor(float(step == 2))
        found.pending.append(StepLosses(losses[step].mean(), skipped, norms[step], losses[step], t[step]))
        if step in (1, 3):
            found.read()
            assert (found.point is None) == (step == 1)
    assert found.point == {
        "loss": pytest.approx((1.5 + 5.5 + 13.5) / 3),
        "grad_norm": 3.0,
        "loss_by_timestep/000-099": pytest.approx((0 + 4 + 7 + 12 + 13 + 14) / 6),
        "loss_by_timestep/100-199": pytest.approx((1 + 3 + 5) / 3),
        "loss_by_timestep/200-299": 15.0,
        "loss_by_timestep/900-999": pytest.approx((2 + 6) / 2),
    }


def test_ranges_of_timesteps_hold_each_timestep_once():
    for timesteps in (1, 3, 10, 25, 999):
        found = Losses(Progress(), small(training__steps=200, diffusion__timesteps=timesteps), Path("run"))
        found.progress.step = 1
        t = torch.arange(timesteps)
        found.pending.append(StepLosses(torch.ones(()), torch.zeros(()), torch.ones(()), t.float(), t))
        found.read()
        of_ranges = {name.partition("/")[2]: mean for name, mean in found.point.items() if "/" in name}
        ends = [tuple(map(int, name.split("-"))) for name in of_ranges]
        assert [t for first, last in ends for t in range(first, last + 1)] == list(range(timesteps))
        assert list(of_ranges.values()) == [(first + last) / 2 for first, last in ends]
        assert list(of_ranges) == sorted(of_ranges)


# The speed


def test_the_operations_of_a_network_are_those_of_its_layers():
    config = small(model__image_size=16, model__dim_mults=[1, 2], model__attention_resolutions=[])
    network, found = build_network(config).eval(), []

    def count(layer, inputs, output):
        # A bias, one addition for an output, is not counted.
        found.append(2 * output.numel() * layer.weight[0].numel())

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    attention = 2 * 2 * (8 * 8) ** 2 * 16  # two products, of 16 channels at the lowest resolution
    assert speed.forward_flops(config) == sum(found) + attention


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_matrix_product_has_a_speed(monkeypatch, precision):
    monkeypatch.setattr(speed, "LONG_ENOUGH", 1e-5)
    assert speed.matrix_flops_per_second(torch.device("cpu"), precision) > 1e6


def test_speeds_are_of_the_time_since_the_last_point_and_the_device_is_measured_once(monkeypatch):
    monkeypatch.setattr(speed, "forward_flops", lambda config: 100)
    measured = []
    monkeypatch.setattr(speed, "matrix_flops_per_second", lambda *how: (measured.append(how), 6000.0)[1])
    config = small(training__batch_size=4)
    found = Speed(config, torch.device("cpu"), "bf16", 10, 100.0)
    assert found.point(12, 101.0) == {"images_per_second": 8.0}
    assert found.share(8.0) is None
    assert not measured
    assert found.point(14, 112.0)["images_per_second"] == pytest.approx(8 / 11)
    assert found.point(15, 113.0) == {"images_per_second": 4.0, "share_of_peak": 4.0 * 3 * 100 / 6000}
    assert measured == [(torch.device("cpu"), "bf16")]
    assert found.point(15, 113.0) == {}  # no time has passed


def test_the_share_of_the_peak_is_in_the_bar_and_in_the_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "QUIET", 0.0)
    monkeypatch.setattr(speed, "matrix_flops_per_second", lambda *how: 1e9)
    result = trainer.train(small(training__steps=3), tmp_path / "run")
    flops = 3 * speed.forward_flops(result.config)
    assert result.metrics["share_of_peak"] == pytest.approx(
        result.metrics["images_per_second"] * flops / 1e9, rel=0.1, abs=1e-4
    )
    assert "images/s, " in (bar := capsys.readouterr().err)
    assert "% of peak" in bar


# Trackers


class FakeTracker:
    def __init__(self, name, sent, breaks_at=None):
        self.name, self.sent, self.breaks_at = name, sent, breaks_at

    def log(self, values, step):
        if step == self.breaks_at:
            raise ConnectionError("the network is unreachable\nand more")
        self.sent.append((self.name, step))

    def finish(self):
        self.sent.append((self.name, "finished"))


def fakes(monkeypatch, sent, **breaks_at):
    for name in trackers.TRACKERS:
        tracker = FakeTracker(name, sent, breaks_at.get(name))
        monkeypatch.setitem(trackers.TRACKERS, name, lambda *_, tracker=tracker: tracker)
    return Trackers(tuple(trackers.TRACKERS), Path("run"), small(), run_id="0", first=4, last=6)


def test_trackers_that_cannot_forget_are_not_sent_again_what_they_know(monkeypatch):
    sent = []
    tracking = fakes(monkeypatch, sent)
    for step in (5, 6, 7):
        tracking.log(step, {"loss": 1.0})
    tracking.finish()
    assert sent == [
        *(("tensorboard", step) for step in (5, 6)),
        *((name, 7) for name in trackers.TRACKERS),
        *((name, "finished") for name in trackers.TRACKERS),
    ]


def test_a_tracker_that_fails_is_left_out_and_told_once(monkeypatch, capsys):
    sent = []
    tracking = fakes(monkeypatch, sent, wandb=7)
    for step in (7, 8):
        tracking.log(step, {"loss": 1.0})
    tracking.finish()
    assert [name for name, step in sent if step in (7, 8)] == ["tensorboard", "trackio"] * 2
    assert capsys.readouterr().out == "nothing more is sent to wandb: the network is unreachable\n"


def test_a_tracker_that_cannot_be_started_ends_the_run_at_the_door(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no API key\nand more")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", refuse)
    with pytest.raises(RunError, match=r"^training.trackers: tensorboard cannot be started: no API key$"):
        trainer.train(small(training__trackers=["tensorboard"]), tmp_path / "run")
    assert read_course(tmp_path / "run").ended["ended"] == "failed"
    assert not checkpoint.steps(tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else True)
    message = r'^training.trackers: wandb needs wandb: pip install "ddpm_fast\[watch\]" wandb$'
    with pytest.raises(ConfigError, match=message):
        trainer.train(small(training__trackers=["tensorboard", "wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_one_curve_and_the_samples_of_a_run_that_was_killed(trained, tmp_path, monkeypatch):  # noqa: F811
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = small(training__trackers=["tensorboard"])
    train_and_end_after(monkeypatch, 6, config, tmp_path / "run")
    trainer.train(config, tmp_path / "run", resume=True)
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    assert set(found.Tags()["scalars"]) >= VALUES
    assert {tag.partition("/")[0] for tag in found.Tags()["scalars"]} == VALUES | {"loss_by_timestep"}
    history = [(event.step, event.value) for event in found.Scalars("loss")]
    assert history == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in trained.metrics["history"]]
    assert [event.step for event in found.Images("samples")] == [5, 10]
    assert b'"batch_size": 4' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_take_a_run_that_goes_on_as_one_run(tmp_path, name):
    """In processes of their own, since they leave threads behind."""
    pytest.importorskip(name)
    config = small(training__trackers=[name]).model_dump(mode="json")
    (tmp_path / "mine.json").write_text(json.dumps(config))
    (tmp_path / "start.json").write_text(json.dumps(config | {"training": config["training"] | {"steps": 6}}))
    own = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for arguments in (["start.json"], ["mine.json", "--resume"]):
        command = [sys.executable, "-m", "ddpm_fast", "train", *arguments, "--out", "run"]
        subprocess.run(command, cwd=tmp_path, env=os.environ | own, check=True, timeout=300)
    run_id = read_course(tmp_path / "run").id
    if name == "wandb":
        offline = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
        assert [len(list(folder.glob(f"run-{run_id}.wandb"))) for folder in offline] == [1, 1]
        samples = [[path.name.split("_")[1] for path in folder.rglob("samples_*.png")] for folder in offline]
        assert samples == [["5"], ["10"]]
    else:
        import sqlite3

        with sqlite3.connect(tmp_path / "trackio" / "ddpm_fast.db") as database:
            rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        assert {of_run for of_run, _, _ in rows} == {f"run-{run_id}"}
        logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
        assert [step for step, metrics in logged if "loss" in metrics] == list(range(1, 13))
        assert [step for step, metrics in logged if "samples" in metrics] == [5, 10]
