import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_config import changed

from ddpm_fast import info, samplers
from ddpm_fast.app import cli
from ddpm_fast.training import checkpoint, trainer
from ddpm_fast.training import run as training_run
from ddpm_fast.training.config import check


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code not in (0, None)
    return f"{raised.value.code}{capsys.readouterr().err}"


def test_train_sample_and_resume_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = changed(diffusion__timesteps=25, training__steps=6, training__batch_size=32)
    (tmp_path / "mine.json").write_text(json.dumps(values))
    cli.main(["train", "mine.json"])
    told = capsys.readouterr().out
    assert told.startswith("training into runs/mine\n")
    assert "images/s; see runs/mine" in told
    assert (tmp_path / "runs/mine/samples.png").exists()

    cli.main(["sample", "runs/mine", "-n", "3", "--seed", "5", "--sampler", "ddim", "--steps", "4", "--out", "some"])
    assert "some: 3 images" in capsys.readouterr().out
    for sampler in samplers.SAMPLERS:
        cli.main(["sample", "runs/mine", "-n", "3", "--steps", "4", "--sampler", sampler, "--spacing", "trailing"])
    cli.main(["sample", "runs/mine", "-n", "3", "--steps", "4"])
    assert (tmp_path / "samples.png").exists()

    assert "holds a run already; continue it with --resume" in fails(capsys, "train", "mine.json")
    (tmp_path / "mine.json").write_text(json.dumps(values | {"training": values["training"] | {"steps": 8}}))
    cli.main(["train", "mine.json", "--resume"])
    assert capsys.readouterr().out.startswith("continuing the run in runs/mine\n")
    assert (tmp_path / "runs/mine/checkpoints/step-00000008").exists()


@pytest.fixture
def trained_folders(monkeypatch):
    """The folders that `train` is called with, instead of training."""
    folders = []

    def train(config, folder, *, resume):
        folders.append((folder, resume))
        return training_run.Run(folder, config, None, {"loss": 1.0, "images_per_second": 1.0})

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(training_run, "pictures_are_due", lambda run: False)
    return folders


def test_the_config_of_a_run_trains_in_the_folder_of_the_run(tmp_path, monkeypatch, trained_folders):
    monkeypatch.chdir(tmp_path)
    run = Path("runs", "mine")
    run.mkdir(parents=True)
    written = json.dumps(check(changed()).model_dump(mode="json"), indent=2) + "\n"
    (run / "config.json").write_text(written)
    cli.main(["train", "runs/mine/config.json", "--resume"])  # before the first checkpoint
    (run / "config.json").write_text(json.dumps(changed()))
    (run / "checkpoints").mkdir()
    cli.main(["train", "runs/mine/config.json"])
    cli.main(["train", "runs/mine/config.json", "--out", "runs/other"])
    (tmp_path / "config.json").write_text(json.dumps(changed()))  # a user's
    cli.main(["train", "config.json"])
    assert trained_folders == [
        (run, True),
        (run, False),
        (Path("runs/other"), False),
        (Path("runs/config"), False),
    ]


def test_a_tilde_is_the_home_folder_and_a_name_of_dots_gives_no_folder(tmp_path, monkeypatch, capsys, trained_folders):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine.json", "..json", "...json"):
        (tmp_path / name).write_text(json.dumps(changed()))
    cli.main(["train", "~/mine.json", "--out", "~/run"])
    cli.main(["train", "~/...json", "--out", "~/run"])
    assert [folder for folder, _ in trained_folders] == [tmp_path / "run"] * 2
    for name in ("..json", "...json"):
        assert "choose a folder with --out" in fails(capsys, "train", f"~/{name}")
    assert f"{tmp_path}/run: no checkpoint here" in fails(capsys, "sample", "~/run")
    assert len(trained_folders) == 2


def test_mistakes_are_one_line_and_no_traceback(tmp_path, capsys):
    (tmp_path / "bad.json").write_text(json.dumps(changed(training__lr=-1)))
    assert fails(capsys, "train", str(tmp_path / "bad.json")).startswith("ddpm-fast train: ")
    assert "training.lr: given -1" in fails(capsys, "estimate", str(tmp_path / "bad.json"))
    assert "no such file" in fails(capsys, "train", "nowhere.json")
    assert "no checkpoint here" in fails(capsys, "sample", str(tmp_path))
    assert "invalid choice: 'plms'" in fails(capsys, "sample", str(tmp_path), "--sampler", "plms")
    assert "COMMAND" in fails(capsys)


def test_places_that_cannot_be_written_are_told_without_a_traceback(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(changed(training__steps=1)))
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, "train", str(tmp_path / "mine.json"), "--out", str(tmp_path / "file" / "run"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = check(changed(diffusion__timesteps=25, training__steps=1))
    return str(trainer.train(config, tmp_path_factory.mktemp("runs") / "mine").folder)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "26"], "steps must be an integer in [1, 26)"),
        (["--steps", "0"], "steps must be an integer in [1, 26)"),
        (["-n", "0"], "at least 1, got 0"),
        (["-n", "-1"], "at least 1, got -1"),
        (["--seed", str(2**64), "--out", "new/grid.png"], "seed must be an integer in"),
        (["--out", "x.psd"], "PSD pictures can be read, but not written"),
        (["--out", "file/grid.png"], "file"),
    ],
)
def test_numbers_and_places_that_cannot_be_are_one_line(trained, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as raised:
        cli.main(["sample", trained, *arguments])
    message = raised.value.code
    assert message.startswith("ddpm-fast sample: ")
    assert told in message
    assert len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Signalled(KeyboardInterrupt):
    number = 15


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (KeyboardInterrupt(), "130\nddpm-fast sample: stopped\n"),
        (KeyboardInterrupt("why"), "130\nddpm-fast sample: why\n"),
        (Signalled("why"), "143\nddpm-fast sample: why\n"),
        (SystemExit(129), "129"),
        (
            OSError(28, "No space left on device", "runs/x"),
            "ddpm-fast sample: [Errno 28] No space left on device: 'runs/x'",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed: 9"),
            "ddpm-fast sample: a process that loads images has failed: DataLoader worker (pid 7) is killed: 9",
        ),
    ],
)
def test_signals_and_failures_of_the_system_are_one_line_and_an_exit_status(
    tmp_path, monkeypatch, capsys, raised, told
):
    def interrupted(folder, **chosen):
        raise raised

    monkeypatch.setattr(training_run, "load_run", interrupted)
    assert fails(capsys, "sample", str(tmp_path)) == told


def test_an_error_of_the_program_itself_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(folder, **chosen):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(training_run, "load_run", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cli.main(["sample", str(tmp_path)])


def test_weights_that_are_not_finite_give_no_pictures(trained, tmp_path, monkeypatch, capsys):
    load_weights = checkpoint.load_weights

    def diverged(folder, name, tensors):
        load_weights(folder, name, tensors)
        next(iter(tensors.values())).fill_(float("nan"))

    monkeypatch.setattr(checkpoint, "load_weights", diverged)
    for out in ("grid.png", "folder"):
        assert "finite" in fails(capsys, "sample", trained, "-n", "2", "--steps", "2", "--out", str(tmp_path / out))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_samplers_that_are_registered_later_can_be_chosen(monkeypatch, capsys):
    monkeypatch.setitem(samplers.SAMPLERS, "mine", samplers.ddim)
    assert cli._parser().parse_args(["sample", "run", "--sampler", "mine"]).sampler == "mine"
    told = fails(capsys, "sample", "run", "--sampler", "plms")
    assert all(name in told.partition("choose from")[2] for name in samplers.SAMPLERS)


def test_info_names_versions_devices_and_why_a_backend_is_missing(capsys):
    cli.main(["info"])
    out = capsys.readouterr().out
    for name in ("ddpm_fast", "torch", "python", "reference", "cpu", "cuda", "triton"):
        assert name in out
    for available, reason in info.backends().values():
        assert available or reason


@pytest.mark.parametrize(("module", "arguments"), [("ddpm_fast", ["info"]), ("ddpm_fast.info", [])])
def test_modules_run_as_commands(monkeypatch, capsys, module, arguments):
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, "ddpm_fast.info")  # runpy warns of a module that is imported already
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "backends" in capsys.readouterr().out


def test_the_core_imports_without_the_training_extra():
    code = "import sys; sys.modules.update(pydantic=None, PIL=None, safetensors=None, sklearn=None); import ddpm_fast"
    code += "; from ddpm_fast.app.cli import main; main(['info']); main(['train', 'digits'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "backends" in result.stdout
    assert 'pip install "ddpm_fast[train]"' in result.stderr
    assert result.returncode == 1
