"""ddpm-fast evaluate: the variational bound of a run."""

import gzip
import json
import math

import pytest
import torch
from training_runs import finished, small, without_curve  # noqa: F401

from ddpm_fast.app import cli
from ddpm_fast.app.evaluate import evaluate
from ddpm_fast.training import trainer
from ddpm_fast.training.data import DataError, open_data
from ddpm_fast.training.run import load_run


def test_the_command_prints_the_mean_of_the_bound_and_writes_its_terms(finished, capsys):  # noqa: F811
    cli.main(["evaluate", str(finished.folder), "-n", "40", "--steps", "0", "--precision", "fp32"])
    out = capsys.readouterr().out
    found = json.loads((finished.folder / "likelihood.json").read_text())
    assert out.startswith("40 images of digits, 10 timesteps each, float32\n")
    assert f"{found['total']:.4f} +- {found['total_error']:.4f}" in out
    assert (finished.folder / "likelihood.png").stat().st_size > 1000

    run = load_run(finished.folder)
    chosen = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:40]
    bound = run.diffusion.likelihood(open_data(run.config.data)[chosen.tolist()], seed=0)
    # The same noise in other batches: float32 networks differ by rounding.
    close = {"rel": 1e-4}
    assert found["total"] == pytest.approx(bound.total_bpd.mean().item(), **close)
    assert found["total_error"] == pytest.approx(bound.total_bpd.std().item() / math.sqrt(40), **close)
    assert found["reconstruction"] == pytest.approx(bound.vb[:, 0].mean().item(), **close)
    parts = found["prior"] + found["transitions"] + found["reconstruction"]
    assert parts == pytest.approx(found["total"])
    assert found["nats"] == pytest.approx(bound.total_nats.mean().item(), **close)
    # With all timesteps, the ranges hold each once.
    curve = found["curve"]
    assert [t for first, last, *_ in curve for t in range(first, last + 1)] == list(range(10))
    total = sum((last - first + 1) * term for first, last, term, *_ in curve)
    assert total + found["prior"] == pytest.approx(found["total"])


def test_other_images_and_fewer_timesteps(tmp_path, capsys):
    """An estimate lies within five of its standard errors of all timesteps' mean."""
    header = (0x0803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (60, 8, 8))
    for name in ("train", "test"):
        pixels = torch.randint(0, 256, (60, 8, 8), dtype=torch.uint8)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + pixels.numpy().tobytes()))
    config = small(data={"name": "idx", "path": str(tmp_path / "train.gz")}, training__steps=4)
    run = trainer.train(config, tmp_path / "run")
    cli.main(["evaluate", str(tmp_path / "run"), "--real", str(tmp_path / "test.gz"), "--steps", "5"])
    assert f"60 images of {tmp_path / 'test.gz'}, 5 timesteps each" in capsys.readouterr().out
    some, every = (evaluate(run, real=tmp_path / "test.gz", steps=steps, precision="fp32") for steps in (5, None))
    assert abs(some.total - every.total) < 5 * some.total_error
    assert some.total != every.total
    assert evaluate(run, steps=5).data == str(tmp_path / "train.gz")


def test_what_cannot_be_evaluated_is_an_error(finished, tmp_path, capsys, monkeypatch):  # noqa: F811
    def told(*arguments):
        with pytest.raises(SystemExit) as raised:
            cli.main(["evaluate", str(finished.folder), *arguments])
        return str(raised.value.code)

    assert "at least 2, got 1" in told("-n", "1")
    assert "steps must be an integer in [3, 11), got 2" in told("-n", "4", "--steps", "2")
    assert "trained on the digits" in told("--real", str(tmp_path))
    monkeypatch.setattr(finished.diffusion, "image_size", (16, 16))
    with pytest.raises(DataError, match=r"the images are \(1, 8, 8\) .* and the model takes \(1, 16, 16\)"):
        evaluate(finished)
