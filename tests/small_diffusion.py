"""A diffusion whose network is small and takes data of any rank."""

import torch
from torch import nn

from ddpm_fast import GaussianDiffusion, noise


class Net(nn.Module):
    """A network of any rank that mixes channels and looks at t."""

    def __init__(self, channels=2):
        super().__init__()
        self.channels = channels
        self.mix = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)

    def forward(self, x, t):
        y = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        return self.dropout(torch.tanh(y)) + t.view(-1, *[1] * (x.ndim - 1)).to(y.dtype) / 1000


class TwoHalves(Net):
    """Twice the channels: a prediction, and v around `middle`."""

    middle = 0.0

    def __init__(self, channels=2):
        super().__init__(channels)
        self.dropout = nn.Identity()
        self.second = nn.Linear(channels, channels)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.second.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x, t):
        v = torch.tanh(self.second(x.movedim(1, -1)).movedim(-1, 1)) + self.middle
        return torch.cat([super().forward(x, t), v], dim=1)


SIZES = {"images": (4, 6), "sequences": (9,), "vectors": ()}


def make(size=(4, 6), **arguments):
    return GaussianDiffusion(Net(), **({"image_size": size, "timesteps": 20, "beta_schedule": "cosine"} | arguments))


def images(n=5, size=(4, 6)):
    return noise.gaussian((n, 2, *size), seed=99).sigmoid()


def put_samples(diffusion, results):
    """What a process of its own does: samples two images and puts them into a queue."""
    results.put(diffusion.sample(2, seed=0, steps=4).numpy())
