"""The features of all images of a data set, kept in a file for the next evaluation."""

__all__ = ["Reference"]

import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..training.data import ImageFiles, ImageTensor, fingerprint
from ..training.files import flush
from .features import FeatureNetwork

FORMAT = 1  # of the file, and of the preparation of images: another number makes all features anew


class Reference:
    """A place for the features of a data set: one file for each content of the data set, size of its images, and
    feature network.

    Attributes:
        path: the file, in the folder `ddpm_fast` of `torch.hub.get_dir()`.
    """

    def __init__(self, data: ImageTensor | ImageFiles, network: FeatureNetwork) -> None:
        self._key = {
            "format": FORMAT,
            "data": fingerprint(data),
            "image": list(data[[0]].shape[1:]),
            "network": network.sha256,
        }
        name = hashlib.sha256(json.dumps(self._key).encode()).hexdigest()[:32]
        self.path = Path(torch.hub.get_dir(), "ddpm_fast", f"features-{name}.safetensors")

    def load(self) -> Tensor | None:
        """The features, (N, D), float32; None if there are none, or if the file is damaged."""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                found, written = file.get_tensor("features"), file.metadata()
        except (OSError, SafetensorError):
            return None
        return found if written == self._metadata(found) else None

    def save(self, features: Tensor) -> None:
        """Keeps the features, (N, D), float32, in one operation. If it fails, a line says so."""
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")  # of each process that evaluates
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": features}, temporary, self._metadata(features))
            flush(temporary)
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            print(f"the features of the real images cannot be kept in {self.path}: {error}", file=sys.stderr)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _metadata(self, features: Tensor) -> dict[str, str]:
        content = hashlib.sha256(features.contiguous().numpy()).hexdigest()
        return {"key": json.dumps(self._key), "shape": str(tuple(features.shape)), "sha256": content}
