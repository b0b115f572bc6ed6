"""A sampler as an affine map: what it makes of the initial noise, of the data's mean and of each of its draws.

For Gaussian data a run is x_0 = c + M x_T + sum_j G_j z_j. One run on a batch finds all of it: the rows of the batch
start from 0 and from 1, and in row j of the rest the j-th draw of normal numbers is 1, while all other draws are 0. No
sample is drawn, and nothing is estimated.
"""

__all__ = ["CannotCheck", "Draws", "Run", "Sampler", "measure"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .gaussian import Gaussian, Network

STRETCH = -3.0  # a third start, to see that the map is affine
PROBE = 2.0**-40  # a change of the start that float32 does not see
_ROWS = 4  # from 0, from 1, from STRETCH, from 1 + PROBE; then one for each draw

_aten = torch.ops.aten
_STANDARD = {_aten.randn, _aten.randn_like}
_SCALED = {_aten.normal, _aten.normal_}  # of a mean and a standard deviation


class CannotCheck(ValueError):
    """What was given is no sampler that the kit can check."""


class Sampler(Protocol):
    """What the kit checks: `adapters` makes one of a class or of a function."""

    objective: str  # what the network predicts

    def run(self, network: Network, x_T: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """A whole run from x_T, (N, D, 1, 1), standard normal in a real run."""
        ...


class Draws(TorchDispatchMode):
    """Within it, draws of normal numbers have values that are known, and are counted.

    A draw from a generator in the same state, as by another generator of the same seed, gives the same numbers: it is
    the same draw.

    Args:
        fill: called with the number of the draw, from 0, and a tensor of zeros of its shape, to write the values into.
    """

    def __init__(self, fill: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.fill = fill
        self.numbers: dict[bytes, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet not in _STANDARD and packet not in _SCALED:
            return function(*args, **(kwargs or {}))
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        given |= kwargs or {}
        state = (given.get("generator") or torch.default_generator).get_state().numpy().tobytes()
        result = function(*args, **(kwargs or {}))
        z = torch.zeros_like(result)
        self.fill(self.numbers.setdefault(state, len(self.numbers)), z)
        if packet in _SCALED:
            z = given.get("mean", 0.0) + given.get("std", 1.0) * z
        return result.copy_(z)


@dataclass(frozen=True)
class Run:
    """A run as an affine map. C calls of the network, n draws, D components; float64.

    t: the timesteps at which the network was asked, C of them.
    mean: (C + 1, D), the state at each call, and the result, from x_T = 0 without noise.
    gain: (C + 1, D), the factor of x_T in it.
    noise: (C + 1, n, D), the factor of each draw.
    drawn: for each draw, how many calls had been made.
    bend: (C + 1, D), by how much the state is not affine in x_T.
    float32: whether the state is computed in float32 or less, although it was given in float64.
    """

    t: list[float]
    mean: Tensor
    gain: Tensor
    noise: Tensor
    drawn: list[int]
    bend: Tensor
    float32: bool

    @property
    def variance(self) -> Tensor:
        """Of each state and of the result, from x_T ~ N(0, I), shape (C + 1, D)."""
        return self.gain.square() + self.noise.square().sum(1)

    @property
    def finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in (self.mean, self.gain, self.noise, self.bend))

    def step_noise(self) -> Tensor:
        """The standard deviation of the noise that each step adds, shape (C,)."""
        added = torch.zeros(len(self.t), dtype=torch.float64)
        for j, calls in enumerate(self.drawn):
            if calls:  # noise before the first call is no step's
                added[calls - 1] += self.noise[calls, j, 0] ** 2
        return added.sqrt()


def measure(sampler: Sampler, data: Gaussian, steps: int, objective: str | None = None) -> Run:
    """Runs the sampler twice, to count its draws and to find its map. It leaves PyTorch's own generator as it was.

    Raises:
        CannotCheck: noise is drawn in another shape than that of the batch, or the number of draws varies.
    """
    objective = objective or sampler.objective
    drawn: dict[int, int] = {}  # how many calls there had been at each draw

    def start(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None, None, None].repeat(1, len(data), 1, 1)

    state = torch.get_rng_state()
    network = Network(data, objective)
    with torch.no_grad(), Draws(lambda number, z: drawn.setdefault(number, len(network.t))):
        sampler.run(network, start([0.0]), steps, torch.Generator().manual_seed(0))
    draws = len(drawn)

    def fill(number: int, z: Tensor) -> None:
        if z.shape[0] != _ROWS + draws:
            raise CannotCheck(f"noise was drawn in the shape {tuple(z.shape)}, not in that of the batch of samples")
        if number >= draws:
            raise CannotCheck(f"a run with another batch draws noise more than {draws} times, as the first run did")
        z[_ROWS + number] = 1

    torch.set_rng_state(state)
    network = Network(data, objective)
    x_T = start([0.0, 1.0, STRETCH, 1.0 + PROBE] + [0.0] * draws)
    with torch.no_grad(), Draws(fill):
        result = sampler.run(network, x_T, steps, torch.Generator().manual_seed(0))
    torch.set_rng_state(state)
    if tuple(result.shape) != tuple(x_T.shape):
        raise CannotCheck(f"from x_T of shape {tuple(x_T.shape)} the sampler returned {tuple(result.shape)}")
    states = torch.stack([*network.x, result.to(torch.float64).reshape(len(x_T), len(data))])  # (C + 1, N, D)
    mean = states[:, 0]
    gain = states[:, 1] - mean
    return Run(
        t=network.t,
        mean=mean,
        gain=gain,
        noise=states[:, _ROWS:] - mean[:, None],
        drawn=list(drawn.values()),
        bend=(states[:, 2] - mean - STRETCH * gain).abs(),
        float32=bool((states[-1, 3] == states[-1, 1])[Gaussian.CENTRED].all()),
    )
