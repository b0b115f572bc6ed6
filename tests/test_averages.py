"""The averages of a run: several decays, post-hoc EMA from snapshots, and which one is loaded."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from training_runs import small, weights, without_curve  # noqa: F401  (fixture)

from ddpm_fast.app import cli
from ddpm_fast.training import averages, checkpoint, snapshots, trainer
from ddpm_fast.training.checkpoint import CheckpointError
from ddpm_fast.training.files import digest
from ddpm_fast.training.power_average import combine, exponent
from ddpm_fast.training.run import load_run, weights_of

U = 2.0**-24  # of float32
U16 = 2.0**-11  # of float16, and 2^-25 below its normal numbers
STEPS = 12


def several(**changes):
    averages = {"training__ema_decay": [0.9, 0.5], "training__ema_snapshot_every": 2}
    return small(**{"training__sample_every": 100} | averages | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with several averages and a snapshot in every second step, and its weights after each step, in float64."""
    steps, update = [], averages.Averages.update

    def record(self, diffusion, step):
        steps.append({name: x.double() for name, x in weights_of(diffusion).items()})
        update(self, diffusion, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averages.Averages, "update", record)
        result = trainer.train(several(), tmp_path_factory.mktemp("runs") / "several")
    return result, {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


@pytest.fixture(scope="module")
def with_one(tmp_path_factory):
    """A run with one decay."""
    return trainer.train(small(training__steps=1), tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(run[0].folder, tmp_path / "run"))


def rounding(walk):
    """Of an average in float32: seven roundings a step, of numbers that are no larger than the weights."""
    return 7 * len(walk) * U * walk.abs().amax(0)


def of_profile(walk, sigma_rel):
    k = torch.arange(len(walk) + 1, dtype=torch.float64) / len(walk)
    return torch.tensordot((k ** (exponent(sigma_rel) + 1)).diff(), walk, 1)


def in_folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# What is computed and kept


def test_every_average_is_that_of_its_decay(run):
    result, walks = run
    for decay, name in ((0.9, "ema"), (0.5, "ema-0.5")):
        found = weights(result.folder, name)
        assert found.keys() == walks.keys()
        for key, walk in walks.items():
            average = walk[0]
            for step in range(1, STEPS):
                d = min(decay, (1 + step) / (10 + step))
                average = d * average + (1 - d) * walk[step]
            assert ((found[key] - average).abs() <= rounding(walk)).all()
    for sigma_rel in (0.05, 0.1):
        found = weights(result.folder, f"ema-sigma_rel={sigma_rel}")
        for key, walk in walks.items():
            assert ((found[key] - of_profile(walk, sigma_rel)).abs() <= rounding(walk)).all()


def test_snapshots_are_the_averages_in_float16_with_checksums(run):
    folder = run[0].folder / "averages"
    names = [f"step-{step:08d}-sigma_rel={width}.safetensors" for step in range(2, 13, 2) for width in (0.05, 0.1)]
    assert sorted(in_folder(folder)) == sorted([*names, "SHA256SUMS"])
    last, average = safetensors.torch.load_file(folder / names[-1]), weights(run[0].folder, "ema-sigma_rel=0.1")
    assert average.keys() == last.keys()
    assert all(torch.equal(x.half(), last[key]) for key, x in average.items())
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == len(names)


def test_a_run_with_one_decay_writes_what_it_always_did(with_one):
    assert not (with_one.folder / "averages").exists()
    newest = checkpoint.latest(with_one.folder)
    assert not list(newest.glob("ema-*"))
    assert checkpoint.load_state(newest)["config"]["training"]["ema_decay"] == 0.9


def test_a_checkpoint_whose_config_has_no_such_keys_loads_and_goes_on(with_one, tmp_path):
    copy = Path(shutil.copytree(with_one.folder, tmp_path / "run"))
    path = checkpoint.latest(copy) / "state.json"
    path.write_text(path.read_text().replace('"ema_snapshot_every": null,', ""))
    sums = path.with_name("SHA256SUMS")
    lines = [line for line in sums.read_text().splitlines() if not line.endswith("state.json")]
    sums.write_text("\n".join([*lines, f"{digest(path)}  state.json"]) + "\n")
    assert "ema_snapshot_every" not in path.read_text()
    assert load_run(copy).ema == "0.9"
    assert trainer.train(small(training__steps=2), copy, resume=True).metrics["steps"] == 2


@pytest.mark.parametrize("when", ["while a snapshot is written", "before a checkpoint"])
def test_a_run_that_was_killed_goes_on_to_the_same_averages_and_snapshots(run, tmp_path, monkeypatch, when):
    """After the snapshots of step 6, whose steps are taken again from the checkpoint of step 4."""
    folder, save, update = tmp_path / "run", safetensors.torch.save_file, averages.Averages.update

    def killed_in_writing(tensors, path):
        if "step-00000006-sigma_rel=0.1" in path.name:
            path.write_bytes(b"half")
            shutil.copy(path, tmp_path / "left")
            raise KeyboardInterrupt
        save(tensors, path)

    def killed_after(self, diffusion, step):
        update(self, diffusion, step)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "while a snapshot is written":
            patch.setattr(safetensors.torch, "save_file", killed_in_writing)
        else:
            patch.setattr(averages.Averages, "update", killed_after)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(several(), folder)
    if (tmp_path / "left").exists():  # as a kill that no handler sees leaves it
        shutil.copy(tmp_path / "left", folder / "averages" / "step-00000006-sigma_rel=0.1.safetensors.tmp")
    assert [path.name for path in checkpoint.steps(folder)] == ["step-00000004"]
    assert (folder / "averages" / "step-00000006-sigma_rel=0.05.safetensors").exists()
    trainer.train(several(), folder, resume=True)
    assert in_folder(folder / "averages") == in_folder(run[0].folder / "averages")
    newest, expected = (checkpoint.latest(path) for path in (folder, run[0].folder))
    for path in newest.glob("*.safetensors"):
        assert path.read_bytes() == (expected / path.name).read_bytes()


def test_snapshots_of_steps_that_are_taken_again_are_not_used(folder):
    """Nor those of a run that ended before its first checkpoint."""
    shutil.rmtree(folder / "checkpoints")
    trainer.train(several(training__steps=3), folder)
    assert sorted(path.name[:13] for path in (folder / "averages").glob("step-*")) == ["step-00000002"] * 2


def test_a_snapshot_that_cannot_be_written_is_told_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    save = safetensors.torch.save_file

    def full(tensors, path):
        if "averages" in path.parts:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    result = trainer.train(several(training__steps=2), tmp_path / "run")
    assert result.metrics["steps"] == 2
    told = "step-00000002-sigma_rel=0.05.safetensors: this snapshot cannot be kept ([Errno 28] No space left on device)"
    assert told in capsys.readouterr().out
    assert not list((tmp_path / "run" / "averages").iterdir())


def test_an_average_beyond_float16_is_told_and_not_kept(tmp_path, capsys):
    snapshots.Snapshots(tmp_path).save(5, 0.05, {"bias": torch.tensor([1e5])})
    assert "bias is not finite in torch.float16" in capsys.readouterr().out
    assert not (tmp_path / "averages").exists()


def test_the_averages_of_an_old_checkpoint_are_deleted_with_it_but_no_file_of_another_name(folder):
    there = folder / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["step-00000008", "step-00000012"]
    shutil.copy(there / "step-00000008" / "ema-0.5.safetensors", there / "step-00000008" / "ema-best.safetensors")
    trainer.train(several(training__steps=13), folder, resume=True)
    assert sorted(path.name for path in there.iterdir()) == ["step-00000008", "step-00000012", "step-00000013"]
    assert load_run(there / "step-00000008", ema="0.5").ema == "0.5"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"training__ema_decay": [0.5, 0.9]}, r"training.ema_decay was \[0.9, 0.5\], now \[0.5, 0.9\]"),
        ({"training__ema_snapshot_every": None}, "training.ema_snapshot_every was 2, now None"),
    ],
)
def test_the_averages_of_a_run_stay_the_same(folder, changes, difference):
    with pytest.raises(trainer.RunError, match=difference):
        trainer.train(several(training__steps=13, **changes), folder, resume=True)


# Which one is loaded


def loaded(folder, ema):
    return weights_of(load_run(folder, ema=ema).diffusion)


@pytest.mark.parametrize(
    ("ema", "name"),
    [("default", "ema"), (0.9, "ema"), ("0.90", "ema"), ("0.5", "ema-0.5"), (0.5, "ema-0.5"), ("none", "model")],
)
def test_an_average_is_chosen_by_its_name(run, ema, name):
    expected = weights(run[0].folder, name)
    assert all(torch.equal(x, expected[key]) for key, x in loaded(run[0].folder, ema).items())


def test_a_run_says_which_average_it_has(run):
    names = {ema: load_run(run[0].folder, ema=ema).ema for ema in ("default", 0.5, "none", "sigma_rel=0.070")}
    assert names == {"default": "0.9", 0.5: "0.5", "none": "none", "sigma_rel=0.070": "sigma_rel=0.07"}


@pytest.mark.parametrize("step", [12, 8])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.12])
def test_a_width_is_made_from_snapshots_to_the_bound_that_the_profile_gives(run, sigma_rel, step):
    result, walks = run
    folder, gamma = result.folder / "checkpoints" / f"step-{step:08d}", exponent(sigma_rel)
    times = np.repeat([*range(2, step, 2), step], 2)
    found = combine(times, [exponent(0.05), exponent(0.1)] * (len(times) // 2), step, gamma)
    norm = (gamma + 1) / math.sqrt((2 * gamma + 1) * step)
    nearer = 0
    for key, x in loaded(folder, f"sigma_rel={sigma_rel}").items():
        walk = walks[key][:step]
        direct, largest = of_profile(walk, sigma_rel), walk.abs().amax(0)
        bound = found.error * norm * (walk - walk.mean(0)).norm(dim=0)
        stored = sum(map(abs, found.coefficients)) * (U16 * largest + 2.0**-25 + rounding(walk)) + U * largest
        assert ((x - direct).abs() <= bound + stored).all()
        nearer += (walk[-1] - direct).norm() > 3 * (x - direct).norm()
    assert nearer > 0.9 * len(walks)  # than the weights themselves


def test_a_checkpoint_elsewhere_has_its_own_two_averages_alone(run, tmp_path):
    copied = shutil.copytree(checkpoint.latest(run[0].folder), tmp_path / "copied")
    found, expected = loaded(copied, "sigma_rel=0.05"), weights(run[0].folder, "ema-sigma_rel=0.05")
    for key, x in found.items():
        torch.testing.assert_close(x, expected[key], rtol=2 * U, atol=1e-12 * expected[key].abs().max().item())
    with pytest.raises(
        CheckpointError, match=r"cannot be made from the snapshots of 0 earlier steps in .*averages: its profile"
    ):
        load_run(copied, ema="sigma_rel=0.02")


@pytest.mark.parametrize("ema", ["0.99", "sigma_rel=wide", "raw", None, "", "sigma_rel="])
def test_an_average_that_there_is_not_is_an_error_with_those_that_there_are(run, ema):
    there = "there are: default, 0.9, 0.5, sigma_rel=0.08 or another width, none$"
    with pytest.raises(CheckpointError, match=f"step-00000012: there is no average '{ema}'; {there}"):
        load_run(run[0].folder, ema=ema)


def test_widths_need_snapshots_and_must_be_possible(run, with_one):
    told = "there are: default, 0.9, none; widths need a run with training.ema_snapshot_every"
    with pytest.raises(CheckpointError, match=told):
        load_run(with_one.folder, ema="sigma_rel=0.1")
    for width in ("0.3", "0", "nan"):
        with pytest.raises(CheckpointError, match=r"step-00000012: sigma_rel must be above 0 and at most 12\^-0.5"):
            load_run(run[0].folder, ema=f"sigma_rel={width}")


def test_a_damaged_snapshot_is_named(folder):
    path = folder / "averages" / "step-00000010-sigma_rel=0.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_run(folder, ema="0.5").ema == "0.5"
    with pytest.raises(CheckpointError, match=f"{path.name}: .*differs from its checksum in SHA256SUMS"):
        load_run(folder, ema="sigma_rel=0.07")


# On the command line


def test_the_command_line_takes_an_average(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = {}
    for ema in ("default", "0.9", "none", "sigma_rel=0.07"):
        cli.main(["sample", str(run[0].folder), "-n", "1", "--ema", ema, "--out", f"{ema}.png", "--precision", "fp32"])
        pictures[ema] = (tmp_path / f"{ema}.png").read_bytes()
    assert pictures["default"] == pictures["0.9"]
    with pytest.raises(SystemExit) as raised:
        cli.main(["sample", str(run[0].folder), "--ema", "0.99"])
    assert "ddpm-fast sample: " in str(raised.value)
    assert "there is no average '0.99'; there are: default, 0.9, 0.5" in str(raised.value)
    for command in (["evaluate", "run"], ["fit-sampler", "run", "--steps", "5"]):
        assert cli._parser().parse_args([*command, "--ema", "0.5"]).ema == "0.5"
        assert cli._parser().parse_args(command).ema == "default"
