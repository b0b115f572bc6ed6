"""A run from a folder of images on a GPU, with workers and previews, by the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_folder_of_images_is_trained_on_and_sampled(tmp_path, precision):
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    config = {
        "data": {"name": "folder", "path": "images", "image_size": 32},
        "model": {"image_size": 32, "dim": 64, "dim_mults": [1, 2], "attention_resolutions": [16]},
        "diffusion": {"timesteps": 100, "beta_schedule": "cosine"},
        "training": {
            "steps": 40, "batch_size": 16, "lr": 1e-3, "workers": 2, "precision": precision, "save_every": 20,
            "sample_every": 20,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def ddpm_fast(*arguments):
        command = [sys.executable, "-m", "ddpm_fast", *arguments]
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return finished.stderr

    assert "cannot be captured" not in ddpm_fast("train", "config.json", "--out", "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["device"].startswith("cuda")
    assert 0 < metrics["loss"] < 2
    assert [path.name for path in (tmp_path / "run" / "previews").iterdir()] == ["step-00000020.png"]
    ddpm_fast("sample", "run", "-n", "20", "--steps", "10", "--out", "samples")
    assert len([*(tmp_path / "samples").iterdir()]) == 20
