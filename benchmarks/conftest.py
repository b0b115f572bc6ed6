import os

import pytest
import torch
from side_by_side import bandwidth_table, medians


def pytest_xdist_auto_num_workers(config):
    """No workers: what is timed must have the machine to itself."""
    return 0


@pytest.fixture(autouse=True, scope="session")
def one_thread_on_one_core():
    """On a small shared machine, two OpenMP threads wait for one another in slices of 8 ms."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.fixture
def compare(benchmark, capsys):
    """Times contenders in turns, prints the table, and adds the medians to pytest-benchmark's report.

    `moved`: the fewest bytes that a contender can read and write; those of "copy" give the ceiling.
    """

    def run(title, contenders, ours, moved):
        times = medians(contenders)
        with capsys.disabled():
            print(bandwidth_table(title, times, ours, "copy", moved))
        benchmark.extra_info.update({name: median for name, (_, median, _) in times.items()})
        benchmark.pedantic(contenders[ours], rounds=5, iterations=1)

    return run
