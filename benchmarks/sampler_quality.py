"""Quality against steps, for each sampler: `python benchmarks/sampler_quality.py RUN`, a run trained on Fashion-MNIST.

Quality is a Frechet distance (Heusel et al. 2017, eq. 6), between samples and the 10,000 test images, in the features
of a small classifier that is trained here on the same data: it has seen clothes, where Inception has seen photographs.
Its numbers cannot be compared with those of Inception. The distance of 10,000 training images is the floor.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.training.data import read_idx
from ddpm_fast.training.trainer import load_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {  # label -> sampler, eta, steps
    "ddpm": ("ddpm", None, (10, 20, 50, 100, 250, 1000)),
    "ddim, eta = 0": ("ddim", 0.0, (5, 10, 20, 50, 100)),
    "ddim, eta = 1": ("ddim", 1.0, (5, 10, 20, 50, 100)),
    "dpmpp_2m": ("dpmpp_2m", None, (5, 10, 20, 50, 100)),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", None, (5, 10, 20, 50, 100)),
}
BATCH = 250


class Classifier(nn.Module):
    """Two convolutions and two linear layers, the first of which gives the features, (N, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 64)),
        )
        self.classes = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images, (N, 1, 28, 28), to logits."""
        return self.classes(self.features(images.float() / 127.5 - 1))


def read_labels(path: Path) -> Tensor:
    with gzip.open(path) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64))


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 4) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    for epoch in range(epochs):
        for indices in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"classifier: epoch {epoch + 1} of {epochs}, loss {loss:.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def moments(model: Classifier, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the features."""
    features = torch.cat([model.features(part.float() / 127.5 - 1) for part in images.split(1000)]).double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root_trace = np.sqrt(scipy.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace)


def plot(results: dict[str, dict[int, float]], floor: float, n: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, by_steps in results.items():
        axes.plot(by_steps.keys(), by_steps.values(), marker="o", label=label)
    axes.axhline(floor, color="grey", linestyle="--", label="real images")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"Frechet distance, {n:,} samples")
    ticks = sorted({step for by_steps in results.values() for step in by_steps})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set_title("Fashion-MNIST, in the features of a classifier of its own")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run trained on Fashion-MNIST")
    parser.add_argument("-n", type=int, default=2000, help="samples for each point (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the distances there")
    parser.add_argument("--plot", type=Path, default=Path("sampler_quality.png"), help="default: %(default)s")
    options = parser.parse_args()

    run = load_run(options.run)
    folder = Path(run.config.data.path).parent
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    if not all((folder / name).exists() for name in names):
        sys.exit(f"sampler_quality: {folder} lacks one of {', '.join(names)}")
    images, test = (read_idx(folder / name) for name in names[:2])
    images, test = (x.view(-1, 1, 28, 28) for x in (images, test))
    classifier = train_classifier(images, read_labels(folder / names[2]))
    reference = moments(classifier, test)
    floor = frechet_distance(moments(classifier, images[: len(test)]), reference)
    print(f"floor: {floor:.3f}", flush=True)

    results: dict[str, dict[int, float]] = {label: {} for label in RUNS}
    for label, (sampler, eta, all_steps) in RUNS.items():
        for steps in all_steps:
            parts = []
            for first in range(0, options.n, BATCH):
                size = min(BATCH, options.n - first)
                drawn = run.diffusion.sample(size, sampler=sampler, eta=eta, steps=steps, seed=0, sample_offset=first)
                parts.append((drawn * 255).round().to(torch.uint8))
            results[label][steps] = frechet_distance(moments(classifier, torch.cat(parts)), reference)
            print(f"{label:<14} {steps:>5} steps: {results[label][steps]:.3f}", flush=True)
    plot(results, floor, options.n, options.plot)
    if options.json:
        options.json.write_text(json.dumps({"floor": floor, "n": options.n, "distances": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
