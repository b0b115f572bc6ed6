"""tools/accept_gpu, with commands that need no GPU in place of its own."""

import json
import os
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch
from speed.options import options

SCRIPT = Path(__file__).parent.parent / "tools" / "accept_gpu"
MACHINE = {"GPU": "a GPU", "torch": torch.__version__}


@pytest.fixture
def tool(monkeypatch):
    spec = spec_from_loader("accept_gpu", SourceFileLoader("accept_gpu", str(SCRIPT)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "gpu", lambda: MACHINE)
    return module


def accept(tool, monkeypatch, folder, commands, *options):
    """Takes steps that run Python code; the exit status, and the report."""

    def steps(out):
        return [tool.Step(name, "", limit, [sys.executable, "-c", code], {}) for name, limit, code in commands]

    monkeypatch.setattr(tool, "steps", steps)
    monkeypatch.setattr(sys, "argv", ["accept_gpu", "--out", str(folder), *options])
    status = tool.main()
    return status, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_0(tmp_path):
    found = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "PyTorch finds no NVIDIA GPU here, so there is nothing to accept.\n"
    assert not [*tmp_path.iterdir()]


def test_a_step_that_fails_or_takes_too_long_does_not_end_the_run(tool, monkeypatch, tmp_path):
    child = f"import time; time.sleep(60) # {tmp_path}"
    waits = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    commands = [("first", 60, "print('fine')"), ("bad", 60, "1 / 0"), ("slow", 2, waits), ("last", 60, "print('done')")]
    began = time.monotonic()
    status, report, text = accept(tool, monkeypatch, tmp_path / "out", commands)
    assert time.monotonic() - began < 30
    assert status == 1
    assert report["machine"] == MACHINE
    assert [(s["name"], s["outcome"]) for s in report["steps"]] == [
        ("first", "passed"), ("bad", "failed"), ("slow", "timed out"), ("last", "passed"),
    ]  # fmt: skip
    assert report["steps"][0]["output"] == "fine\n"
    assert "ZeroDivisionError" in text
    assert (tmp_path / "out" / "last.log").read_text() == "done\n"
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in listed.splitlines() if f"# {tmp_path}" in line]  # nor its child


def test_chosen_steps_replace_those_of_the_report(tool, monkeypatch, tmp_path):
    commands = [("one", 60, "1 / 0"), ("two", 60, "print(2)")]
    assert accept(tool, monkeypatch, tmp_path, commands)[0] == 1
    status, report, _ = accept(tool, monkeypatch, tmp_path, [("one", 60, "print(1)"), commands[1]], "--only", "on")
    assert status == 0
    assert [(s["name"], s["output"]) for s in report["steps"]] == [("one", "1\n"), ("two", "2\n")]
    with pytest.raises(SystemExit):
        accept(tool, monkeypatch, tmp_path, commands, "--only", "three")


def test_its_own_steps_are_files_that_are_there_with_options_they_know(tool, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)  # a script has its process for itself, and a core
    steps = tool.steps(tmp_path)
    assert len({step.name for step in steps}) == len(steps)
    assert sum(step.limit for step in steps) < 75 * 60
    for step in steps:
        words = [word for word in step.command if word.startswith(("benchmarks/", "tests/", "tools/", "setup.py"))]
        assert all((SCRIPT.parent.parent / word).exists() for word in words), step
        if step.name.startswith(("sample", "train")):
            monkeypatch.setattr(sys, "argv", step.command[1:])
            assert options("").compile
