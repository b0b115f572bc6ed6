"""How good a trained model is: distances between its samples and real images, and the bound of real images."""

__all__ = ["evaluate"]

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..info import versions
from ..training import checkpoint
from ..training.config import DataConfig, FolderData, IdxData, expanded
from ..training.data import DataError, ImageFiles, ImageTensor, open_data
from ..training.pictures import to_uint8
from ..training.run import Run, sample_batches, sampling_bar
from .bound import bound_of
from .distances import LEAST, distances
from .distributed import Processes, joined
from .features import BATCH, FeatureError, FeatureNetwork, inception, torchscript
from .forecast import announce, seconds_of_features, seconds_of_network
from .reference import Reference
from .report import Report, Samples

SHOWN = 16  # images in the picture


def evaluate(
    run: Run,
    *,
    real: str | Path | bool = False,
    n: int = 50_000,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    precision: str = "auto",
    bound_images: int = 1000,
    bound_steps: int | None = 100,
    inception_weights: Path | None = None,
    features: Path | None = None,
) -> Report | None:
    """Samples from a trained model, compares the samples with real images, and bounds -log p of real images.

    Prints how long it will take before it begins, and writes report.json and report.png into the folder of the run. If
    a launcher has started several processes, all of them call this function and share the work.

    Samples are rounded to uint8. Neither they nor the real images are kept, except for those in the picture; the
    features of all are in the memory of the first process. The features of the real images are kept in a file.

    Args:
        real: the real images, in an IDX file or a folder, or True for those of the training. False for no samples: the
            bound alone, of the images of the training, which is lower than that of images which the model has not seen.
        n: how many images are sampled; 0 for the bound alone.
        seed: of all noise, and of the images and timesteps of the bound.
        sampler, steps, spacing: as in `GaussianDiffusion.sample`.
        precision: that the network is computed in: `auto`, `fp32`, `bf16` or `fp16`. The bound is float32.
        bound_images: of how many images, chosen by the seed, the bound is computed: all, if there are fewer; 0 for no
            bound.
        bound_steps: timesteps that are evaluated for each image; None for all. See `GaussianDiffusion.likelihood`.
        inception_weights: see `inception`.
        features: a TorchScript file with another feature network; see `torchscript`.

    Returns:
        The report in the first process, None in the others.

    Raises:
        DataError: the real images cannot be read, or are of another size.
        FeatureError: the feature network cannot be had.
        PermissionError: the folder of the run cannot be written.
        RunError: another process has ended, or an image has values that are not finite.
        ValueError: a number of images, or steps or a seed that cannot be.
    """
    n = 0 if real is False else n
    _check_numbers(n, bound_images)
    if not os.access(run.folder, os.W_OK):  # found out now, and not after hours
        raise PermissionError(f"{run.folder}: no report can be written into this folder")
    name, data = _open(run, real)
    if len(data) < (least := LEAST if n else 2):
        raise DataError(f"{name}: an evaluation needs at least {least} real images, got {len(data)}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    bounded = order[:bound_images]
    table = run.diffusion.step_table(sampler, steps, spacing=spacing)
    run.diffusion.noise_source(run.diffusion.betas, seed)  # validates the seed
    how = {"seed": seed, "sampler": sampler, "steps": steps, "spacing": spacing}
    run = run.in_precision(precision)
    network, bound, strips = None, None, {}

    with joined() as processes:
        is_first = processes.rank == 0
        if n:
            network = _feature_network(features, inception_weights, run, processes)
            reference = Reference(data, network)
            expected = reference.load() if is_first else None
            unknown = len(data) if processes.share(expected is None) else 0
        if is_first:
            per_image = run.diffusion.num_timesteps if bound_steps is None else bound_steps
            calls = {
                f"{n:,} samples": n * len(table),
                f"the bound of {len(bounded):,} images": len(bounded) * per_image,
            }
            times = seconds_of_network(run, calls, how, processes.count)
            if network:
                times |= seconds_of_features(network, data, n, unknown, processes.count)
            announce(times, min(n, len(data)) if n else None)
        if bounded:
            bound = bound_of(run, data, bounded, processes, steps=bound_steps, seed=seed)
        if network and unknown:
            expected = _features_of(data, network, processes)
            if is_first:
                reference.save(expected)
        if network:
            found, shown = _sampled(run, network, n, how, processes)
            strips = {"samples": shown, "real images": data[order[:SHOWN]]}
    if not is_first:
        return None
    samples = None
    if network:
        samples = Samples(
            n=n,
            real=len(data),
            sampler=run.diffusion.sampler_name(sampler, steps, None),
            steps=len(table),
            spacing=spacing or run.diffusion.spacing,
            features=network.name,
            features_sha256=network.sha256,
            distances=distances(found, expected),
        )
    report = Report(
        data=name,
        checkpoint=checkpoint.latest(run.folder).name,
        seed=seed,
        precision=next(str(p.dtype).removeprefix("torch.") for p in run.diffusion.model.parameters()),
        samples=samples,
        bound=bound,
        versions=versions() | ({"torch-fidelity": version("torch-fidelity")} if network else {}),
    )
    report.save(run.folder, strips)
    return report


def _check_numbers(n: int, bound_images: int) -> None:
    if n and n < LEAST:
        raise ValueError(f"the number of samples must be at least {LEAST}, or 0 for none; got {n}")
    if bound_images and bound_images < 2:
        raise ValueError(f"the images of the bound must be at least 2, or 0 for no bound; got {bound_images}")
    if not n and not bound_images:
        raise ValueError("there is nothing to evaluate: no samples, and no images for the bound")


def _open(run: Run, real: str | Path | bool) -> tuple[str, ImageTensor | ImageFiles]:
    """The real images, and what they are called.

    Raises:
        DataError: they cannot be read, or are of another size than the samples.
    """
    channels, (height, width) = run.diffusion.channels, run.diffusion.image_size
    config: DataConfig = run.config.data
    if not isinstance(real, bool):
        path = expanded(Path(real))
        if not path.is_dir():
            config = IdxData(name="idx", path=path)
        elif channels in (1, 3):
            config = FolderData(name="folder", path=path, image_size=height, channels=channels)
        else:
            raise DataError(
                f"{path}: the files in a folder are images of 1 or 3 channels, and the model has {channels}"
            )
    data = open_data(config)
    wanted, given = (channels, height, width), tuple(data[[0]].shape[1:])
    if given != wanted:
        raise DataError(f"the images are {given} (channels, H, W), and the model takes {wanted}")
    return str(config.path) if isinstance(config, IdxData | FolderData) else config.name, data


def _feature_network(
    features: Path | None, inception_weights: Path | None, run: Run, processes: Processes
) -> FeatureNetwork:
    """The network in every process, in the first one first: it may have to download weights for all."""
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another version of torch
        raise FeatureError(f'distances need torch-fidelity: pip install "ddpm_fast[evaluate]" ({error})') from None
    if run.diffusion.channels not in (1, 3):
        raise FeatureError(
            f"feature networks take images of 1 or 3 channels, and the model has {run.diffusion.channels}"
        )

    def load() -> FeatureNetwork:
        if features is not None:
            return torchscript(expanded(features), run.diffusion.device)
        return inception(inception_weights and expanded(inception_weights), run.diffusion.device)

    network = load() if processes.rank == 0 else None
    processes.share(None)
    return network or load()


def _features_of(data: ImageTensor | ImageFiles, network: FeatureNetwork, processes: Processes) -> Tensor | None:
    """Of all images of a data set, (N, D), in the first process; None in the others."""

    def features(first: int, end: int) -> Tensor:
        return network(data[list(range(first, end))])

    found = processes.map_batches(len(data), BATCH, features, "features of real images")
    return torch.cat(found) if found else None


def _sampled(
    run: Run, network: FeatureNetwork, n: int, how: dict[str, Any], processes: Processes
) -> tuple[Tensor | None, Tensor | None]:
    """The features of all samples, (N, D), and some of the samples, uint8, in the first process; None in the others."""
    steps = len(run.diffusion.step_table(how["sampler"], how["steps"], spacing=how["spacing"]))
    mine, shown = [], []
    with sampling_bar(n, disable=processes.rank > 0) as bar:

        def report(done: int = 0) -> None:
            bar.update(processes.add(done) / steps - bar.n)

        share = {"rank": processes.rank, "count": processes.count, "report": report}
        for first, images in sample_batches(run, n, **how, **share):
            pixels = to_uint8(images)
            mine.append((first, network(pixels)))
            shown += list(pixels[: SHOWN - len(shown)].clone())
        processes.wait(report)
    every = sorted(processes.gather(mine), key=lambda batch: batch[0])
    if processes.rank > 0:
        return None, None
    return torch.cat([features for _, features in every]), torch.stack(shown)
