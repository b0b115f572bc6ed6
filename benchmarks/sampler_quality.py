"""Quality against steps, for each sampler: `python benchmarks/sampler_quality.py RUN`.

RUN is trained on Fashion-MNIST or on the digits. Samplers that `ddpm-fast fit-sampler RUN` has fitted are shown too.

Quality is the Frechet distance (Heusel et al. 2017, eq. 6) between samples and the 10,000 test images (of the digits,
every second image), in the features of a small classifier. The classifier is trained here on the same data, so it has
seen clothes, where Inception has seen photographs. The distance is divided by the variance of the test images' features
(the trace of their covariance), so that 1 is the distance from images to their mean, whatever the classifier's scale.
It cannot be compared with distances in Inception's features. The script also prints the distance of as many training
images, which no sampler can be expected to beat, and those of training images that were blurred or moved. It takes half
an hour on one core with AMX.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast.training.data import open_data, read_idx
from ddpm_fast.training.pictures import to_uint8
from ddpm_fast.training.run import Run, load_run, sample_batches

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = {  # label -> sampler, eta, steps
    "ddpm": ("ddpm", None, (10, 20, 50, 100, 250)),  # the same as ddim with eta = 1
    "ddim, eta = 0": ("ddim", 0.0, (4, 5, 6, 8, 10, 20, 50)),
    "dpmpp_2m": ("dpmpp_2m", None, (4, 5, 6, 8, 10, 20, 50)),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", None, (4, 5, 6, 8, 10, 20, 50)),
    "unipc": ("unipc", None, (4, 5, 6, 8, 10, 20, 50)),
    "heun": ("heun", None, (4, 5, 6, 8, 10, 20, 50)),  # calls of the network
}
EPOCHS = {"idx": 4, "digits": 40}
TITLES = {"idx": "Fashion-MNIST", "digits": "Digits"}


class Classifier(nn.Module):
    """Two convolutions and two linear layers; the output of the first linear layer is the features."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (image_size // 4) ** 2, 64)),
        )
        self.classes = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) of uint8 images (N, 1, H, W)."""
        return self.layers(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.features(images))  # logits


def labelled_images(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """The images that the run was trained on, (N, 1, H, W), uint8, their labels, and those to compare samples with."""
    if run.config.data.name == "digits":
        images, labels = open_data(run.config.data).images, torch.from_numpy(load_digits().target)
        return images[::2], labels[::2], images[1::2]
    folder = Path(run.config.data.path).parent
    names = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    if not all((folder / name).exists() for name in names):
        sys.exit(f"sampler_quality: {folder} lacks one of {', '.join(names)}")
    images, test = (read_idx(folder / name)[:, None] for name in names[:2])
    return images, read_idx(folder / names[2], axes=1), test


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(images.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    for epoch in range(epochs):
        for indices in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(model(images[indices]), labels[indices].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"classifier: epoch {epoch + 1} of {epochs}, loss {loss:.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def moments(model: Classifier, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the features."""
    features = torch.cat([model.features(part) for part in images.split(1000)]).double().numpy()
    return features.mean(axis=0), np.cov(features, rowvar=False)


def distance(found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> float:
    """The Frechet distance between two normal distributions, divided by the variance of `wanted`."""
    (mean_a, cov_a), (mean_b, cov_b) = found, wanted
    root_trace = np.sqrt(scipy.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    squared = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    return float(squared / np.trace(cov_b))


def plot(results: dict[str, dict[int, float]], yardsticks: dict[str, float], n: int, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, by_steps in results.items():
        axes.plot(by_steps.keys(), by_steps.values(), marker="o", label=label)
    steps = sorted({step for by_steps in results.values() for step in by_steps})
    for label, value in yardsticks.items():
        axes.axhline(value, color="grey", linestyle="--", linewidth=1)
        axes.annotate(label, (steps[-1], value), (0, 3), textcoords="offset points", color="grey", ha="right")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=f"Frechet distance / variance, {n:,} samples")
    axes.set_xticks(steps, steps)
    axes.minorticks_off()
    axes.set_title(f"{title}, in the features of a classifier trained on it")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run trained on Fashion-MNIST or the digits")
    parser.add_argument("-n", type=int, default=2000, help="samples for each point (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the distances there")
    parser.add_argument("--plot", type=Path, default=Path("sampler_quality.png"), help="default: %(default)s")
    options = parser.parse_args()

    run = load_run(options.run)
    images, labels, test = labelled_images(run)
    classifier = train_classifier(images, labels, EPOCHS[run.config.data.name])
    reference = moments(classifier, test)

    real = images[: options.n]
    yardsticks = {
        "real images": real,
        "real images, moved by a pixel": real.roll(1, dims=3),
        "real images, blurred": to_uint8(F.avg_pool2d(real / 255, 3, 1, 1)),
    }
    yardsticks = {label: distance(moments(classifier, changed), reference) for label, changed in yardsticks.items()}
    for label, value in yardsticks.items():
        print(f"{label}: {value:.4f}", flush=True)

    ddpm_fast.optimize(run.diffusion.model)  # in bfloat16, where that is fast
    runs = RUNS | ({"fitted": ("fitted", None, tuple(run.diffusion.fitted))} if run.diffusion.fitted else {})
    results: dict[str, dict[int, float]] = {label: {} for label in runs}
    for label, (sampler, eta, all_steps) in runs.items():
        for steps in all_steps:
            drawn = sample_batches(run, options.n, sampler=sampler, eta=eta, steps=steps, seed=0)
            samples = to_uint8(torch.cat([images for _, images in drawn]))
            results[label][steps] = distance(moments(classifier, samples), reference)
            print(f"{label:<14} {steps:>5} steps: {results[label][steps]:.4f}", flush=True)
    plot(results, yardsticks, options.n, TITLES[run.config.data.name], options.plot)
    if options.json:
        found = {"n": options.n, "yardsticks": yardsticks, "distances": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
