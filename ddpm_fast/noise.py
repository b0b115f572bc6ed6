r"""Gaussian noise that belongs to an image, not to a batch.

The noise of sample n in stream s is a pure function of (seed, n, s): the same in a batch of 1 or of 64, in one
process or in eight, on every device (to rounding). It is the generator of `torch.func._random`, philox4x32-10
(Salmon et al., 2011), written here in plain PyTorch because that interface is experimental:

    key_{n,s} = fold_in(fold_in(key(seed), n), s)                     n: index of the sample in the whole run
    eps[n]    = normal(key_{n,s}, (H, W, C)).permute(2, 0, 1)         s: the stream, one for each use

A key is (seed, offset), two 64-bit words. Block j of its stream is philox(key = seed, counter = offset + j);
fold_in(key, d) is the 128-bit block d, read as a key. Block j holds the elements 4j ... 4j + 3: its words make the
uniforms u_0 ... u_3 = word 2^-32 + 2^-33, and the pairs (u_0, u_1), (u_2, u_3) each make two normals by Box-Muller,
sqrt(-2 ln u_0) times cos and sin of 2 pi u_1.

Images are counted channels-last, as the kernels walk them, and come out in that memory format. Data without image
axes, (N, D) and (N, C, L), is counted as it lies.

Streams: 0 is x_T in a sampling run, the noise of the images that a run begins with, and eps in training; k + 1 is the
noise of the k-th step that the run takes. Other uses have streams from 2^32 on.
"""

__all__ = [
    "FITTING",
    "INPAINTING",
    "LIKELIHOOD",
    "OFFSET",
    "SECOND_IMAGE",
    "VALIDATION",
    "NoiseSource",
    "derive_seed",
    "draw_seed",
    "fold_in",
    "gaussian",
    "key",
    "normal",
    "sample_keys",
]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .checks import integer, integers
from .ops.noise import noise_of

# Streams of other uses than the steps of a sampling run, which are fewer.
OFFSET = 1 << 32  # offset noise in training
SECOND_IMAGE = OFFSET + 1  # the second image of an interpolation
LIKELIHOOD = OFFSET + 2  # of the variational bound: folded with t again; the next one chooses the timesteps
FITTING = OFFSET + 4  # x_T that a sampler is fitted on
VALIDATION = OFFSET + 5  # x_T on which what was fitted is measured
INPAINTING = 1 << 33  # + i: known pixels, or a jump, after the i-th move between timesteps


def key(seed: int | Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """The key (seed, offset 0), shape (2,), int64 (the bits of uint64, for which PyTorch has no arithmetic).

    Args:
        seed: in [-2^63, 2^64), or an int64 tensor of shape (), which is not read by the host.
    """
    if not isinstance(seed, Tensor):
        # Filled in on the device: a copy of a number from the host would make it wait for the device.
        seed = torch.full((), _as_int64(integer("seed", seed, -(1 << 63), 1 << 64)), dtype=torch.int64, device=device)
    elif seed.dtype != torch.int64 or seed.ndim:
        raise ValueError(f"a seed that is a tensor must be int64 of shape (); got {seed.dtype} {tuple(seed.shape)}")
    return torch.stack([seed, torch.zeros_like(seed)]).to(device)


def fold_in(keys: Tensor, data: int | Tensor) -> Tensor:
    """Derives keys.

    Args:
        keys: shape (..., 2), int64.
        data: a number in [0, 2^64), or int64 numbers whose shape broadcasts against `keys.shape[:-1]`.

    Returns:
        Keys, shape (broadcast, 2), int64.
    """
    if not isinstance(data, Tensor):
        number = integer("data", data, -(1 << 63), 1 << 64)
        data = torch.full((), _as_int64(number), dtype=torch.int64, device=keys.device)
    shape = torch.broadcast_shapes(keys.shape[:-1], data.shape)
    folded = ops.fold_in(keys.expand(*shape, 2).reshape(-1, 2), data.expand(shape).reshape(-1))
    return folded.view(*shape, 2)


def normal(keys: Tensor, size: int) -> Tensor:
    """The first `size` standard normals of each key's stream.

    Args:
        keys: shape (..., 2), int64.

    Returns:
        Shape (..., size), float32.
    """
    size = integer("size", size, 0)
    return ops.normal(keys.reshape(-1, 2), size).view(*keys.shape[:-1], size)


def sample_keys(
    samples: int,
    *,
    seed: int | Tensor,
    streams: int | range = 0,
    sample_offset: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The keys that the ops make a batch's noise from.

    Args:
        samples: N.
        streams: which use of noise within a sample, at least 0, or K of them.
        sample_offset: index in the run of the batch's first sample; an int64 tensor of shape () on the device is not
            read by the host.

    Returns:
        (N, 2), or (K, N, 2) for a range of streams; int64.
    """
    sample_offset = _index(sample_offset)
    samples = integer("samples", samples, 0)
    keys = fold_in(key(seed, device=device), sample_offset + torch.arange(samples, device=device))  # (N, 2)
    if isinstance(streams, range):
        return fold_in(keys, torch.arange(streams.start, streams.stop, streams.step, device=device)[:, None])
    return fold_in(keys, integer("stream", streams, 0, 1 << 63))


def gaussian(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    stream: int = 0,
    sample_offset: int | Tensor = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, the same for one image in any batch.

    Args:
        shape: (N, ...): (N, C, H, W) images come back channels-last; (N, C, L) and (N, D) contiguous.
        seed: of the run.
        stream: which use of noise within a sample, at least 0.
        sample_offset: index in the run of the batch's first sample: row i is sample `sample_offset + i`.
        dtype: any floating type; the numbers are made in float32 and then rounded (float64: widened).

    Raises:
        ValueError: a shape without a batch axis, or a seed, stream or offset that is not a number in range.
    """
    shape = integers("shape", shape, 0)
    if not shape or math.prod(shape) >= 1 << 60:
        raise ValueError(f"shape must be (N, ...) with less than 2^60 numbers in all, got {shape}")
    keys = sample_keys(shape[0], seed=seed, streams=stream, sample_offset=sample_offset, device=device)
    return noise_of(keys, shape).to(dtype)


class NoiseSource:
    """Where the noise of a run or of a training step comes from.

    Args:
        rng: `philox`: as `gaussian`. `torch`: by torch.randn, one call after the other, whatever the stream and
            the offset; the numbers that other packages draw.
        seed: a number, or a generator (philox: one seed is drawn from it); None for PyTorch's default generator.
        sample_offset: index in the run of the batch's first sample, as `sample_keys` takes it.
        device, dtype: of the noise.

    Raises:
        ValueError: a seed that is neither a number in range, nor a generator, nor None.
    """

    def __init__(
        self,
        rng: str,
        *,
        seed: int | torch.Generator | None = None,
        sample_offset: int | Tensor = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if seed is not None and not isinstance(seed, torch.Generator):
            if isinstance(seed, list | tuple):
                raise ValueError(
                    f"seed must be one number or one torch.Generator for the whole batch, got a "
                    f"{type(seed).__name__} of {len(seed)}; with sample_offset=n, image n of a "
                    f"seed is the same in any batch"
                )
            seed = integer("seed", seed, -(1 << 63), 1 << 64)
        self.keyed = rng == "philox"
        self.sample_offset = _index(sample_offset)
        self.seed = seed
        self.device, self.dtype = device, dtype
        if not self.keyed and seed is not None and not isinstance(seed, torch.Generator):
            self.seed = torch.Generator(device or "cpu").manual_seed(seed)

    def _number(self) -> int | Tensor:
        # Not before noise is drawn: a run without any noise leaves the generator alone.
        if self.seed is None or isinstance(self.seed, torch.Generator):
            self.seed = _drawn(self.seed)
        return self.seed

    def draw(self, stream: int, shape: Sequence[int]) -> Tensor:
        """The noise of a stream, as a tensor."""
        if not self.keyed:
            return torch.randn(shape, generator=self.seed, device=self.device, dtype=self.dtype)
        return gaussian(
            shape,
            seed=self._number(),
            stream=stream,
            sample_offset=self.sample_offset,
            device=self.device,
            dtype=self.dtype,
        )

    def keys(self, samples: int, streams: int | range) -> Tensor:
        """The noise of a stream, as the keys that the ops make it from; see `sample_keys`. For philox alone."""
        return sample_keys(
            samples, seed=self._number(), streams=streams, sample_offset=self.sample_offset, device=self.device
        )

    def arguments(self, stream: int, shape: Sequence[int]) -> dict[str, Tensor]:
        """The noise of a stream as an op takes it: `keys` where there are any, or drawn `noise`."""
        if self.keyed:
            return {"keys": self.keys(shape[0], stream)}
        return {"noise": self.draw(stream, shape)}


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A 63-bit seed from a generator, PyTorch's default one if None (`torch.manual_seed` governs it)."""
    return int(_drawn(generator))


def _drawn(generator: torch.Generator | None) -> Tensor:
    """The seed that `draw_seed` gives, as a tensor of shape (): a compiled graph does not wait for its value."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(0, (1 << 63) - 1, (), generator=generator, device=device)


def derive_seed(seed: int, *data: int) -> int:
    """A seed for PyTorch's own generators, by folding numbers into one.

    The CPU's takes the lower 32 bits alone, so that `seed + (step << 32)` would be one seed for all steps.
    """
    keys = key(seed, device="cpu")
    for number in data:
        keys = fold_in(keys, number)
    return int(keys[0]) & ((1 << 63) - 1)


def _index(sample_offset: int | Tensor) -> int | Tensor:
    return sample_offset if isinstance(sample_offset, Tensor) else integer("sample_offset", sample_offset, 0, 1 << 63)


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
