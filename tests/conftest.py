import pytest
import torch

# The tensors here are small: two threads would wait for one another more than they work.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--update-budgets", action="store_true", help="write tests/budgets.toml instead of comparing")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so that nothing passes by reading what nobody wrote."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class TinyNetwork(torch.nn.Module):
    """Images of two channels; a few hundred nanoseconds an image, and fixed weights."""

    channels = 2

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)
        if not self.conv.weight.is_meta:
            generator = torch.Generator().manual_seed(0)
            for p in self.parameters():
                p.data = torch.randn(p.shape, generator=generator) * 0.3

    def forward(self, x, t):
        return self.conv(x).tanh() + t[:, None, None, None].to(x.dtype) / 1000


@pytest.fixture
def make_tiny_network():
    return TinyNetwork


@pytest.fixture
def tiny_network():
    return TinyNetwork()
