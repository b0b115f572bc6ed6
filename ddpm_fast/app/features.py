"""Feature networks: they turn images into vectors, whose distributions can be compared."""

__all__ = ["BATCH", "FeatureError", "FeatureNetwork", "inception", "torchscript"]

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 64  # images, as in torch-fidelity: features depend on the size of the batch by rounding
INCEPTION = "inception-v3-compat"  # its name in torch-fidelity


class FeatureError(ValueError):
    """There are no features: the network, its weights or a package is missing, or what it returns cannot be used."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A function from images to features.

    Attributes:
        name: `inception-v3-compat`, or the name of the user's file.
        sha256: of the file with its weights.
        function: uint8 images, (N, 3, H, W), to features, (N, D).
        device: where it is computed.
    """

    name: str
    sha256: str
    function: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features of images.

        Args:
            images: (N, C, H, W), uint8, C of 1 or 3. One channel is repeated to three.

        Returns:
            (N, D), float32, on the CPU.

        Raises:
            FeatureError: the network fails, or does not return finite features of this shape.
        """
        found = []
        for part in images.expand(-1, 3, -1, -1).split(BATCH):
            try:
                features = self.function(part.contiguous().to(self.device))
            except Exception as error:  # TorchScript raises exceptions of all kinds
                raise FeatureError(f"{self.name} fails for images of shape {tuple(part.shape)}: {error}") from error
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(part):
                given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise FeatureError(f"{self.name} must return features of shape ({len(part)}, D), got {given}")
            found.append(features.float().cpu())
        features = torch.cat(found)
        if features.shape[1] < 2:
            raise FeatureError(f"{self.name} must return at least 2 features an image, got {features.shape[1]}")
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            raise FeatureError(
                f"{self.name} returned features that are not finite for {int((~finite).sum())} of {len(finite)} images"
            )
        return features


def inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """The Inception v3 of FID (Heusel et al. 2017), as torch-fidelity has it: the 2048 features before its classifier.

    Args:
        weights: torch-fidelity's file of its weights; None for the one in the folder `checkpoints` of
            `torch.hub.get_dir()`, where torch-fidelity has it as well. It is downloaded if it is not there.

    Raises:
        FeatureError: the weights are missing, or the file has something else.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = weights
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
        if not path.exists():
            _download(URL_INCEPTION_V3, path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run code that a file contains
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=str(path))
    except FileNotFoundError:
        raise FeatureError(f"{path}: no such file") from None
    except Exception as error:  # given a damaged file, torch.load raises exceptions of all kinds
        raise FeatureError(
            f"{path}: not the Inception weights of torch-fidelity, {URL_INCEPTION_V3} ({error!s:.300})"
        ) from None
    network = network.to(device)
    return FeatureNetwork(INCEPTION, _sha256(path), lambda images: network(images)[0], device)


def _download(url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except (OSError, HTTPException) as error:  # urllib's errors are of these kinds
        raise FeatureError(
            f"the Inception weights are not in {path}, and cannot be downloaded ({error}): download {url} on another "
            "machine, and put it there or give it by --inception-weights; or give another network by --features"
        ) from None


def torchscript(path: Path, device: torch.device) -> FeatureNetwork:
    """A network from a TorchScript file, which takes uint8 images, (N, 3, H, W), and returns features, (N, D).

    One with an argument `return_features`, such as NVIDIA's inception-2015-12-05.pt and vgg16.pt, is called with True.
    The file is code: it is run.

    Raises:
        FeatureError: the file is missing, or is not TorchScript.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated: a DeprecationWarning or FutureWarning
            network: Any = torch.jit.load(str(path), map_location=device).eval()
        arguments = {argument.name for argument in network.forward.schema.arguments}
    except Exception as error:  # given a damaged file, torch.jit.load raises exceptions of all kinds
        reason = "no such file" if not path.exists() else f"not a TorchScript file ({error!s:.300})"
        raise FeatureError(f"{path}: {reason}") from None
    chosen = {"return_features": True} if "return_features" in arguments else {}

    def function(images: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):  # otherwise it is compiled after some calls, and rounds differently
            return network(images, **chosen)

    return FeatureNetwork(path.name, _sha256(path), function, device)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
