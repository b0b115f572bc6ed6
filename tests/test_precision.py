"""The precision of training and sampling: what `auto` chooses, and what a run keeps when it goes on elsewhere."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_config import changed
from training_runs import assert_same_weights, losses, small, without_curve  # noqa: F401

from ddpm_fast.app import cli, generate
from ddpm_fast.training import checkpoint, precision, report, trainer
from ddpm_fast.training.config import check
from ddpm_fast.training.run import RunError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def computes(monkeypatch):
    """Sets whether devices compute in bfloat16."""

    def set_to(value):
        monkeypatch.setattr(precision, "computes_in_bfloat16", lambda kind: value)

    return set_to


def test_auto_is_the_fastest_that_a_device_has(computes, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    computes(True)
    assert precision.chosen("auto", CPU) == precision.chosen("auto", GPU) == "bf16"
    computes(False)
    assert precision.chosen("auto", CPU) == "fp32"
    assert precision.chosen("auto", GPU) == "fp16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert precision.chosen("auto", GPU) == "fp32"
    for name in precision.PRECISIONS:
        assert precision.chosen(name, CPU) == name


@pytest.mark.parametrize(
    ("capability", "name"), [((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_is_bfloat16_on_gpus_that_compute_in_it_and_not_where_it_is_emulated(capability, name, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device=None: SimpleNamespace(major=capability[0], minor=capability[1]),
    )
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    assert precision.chosen("auto", GPU) == name


def test_auto_trains_in_bfloat16_where_that_is_fast_and_says_so(computes, tmp_path):
    computes(True)
    auto = trainer.train(small(), tmp_path / "auto")
    assert auto.metrics["precision"] == "bf16"
    trainer.train(small(training__precision="bf16"), tmp_path / "bf16")
    assert_same_weights(tmp_path / "auto", tmp_path / "bf16")
    assert all(p.dtype == torch.float32 for p in auto.diffusion.parameters())


def test_a_run_keeps_its_precision_on_another_device(computes, tmp_path):
    computes(True)
    trainer.train(small(), tmp_path / "whole")
    trainer.train(small(training__steps=8), tmp_path / "parts")
    computes(False)
    resumed = trainer.train(small(), tmp_path / "parts", resume=True)
    assert resumed.metrics["precision"] == "bf16"
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(RunError, match=r"training\.precision was 'auto', now 'fp32'"):
        trainer.train(small(training__precision="fp32", training__steps=16), tmp_path / "parts", resume=True)


def test_a_checkpoint_without_a_precision_goes_on_in_that_of_its_config(computes, tmp_path):
    trainer.train(small(training__steps=8, training__precision="bf16"), tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run")
    state = json.loads((newest / "state.json").read_text())
    del state["precision"], state["scaler"], state["format"], state["data"]  # as the first format was
    (newest / "state.json").write_text(json.dumps(state))
    (newest / checkpoint.SUMS).unlink()
    computes(False)
    assert trainer.train(small(), tmp_path / "run", resume=True).metrics["precision"] == "bf16"


def test_float16_tracks_float32_and_resumes_with_its_scale(tmp_path):
    changes = {"training__steps": 40, "training__save_every": 20, "training__sample_every": 1000, "training__lr": 5e-3}
    curves = []
    for name in ("fp32", "fp16"):
        result = trainer.train(check(changed(**changes, training__precision=name)), tmp_path / name)
        curves.append(torch.tensor(losses(result)))
    exact, rounded = curves
    assert exact[-5:].mean() < exact[:5].mean() / 1.5
    # A step is left out while the scale is still too large, so that the curves are a step or two apart.
    assert ((rounded - exact).abs() / exact).max() < 0.15

    half = changes | {"training__steps": 20, "training__precision": "fp16"}
    trainer.train(check(changed(**half)), tmp_path / "parts")
    scale = checkpoint.load_state(checkpoint.latest(tmp_path / "parts"))["scaler"]
    assert scale["scale"] > 1
    assert scale["_growth_tracker"] > 0
    trainer.train(check(changed(**changes, training__precision="fp16")), tmp_path / "parts", resume=True)
    assert_same_weights(tmp_path / "fp16", tmp_path / "parts")


def test_samples_are_computed_in_the_precision_that_is_asked_for(computes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, seen = trainer.train(small(), tmp_path / "run"), []
    original = generate.sample_batches

    def sample_batches(run, *args, **kwargs):
        seen.extend({p.dtype for p in run.diffusion.model.parameters()})
        return original(run, *args, **kwargs)

    monkeypatch.setattr(generate, "sample_batches", sample_batches)
    for fast in (False, True):
        computes(fast)
        cli.main(["sample", "run", "-n", "4"])
    for name in precision.PRECISIONS:
        cli.main(["sample", "run", "-n", "4", "--precision", name])
    assert seen == [torch.float32, torch.bfloat16, *precision.PRECISIONS.values()]
    exact, rounded = (run.in_precision(name).diffusion.sample(4, seed=0) for name in ("fp32", "bf16"))
    assert 0 < (exact - rounded).abs().mean() < 0.05
    assert next(run.diffusion.model.parameters()).dtype == torch.float32


def test_previews_and_pictures_are_computed_as_the_training(computes, tmp_path, monkeypatch):
    computes(True)
    seen = []
    original = report.sample_batches

    def sample_batches(run, *args, **kwargs):
        seen.append({p.dtype for p in run.diffusion.model.parameters()})
        return original(run, *args, **kwargs)

    monkeypatch.setattr(report, "sample_batches", sample_batches)
    trainer.train(small(), tmp_path / "run")
    assert seen == [{torch.bfloat16}] * 2
