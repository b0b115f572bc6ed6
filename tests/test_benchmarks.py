"""The scripts in benchmarks/ run to the end and write what their help says. Nothing here depends on speed."""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from ddpm_fast import GaussianDiffusion

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = ["--preset", "digits-8", "--batch", "2", "--rounds", "3", "--device", "cpu"]
PEERS = ("diffusers", "denoising_diffusion_pytorch")
SCRIPTS = ("sample_speed", "train_speed")


def run(command, folder):
    finished = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_a_table_and_writes_all_it_found(script, tmp_path):
    files = ["--json", "report.json", "--plot", "plot.png"]
    finished = run([FOLDER / f"{script}.py", *TINY, *files], tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    dtypes = list(report["matrix_rate"])
    expected = [("ddpm_fast", dtype, "") for dtype in dtypes] + [("ddpm_fast", dtypes[-1], "reference")]
    if find_spec("diffusers"):
        expected += [("diffusers", dtype, "" if dtype == "fp32" else "channels-last") for dtype in dtypes]
        expected += [("diffusers", dtypes[-1], "optimize")] if script == "sample_speed" else []
    if find_spec("denoising_diffusion_pytorch"):
        expected.append(("denoising_diffusion_pytorch", "fp32", ""))
    assert [(row["family"], row["dtype"], row["how"]) for row in report["contenders"]] == expected
    assert set(report["missing"]) == {name for name in PEERS if not find_spec(name)}
    for row in report["contenders"]:
        assert row["name"] in finished.stdout
        assert len(row["seconds"]) == report["rounds"] == 3
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["gflop"] > 0
        assert (row["speed_up"] is None) == (row["family"] == PEERS[1] or "diffusers" in report["missing"])
        if script == "train_speed":
            assert row["bytes_for_backward"] > 0
    assert len({row["gflop"] for row in report["contenders"] if row["family"] != PEERS[1]}) == 1  # one network
    environment = report["environment"]
    assert {"date", "commit", "versions", "cpu", "isa", "threads", "preset", "batch"} <= set(environment)
    assert environment["threads"] == 1


@pytest.mark.skipif(not any(map(find_spec, PEERS)), reason="the peers are missing anyway")
@pytest.mark.parametrize("script", SCRIPTS)
def test_peers_may_be_missing(script, tmp_path, monkeypatch, capsys):
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # it cannot be imported
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)  # a script has its process for itself, and a core
    monkeypatch.setattr(sys, "argv", [script, *TINY, "--json", str(tmp_path / "report.json")])
    with inductor.patch(freezing=False):  # put back at the end
        importlib.import_module(script).main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["family"] for row in report["contenders"]} == {"ddpm_fast"}
    assert set(report["missing"]) == set(PEERS)
    for output in capsys.readouterr():
        assert 'pip install ".[compat]"' in output


def test_one_weight_that_differs_is_seen_before_training_is_timed():
    pytest.importorskip("diffusers")
    import train_speed
    from speed.networks import networks

    ours, theirs, *_ = networks("digits-8", "cpu")
    diffusion = GaussianDiffusion(ours, image_size=8, objective="pred_noise", beta_schedule="linear")
    our_losses = {torch.float32: train_speed.our_loss(diffusion, torch.float32)}
    loss = train_speed.their_loss(theirs, torch.float32, torch.contiguous_format, "cpu")
    given = our_losses, {torch.float32: theirs}, {torch.float32: loss}
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    train_speed.check(ours, *given, images)
    with torch.no_grad():
        ours.conv_in.weight[3, 0, 1, 1] *= 1.05
    with pytest.raises(AssertionError, match=r"fp32: the gradient of .* apart"):
        train_speed.check(ours, *given, images)


def test_attention_of_large_heads_has_a_row_for_each_size(monkeypatch, capsys):
    import attention

    monkeypatch.setattr(sys, "argv", ["attention.py", "--device", "cpu", "--batch", "1", "2", "--seconds", "0.001"])
    attention.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("| 1", "256"), ("| 2", "256"), ("| 1", "512"), ("| 2", "512")]
    assert all(float(row[4].removesuffix(" |")) < 2**-6 for row in rows)
