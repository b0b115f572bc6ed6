"""What the CUDA kernels move and use: bytes, launches, registers and instructions."""

import re

import architectures
import pytest
import simulated_cuda
import torch
from budgets import measure, most_of_a_reverse_step, settle
from cuda_kernels.inputs import BF16, F16, F32, N, images, make_keys
from harness import targets
from ptxsim import static, toolchain
from simulated_cuda import ROOT, simulation
from step_cost import launches_of_norm

pytestmark = pytest.mark.skipif(not toolchain.has_tool("nvcc"), reason="no nvcc")

PAIRS = pytest.mark.parametrize(("wide", "narrow"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)])


def memory_of(*tensors):
    """The bytes of the 32-byte sectors that tensors lie in."""
    return sum(-(-x.numel() * x.element_size() // 32) * 32 for x in tensors)


def assert_traffic(launches, read, written, times=1):
    assert sum(launch.unique_loaded_bytes for launch in launches) == times * memory_of(*read)
    assert sum(launch.unique_stored_bytes for launch in launches) == memory_of(*written)
    assert sum(launch.stored_bytes for launch in launches) == sum(x.numel() * x.element_size() for x in written)


@PAIRS
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_each_op_reads_and_writes_what_it_must_and_no_more(wide, narrow, layout):
    cuda = simulation(architectures.chosen[0])
    x = images(N, 3, 32, 32, layout=layout, dtype=wide)
    pred, previous = images(N, 3, 32, 32, layout=layout, dtype=narrow), images(N, 3, 32, 32, layout=layout, dtype=wide)
    keys, t = make_keys(N), torch.arange(N)

    rows = torch.rand(N, 2)
    out = cuda.q_sample(x, None, keys, t, rows, narrow)
    assert_traffic(cuda.launches, (x, keys, t, rows), (out,))

    rows = torch.rand(N, 3)
    loss, grad = cuda.weighted_loss(pred, x, None, keys, t, rows, None, 0, 1.0, True)
    assert len(cuda.launches) == 1
    assert_traffic(cuda.launches, (pred, x, keys, t, rows), (loss, grad))
    loss, grad = cuda.weighted_loss(pred, None, None, keys, t, rows, None, 0, 1.0, True)
    assert_traffic(cuda.launches, (pred, keys, t, rows), (loss, grad))

    rows = torch.rand(N, 6)
    out = targets(x, pred)
    cuda.reverse_step(x, pred, None, keys[None], None, None, None, t, rows, -1.0, 1.0, *out)
    assert_traffic(cuda.launches, (x, pred, keys, t, rows), out[:1])
    out = targets(x, pred, True, True)
    cuda.reverse_step(x, pred, None, keys[None], previous, None, None, t, rows, -1.0, 1.0, *out)
    assert_traffic(cuda.launches, (x, pred, keys, t, rows, previous), out)

    if wide == F32:
        out = cuda.vlb_terms(x, x.clone(), pred, None, t, rows, -1.0, 1.0)
        assert len(cuda.launches) == 1
        assert_traffic(cuda.launches, (x, x, pred, t, rows), (out,))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("size", "layout"), [(48, torch.channels_last), (32, torch.contiguous_format)])
def test_group_norm_silu_of_large_planes_reads_x_twice_and_little_else(dtype, size, layout):
    cuda = simulation(architectures.chosen[0])
    x = images(2, 64, size, size, layout=layout, dtype=dtype)
    weight, bias, grad = torch.ones(64), torch.ones(64), torch.randn_like(x)
    y, mean, rstd = cuda.group_norm_silu(x, weight, bias, None, None, 8, 1e-5, True)
    assert len(cuda.launches) == 2
    read = sum(launch.unique_loaded_bytes for launch in cuda.launches)
    written = sum(launch.unique_stored_bytes for launch in cuda.launches)
    assert 2 * memory_of(x) <= read <= 2.02 * memory_of(x)
    assert memory_of(y) <= written <= 1.02 * memory_of(y)
    cuda.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, None, None, 8, True)
    assert len(cuda.launches) == 3
    read = sum(launch.unique_loaded_bytes for launch in cuda.launches)
    written = sum(launch.unique_stored_bytes for launch in cuda.launches)
    assert 4 * memory_of(x) <= read <= 4.1 * memory_of(x)
    assert memory_of(x) <= written <= 1.1 * memory_of(x)


# Of the U-Net for CIFAR-10: (channels of x, of a skip connection, H = W), with 32 groups.
NORMS = [(128, 0, 32), (128, 128, 32), (256, 128, 32), (256, 0, 16), (256, 128, 16), (256, 256, 16), (256, 256, 8)]
NORMS += [(256, 0, 4), (256, 256, 4)]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("own", "others", "size"), NORMS, ids=map(str, NORMS))
def test_a_norm_of_the_network_reads_and_writes_everything_once(own, others, size, dtype):
    """Unless it is too large for one launch, as step_cost.py has it, after which the network's costs are counted."""
    cuda = simulation(architectures.chosen[0])
    channels = own + others
    x, residual = images(1, own, size, size, dtype=dtype), images(1, own, size, size, dtype=dtype)
    skip = images(1, others, size, size, dtype=dtype) if others else None
    weight, bias, input_bias = torch.ones(channels), torch.ones(channels), torch.ones(own)
    y, h, mean, rstd = cuda.add_group_norm_silu(
        x, input_bias, residual, skip, weight, bias, None, None, 32, 1e-5, True, True
    )
    inputs = [v for v in (x, residual, skip) if v is not None]
    count = launches_of_norm(channels, own, size**2, 32, x.element_size())
    assert len(cuda.launches) == count
    small = 2**14  # parameters and statistics
    read = sum(launch.unique_loaded_bytes for launch in cuda.launches)
    again = memory_of(h) if count > 1 else 0
    assert memory_of(*inputs) <= read - again <= memory_of(*inputs) + small * count
    assert sum(launch.unique_stored_bytes for launch in cuda.launches) <= memory_of(y, h) + small
    # An H100 has 132 multiprocessors: eight images give half of them a block or more, for which a thread loads its
    # vectors of all inputs and the parameters, one after the other but for those in flight together.
    assert 8 * cuda.launches[0].blocks >= 64
    assert cuda.launches[0].loads_of_a_thread <= 22

    assert torch.equal(cuda.recompute_group_norm_silu(h, None, mean, rstd, weight, bias, 32, True), y)
    (launch,) = cuda.launches
    assert memory_of(h) <= launch.unique_loaded_bytes <= memory_of(h) + small
    assert launch.unique_stored_bytes == memory_of(h)

    grad, grad_sum = torch.randn_like(y), torch.randn_like(y)
    given = (grad, grad_sum, h, input_bias, mean, rstd, weight, bias)
    cuda.add_group_norm_silu_backward(*given, None, None, 32, True, True, own)
    count = launches_of_norm(channels, own, size**2, 32, x.element_size(), backward=True)
    assert len(cuda.launches) == count
    if count == 2:
        slab, samples = cuda.launches
        assert 8 * slab.blocks >= 64
        assert slab.loads_of_a_thread <= 21
        assert samples.loads_of_a_thread <= 3  # of a sample: a warp adds up every eighth
        read = sum(launch.unique_loaded_bytes for launch in cuda.launches)
        assert memory_of(grad, grad_sum, h) <= read <= memory_of(grad, grad_sum, h) + 2 * small
        assert sum(launch.unique_stored_bytes for launch in cuda.launches) <= memory_of(h) + 2 * small


def test_launches_fill_the_machine_and_keep_to_its_limits():
    cuda = simulation(architectures.chosen[0])
    one = torch.randn(1, 3, 256, 256)
    cuda.q_sample(one, None, make_keys(1), torch.tensor([0]), torch.rand(1, 2), F32)
    assert cuda.launches[-1].grid[0] >= 128
    cuda.weighted_loss(one, one, None, None, torch.tensor([0]), torch.rand(1, 3), None, 0, 1.0, True)
    assert cuda.launches[0].grid[0] >= 64
    assert len(cuda.launches) == 2
    many = torch.randn(4096, 2)
    t = torch.zeros(4096, dtype=torch.int64)
    cuda.q_sample(many, many, None, t, torch.rand(1, 2), F32)
    assert (cuda.launches[-1].grid, cuda.launches[-1].block) == ((1, 32, 1), (1, 128, 1))
    crowd = torch.randn(70_000, 40)
    x = cuda.q_sample(crowd, crowd, None, torch.zeros(70_000, dtype=torch.int64), torch.ones(1, 2), F32)
    assert torch.equal(x, crowd + crowd)


# Budgets


def short(name):
    """A kernel's name without what all have: q_sample_kernel<float, bfloat16, WideTile<8, 1>>."""
    name = re.sub(r"\(.*|^void |ddpm_fast::|__nv_|(?<=<)ddpm_fast::", "", name)
    return name.replace("__half", "float16").replace(" >", ">")


def test_kernels_keep_to_their_budgets(request):
    rows = {}
    for arch in architectures.chosen:
        for report in static.from_ptx(simulated_cuda.library().ptx(arch)):
            name = short(report.name)
            tile = re.search(r"(?:Wide|Scalar)Tile<(\d+)(?:, (\d+))?>", name)
            elements = int(tile[1]) * int(tile[2] or 1) if tile else None
            rows.setdefault(name, {})[f"sm_{arch}"] = measure(report, elements)
    assert not {name for name, by_arch in rows.items() if any(row["spills"] for row in by_arch.values())}
    settle("cuda", rows, update=request.config.getoption("update_budgets"))


def test_a_reverse_step_and_its_noise_take_at_most_sixty_instructions_an_element(request):
    """Of SASS, all included: addresses, tables, Philox, Box-Muller, conversions and the failing assertion."""
    rows, too_many = {}, []
    for arch in architectures.chosen:
        for report in static.from_cuda(
            ROOT / "tests/cuda_kernels/plain_step.cu", f"sm_{arch}", simulated_cuda.options()
        ):
            name = short(report.name)
            rows.setdefault(name, {})[f"sm_{arch}"] = row = measure(report, 8)
            if row["per_element"] > most_of_a_reverse_step(arch, re.search(r"<(\w+)", name)[1]):
                too_many.append((name, arch, row["per_element"]))
    assert len(rows) == 5
    assert not too_many
    settle("plain_step", rows, update=request.config.getoption("update_budgets"))
