import os

import pytest
import torch
from side_by_side import medians, table


def pytest_xdist_auto_num_workers(config):
    """None: what is timed has the machine to itself."""
    return 0


@pytest.fixture(autouse=True, scope="session")
def one_thread_on_one_core():
    """Two OpenMP threads on a small shared machine wait for one another in slices of 8 ms."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.fixture
def compare(benchmark, capsys):
    """Times contenders side by side, prints the table, and hands the medians to pytest-benchmark's report."""

    def run(title, contenders, ours, copied_bytes, moved):
        times = medians(contenders)
        with capsys.disabled():
            print(table(title, times, ours, "copy", copied_bytes, moved))
        benchmark.extra_info.update({name: median for name, (_, median, _) in times.items()})
        benchmark.pedantic(contenders[ours], rounds=5, iterations=1)

    return run
