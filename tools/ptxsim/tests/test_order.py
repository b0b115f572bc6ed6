"""Under an order_seed, results that depend on the order of blocks and warps differ; those of right kernels do not."""

import dataclasses

import pytest
import torch

import ptxsim

BLOCKS, THREADS = 6, 256
SEEDS = range(4)
DEPENDS_ON_WARPS = ["reversed<false>", "reused<false>", "sum_of_block<false>"]
DEPENDS_ON_BLOCKS = ["sum_by_last_block<(Count)1>", "sum_by_last_block<(Count)2>", "add_atomically<float>"]
RIGHT = [
    "reversed<true>",
    "reused<true>",
    "sum_of_block<true>",
    "sum_by_last_block<(Count)0>",
    "add_atomically<int>",
]


@pytest.fixture
def run(cuda_module):
    """Function (kernel, launch options) -> (bytes of the result, LaunchStats)."""
    module = cuda_module("order.cu", "compute_90")

    def run(kernel, **options):
        torch.manual_seed(0)
        x = (1000 * torch.randn(BLOCKS * THREADS)).to(torch.int32 if "<int>" in kernel else torch.float32)
        out = torch.zeros_like(x)
        sums_and_counter = [torch.zeros(BLOCKS * THREADS // 32), torch.zeros(1, dtype=torch.int32)]
        args = [x, *(sums_and_counter if "last_block" in kernel else []), out]
        stats = module.launch(kernel, BLOCKS, THREADS, args, strict=False, **options)
        return out.numpy().tobytes(), stats

    return run


@pytest.mark.parametrize("kernel", DEPENDS_ON_WARPS + DEPENDS_ON_BLOCKS)
def test_results_that_depend_on_the_order_differ_between_seeds(run, kernel):
    first, _ = run(kernel, order_seed=0)
    assert any(run(kernel, order_seed=seed)[0] != first for seed in range(1, 50))


@pytest.mark.parametrize("kernel", DEPENDS_ON_WARPS)
def test_lock_step_hides_a_missing_barrier_from_the_results(run, kernel):
    """Which is what the seeds are for: without them, nothing but the search for races finds it."""
    assert run(kernel)[0] == run(kernel.replace("false", "true"))[0]


@pytest.mark.parametrize("batch_threads", [2 * THREADS, 16384])
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_give_the_same_bits_and_counts_in_every_order(run, kernel, batch_threads):
    expected, counts = run(kernel)
    for seed in SEEDS:
        result, stats = run(kernel, order_seed=seed, batch_threads=batch_threads)
        assert result == expected
        # A branch that diverges in several groups of warps is counted once a group.
        assert dataclasses.replace(stats, divergent_branches=counts.divergent_branches) == counts


@pytest.mark.parametrize("kernel", [*DEPENDS_ON_WARPS, *DEPENDS_ON_BLOCKS])
def test_a_seed_gives_the_same_order_again(run, kernel):
    assert run(kernel, order_seed=3)[0] == run(kernel, order_seed=3)[0]


@pytest.mark.parametrize("kernel", DEPENDS_ON_WARPS)
def test_races_are_found_in_every_order(run, kernel):
    assert all(run(kernel, order_seed=seed)[1].races for seed in SEEDS)


def test_warps_may_store_the_same_to_one_place_and_nothing_else(run):
    agree, differ = "store_together<true>", "store_together<false>"
    for seed in (None, *SEEDS):
        assert not run(agree, order_seed=seed)[1].races
        assert run(differ, order_seed=seed)[1].races


@pytest.mark.parametrize("batch_threads", [THREADS, 16384])
def test_any_block_may_come_before_any_other(cuda_module, batch_threads):
    module = cuda_module("order.cu", "compute_90")
    earlier = torch.eye(BLOCKS, dtype=torch.bool)
    for seed in range(24):
        counter, place = torch.zeros(1, dtype=torch.int32), torch.zeros(BLOCKS, dtype=torch.int32)
        module.launch(
            "places", BLOCKS, THREADS, [counter, place], order_seed=seed, batch_threads=batch_threads
        )
        assert sorted(place.tolist()) == list(range(BLOCKS))
        earlier |= place[:, None] < place
    assert earlier.all()


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_warps_that_wait_for_others_do_not_keep_them_from_running(cuda_module, seed):
    warps = THREADS // 32
    flags, out = (torch.zeros(warps, dtype=torch.int32) for _ in range(2))
    module = cuda_module("order.cu", "compute_90")
    module.launch("wait_for_the_next", 1, THREADS, [flags, out], order_seed=seed)
    assert out.tolist() == list(range(warps))[::-1]


def test_a_deadlock_is_found_in_every_order(cuda_module):
    module = cuda_module("faults.cu", "compute_90")
    for seed in SEEDS:
        with pytest.raises(ptxsim.Deadlock, match=r"64 threads.*barrier"):
            module.launch("barrier_deadlock", 1, 64, [torch.zeros(256)], order_seed=seed)
