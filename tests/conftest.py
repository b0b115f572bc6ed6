import os
import signal
from pathlib import Path

import architectures
import pytest
import torch
from hypothesis import HealthCheck, settings

# The tensors here are small: two threads would wait for one another more than they work. The variables are for the
# processes that tests start, and for torch.compile, which otherwise keeps processes of its own.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# What every test with hypothesis takes over: `pytest --hypothesis-profile ci` tries more examples, and tools that slow
# kernels down a hundred times are given few.
EXAMPLES = {"few": 3, "default": 50, "ci": 150}
for name, examples in EXAMPLES.items():
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def pytest_addoption(parser):
    parser.addoption("--update-budgets", action="store_true", help="write tests/budgets.toml instead of comparing")
    parser.addoption("--all-architectures", action="store_true", help="simulate kernels for all architectures")
    parser.addoption("--long", action="store_true", help="run the tests that are marked as long, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes longer than ten seconds; run with --long")
    if config.getoption("all_architectures") or config.getoption("update_budgets"):
        architectures.choose_all()


def pytest_xdist_auto_num_workers(config):
    """One for each core, up to four, since each imports PyTorch and takes about a gigabyte; none for single files.

    Nor with --update-budgets, where several tests write to one file.
    """
    single_files = all(Path(argument.split("::")[0]).is_file() for argument in config.args)
    if single_files or config.getoption("update_budgets"):
        return 0
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_collection_modifyitems(config, items):
    """The tests that take longest come first: if the last process began with them, the others would wait for it."""
    items.sort(key=lambda item: "triton_kernels" not in item.nodeid and "long" not in item.keywords)
    if not config.getoption("long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes longer than ten seconds: --long"))


def pytest_make_parametrize_id(val):
    """Bytes by their length: all processes must find the same names, and gzip writes the time into its header."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """Signals as a program in a terminal has them: nohup and background jobs ignore some, and children inherit that."""
    normal = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    normal = {getattr(signal, name): handler for name, handler in normal.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in normal.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def global_state():
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "working directory": os.getcwd(),
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
    }


@pytest.fixture(autouse=True)
def unchanged_global_state(monkeypatch):
    """A test leaves PyTorch and the process as it found them, so that tests pass in any order and in any process."""
    before = global_state()
    yield
    monkeypatch.undo()
    after = global_state()
    assert after == before
