import architectures
import pytest
import torch

# The tensors here are small: two threads would wait for one another more than they work.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--update-budgets", action="store_true", help="write tests/budgets.toml instead of comparing")
    parser.addoption("--all-architectures", action="store_true", help="simulate kernels for sm_80, sm_90 and sm_100")


def pytest_configure(config):
    if config.getoption("all_architectures") or config.getoption("update_budgets"):
        architectures.choose_all()


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
