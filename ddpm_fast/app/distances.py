"""Distances between the features of samples and of real images, as torch-fidelity computes them."""

__all__ = ["Distances", "distances", "seconds_of_distances"]

import time
from dataclasses import dataclass

import torch
from torch import Tensor

KID_SUBSET_SIZE = 1000  # torch-fidelity's
NEIGHBOURS = 3  # torch-fidelity's
LEAST = NEIGHBOURS + 1  # images, since an image is the nearest to itself
MOST = 50_000  # images for precision and recall, which compare all pairs


@dataclass(frozen=True)
class Distances:
    """Of samples to real images.

    Attributes:
        fid: the Fréchet distance of normal distributions with the means and covariances of the features (Heusel et al.
            2017). It is biased upwards, the more the fewer images there are.
        kid, kid_std: the kernel distance, unbiased: mean and standard deviation over 100 random subsets of
            `kid_subset_size` images (Bińkowski et al. 2018).
        precision: the share of samples in the neighbourhood of real images; recall: the share of real images in the
            neighbourhood of samples, by 3 neighbours (Kynkäänniemi et al. 2019).
    """

    fid: float
    kid: float
    kid_std: float
    kid_subset_size: int
    precision: float
    recall: float

    def rows(self) -> dict[str, str]:
        """What it says, as a table of names and values."""
        subsets = f"standard deviation {self.kid_std:.2g} over subsets of {self.kid_subset_size:,}"
        return {
            "FID": f"{self.fid:.4g}",
            "KID": f"{self.kid:.4g} ({subsets})",
            "precision": f"{self.precision:.4f}",
            "recall": f"{self.recall:.4f}",
        }


def distances(samples: Tensor, real: Tensor) -> Distances:
    """The distances that torch-fidelity's command prints for the same features, by its functions and its seed.

    Args:
        samples, real: features, (N, D) and (M, D), float32, on the CPU; N and M at least 4.
    """
    from torch_fidelity import metric_fid as fid
    from torch_fidelity import metric_kid as kid

    statistics = [fid.fid_features_to_statistics(features) for features in (samples, real)]
    subset_size = min(KID_SUBSET_SIZE, len(samples), len(real))
    kernel = kid.kid_features_to_metric(samples, real, kid_subset_size=subset_size, verbose=False)
    precision, recall = _precision_and_recall(_at_most(MOST, samples), _at_most(MOST, real))
    return Distances(
        fid=fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID],
        kid=kernel[kid.KEY_METRIC_KID_MEAN],
        kid_std=kernel[kid.KEY_METRIC_KID_STD],
        kid_subset_size=subset_size,
        precision=precision,
        recall=recall,
    )


def _precision_and_recall(samples: Tensor, real: Tensor) -> tuple[float, float]:
    from torch_fidelity import metric_prc as prc

    # With save_cpu_ram, not all distances are in memory at once: 10 GB for 50,000 images and as many, and not 50 GB.
    found = prc.prc_features_to_metric(samples, real, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return found[prc.KEY_METRIC_PRECISION], found[prc.KEY_METRIC_RECALL]


def _at_most(n: int, features: Tensor) -> Tensor:
    if len(features) <= n:
        return features
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:n]]


def seconds_of_distances(n: int, m: int, size: int) -> float:
    """How long precision and recall, which take longest, will take for N and M images with D features each."""
    n, m, measured = min(n, MOST), min(m, MOST), min(n, m, 500)
    features = torch.rand(measured, size)
    started = time.perf_counter()
    _precision_and_recall(features, features)
    return (time.perf_counter() - started) * ((n + m) / (2 * measured)) ** 2
