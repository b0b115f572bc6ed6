"""Small runs for the tests of training."""

from pathlib import Path

import pytest
import safetensors.torch
from test_config import changed

from ddpm_fast.training import checkpoint, report, run, trainer
from ddpm_fast.training.config import RunConfig, check

TINY = {"image_size": 8, "channels": 1, "dim": 8, "dim_mults": [1], "num_res_blocks": 1, "attention_resolutions": []}

PLOTS = ("save_loss", "save_timestep_losses")  # that a report draws


def small(**changes) -> RunConfig:
    """Twelve steps with dropout, flips and an average, saved after every fourth; `section__key=value` changes one."""
    defaults = {
        "model": TINY | {"norm_groups": 4, "dropout": 0.1},
        "data__flip": True,
        "diffusion__timesteps": 10,
        "diffusion__beta_schedule": "cosine",
        "training__steps": 12,
        "training__save_every": 4,
        "training__sample_every": 5,
        "training__ema_decay": 0.9,
    }
    return check(changed(**(defaults | changes)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of `small()`, complete with pictures."""
    result = trainer.train(small(), tmp_path_factory.mktemp("runs") / "small")
    run.write_pictures(result, n=9)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of `small()` without plots."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PLOTS:
            patch.setattr(report, name, lambda *arguments: None)
        return trainer.train(small(), tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(autouse=True)
def without_curve(monkeypatch):
    """Plots are drawn by `finished` alone: they take matplotlib longer than the rest of such a run."""
    for name in PLOTS:
        monkeypatch.setattr(report, name, lambda *arguments: arguments[-1].touch())


def weights(folder: Path, name: str) -> dict:
    return safetensors.torch.load_file(checkpoint.latest(folder) / f"{name}.safetensors")


def losses(result: run.Run) -> list[float]:
    return [loss for _, loss in result.metrics["history"]]


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit, in the newest checkpoints of two runs."""
    for name in ("model", "ema"):
        expected, found = weights(one, name), weights(other, name)
        assert expected.keys() == found.keys()
        assert all((expected[key] == found[key]).all() for key in expected)
