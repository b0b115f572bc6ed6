import json
import subprocess
import sys

import pytest
from test_config import changed

from ddpm_fast import info
from ddpm_fast.app import cli


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code not in (0, None)
    return f"{raised.value.code}{capsys.readouterr().err}"


def test_train_sample_and_resume_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values = changed(diffusion__timesteps=25, training__steps=6)
    (tmp_path / "mine.json").write_text(json.dumps(values))
    cli.main(["train", "mine.json"])
    assert "images/s; see runs/mine" in capsys.readouterr().out
    assert (tmp_path / "runs/mine/samples.png").exists()

    cli.main(["sample", "runs/mine", "-n", "3", "--seed", "5", "--sampler", "ddim", "--steps", "4", "--out", "some"])
    assert "some: 3 images" in capsys.readouterr().out
    for sampler in ("--sampler=ddpm", "--sampler=dpmpp_2m", "--sampler=dpmpp_2m_sde"):
        cli.main(["sample", "runs/mine", "-n", "3", "--steps", "4", sampler])
    cli.main(["sample", "runs/mine", "-n", "3", "--steps", "4"])
    assert (tmp_path / "samples.png").exists()

    assert "holds a run already; continue it with --resume" in fails(capsys, "train", "mine.json")
    (tmp_path / "mine.json").write_text(json.dumps(values | {"training": values["training"] | {"steps": 8}}))
    cli.main(["train", "mine.json", "--resume"])
    assert (tmp_path / "runs/mine/checkpoints/step-00000008").exists()


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


def test_steps_that_cannot_be_are_told_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(changed(diffusion__timesteps=25, training__steps=1)))
    cli.main(["train", "mine.json"])
    assert "steps must be a whole number in [1, 26)" in fails(capsys, "sample", "runs/mine", "--steps", "26")
    assert "at least 1, got 0" in fails(capsys, "sample", "runs/mine", "-n", "0")
    assert "PSD pictures can be read, but not written" in fails(capsys, "sample", "runs/mine", "--out", "x.psd")
    assert not (tmp_path / "x.psd").exists()


@pytest.mark.parametrize(("raised", "told"), [(KeyboardInterrupt(), "stopped"), (KeyboardInterrupt("why"), "why")])
def test_ctrl_c_is_told_and_ends_as_a_shell_expects(tmp_path, monkeypatch, capsys, raised, told):
    def interrupted(folder):
        raise raised

    monkeypatch.setattr("ddpm_fast.training.trainer.load_run", interrupted)
    assert fails(capsys, "sample", str(tmp_path)) == f"130\nddpm-fast sample: {told}\n"


def test_estimate_tells_time_and_memory(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(changed()))
    cli.main(["estimate", str(tmp_path / "mine.json")])
    out = capsys.readouterr().out
    for name in ("network", "device", "step", "run", "memory", "peak"):
        assert f"\n{name} " in f"\n{out}"
    assert "s for 4 images" in out


def test_info_names_versions_devices_and_why_a_backend_is_missing(capsys):
    cli.main(["info"])
    out = capsys.readouterr().out
    for name in ("ddpm_fast", "torch", "python", "reference", "cpu", "cuda", "triton"):
        assert name in out
    for available, reason in info.backends().values():
        assert available or reason


@pytest.mark.parametrize("module", ["ddpm_fast", "ddpm_fast.info"])
def test_modules_run_as_commands(module):
    arguments = ["info"] if module == "ddpm_fast" else []
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    assert "backends" in result.stdout


def test_the_core_imports_without_the_training_extra():
    code = "import sys; sys.modules.update(pydantic=None, PIL=None, safetensors=None, sklearn=None); import ddpm_fast"
    code += "; from ddpm_fast.app.cli import main; main(sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, check=True).stdout
    result = subprocess.run([sys.executable, "-c", code, "train", "digits"], capture_output=True, text=True)
    assert 'pip install "ddpm_fast[train]"' in result.stderr
    assert result.returncode == 1
