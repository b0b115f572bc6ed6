"""The CUDA kernels at their edges: sizes that take several blocks, addresses that allow no vectors, extreme numbers.

nvcc compiles them, and ptxsim executes them on the CPU. What ordinary calls give is in tests/ops; here, too, the bounds
of tests/ops/harness.py judge the results.
"""

import architectures
import numpy as np
import ptxsim
import pytest
import torch
from cuda_kernels.inputs import BF16, F16, F32, U8, N, images, make_keys, unaligned
from harness import NOISE, Case, T, assert_true, data, make_t, schedule, targets, vlb_rows
from ptxsim import toolchain
from runners import Runner, simulated_cuda
from simulated_cuda import TYPES, simulation, structures

from ddpm_fast.ops import reference

pytestmark = pytest.mark.skipif(not toolchain.has_tool("nvcc"), reason="no nvcc")


@pytest.fixture(params=architectures.chosen)
def cuda(request):
    return simulation(request.param)


def check(*cases):
    for arch in architectures.chosen:
        runner = Runner(f"cuda-sm{arch}", simulated_cuda(arch), simulated=True)
        for case in cases:
            assert_true(case, runner.call(case.op, case.arguments))


# Sizes and addresses


def elementwise(shape, wide, narrow, layout, prepare=lambda x: x):
    """Every op on images, with all tensors that it takes; `prepare` is called with each of them."""

    def tensor(i, dtype):
        return prepare(data(shape, dtype, layout, i))

    n = shape[0]
    t, keys = make_t(n), make_keys(n)
    x, x_prev, noise = (tensor(i, wide) for i in range(3))
    pred, variance = tensor(3, narrow), tensor(4, narrow)
    pixels = tensor(5, U8)
    x_t = prepare(pixels.float() * (2 / 255) - 1 + 0.05 * data(shape, F32, layout, 6))
    small, learned = prepare(0.1 * data(shape, narrow, layout, 7)), prepare(variance.clamp(-1, 1))
    out = [prepare(y) for y in targets(x, pred, True, True)]
    upstream = torch.randn(n)
    return [
        Case("q_sample", (x, noise, None, t, schedule(2), narrow)),
        Case("q_sample", (pixels, None, keys, t, schedule(2), narrow)),
        Case("weighted_loss", (pred, x, None, keys, t, schedule(3), upstream, 0, 0.25, True)),
        Case("weighted_loss", (pred, pixels, None, keys, t, schedule(3), None, 2, 1.0, True)),
        Case(
            "reverse_step",
            (x, pred, None, make_keys(T, n), x_prev, variance, None, t, schedule(8), -0.7, 0.9, *out),
        ),
        Case("vlb_terms", (pixels, x_t, small, learned, t, vlb_rows(True), -1.0, 1.0)),
    ]


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
def test_sums_over_several_blocks(layout):
    assert 3 * 70 * 66 > 4 * 256 * 8  # four tiles of each thread of a block
    check(*elementwise((2, 3, 70, 66), F32, BF16, layout))


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
def test_addresses_that_allow_no_vectors(layout):
    check(*elementwise((2, 3, 8, 16), F32, F16, layout, unaligned))


def test_images_with_three_axes():
    check(*elementwise((2, 2, 3, 5, 4), F32, BF16, "contiguous"))


def norms(shape, groups, dtype, of_parameters, layout):
    n, c = shape[:2]
    x, grad = data(shape, dtype, layout, 0), data(shape, dtype, layout, 1)
    weight, bias = (data((c,), of_parameters, layout, i) for i in (2, 3))
    scale, shift = (data((n, c), dtype, layout, i) for i in (4, 5))
    parameters = (weight, bias, scale, shift)
    _, mean, rstd = reference.group_norm_silu(x, *parameters, groups, 1e-5, True)
    yield Case("group_norm_silu", (x, *parameters, groups, 1e-5, True))
    yield Case("group_norm_silu_backward", (grad, x, mean, rstd, *parameters, groups, True))


@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "of_parameters", "layout"),
    [
        pytest.param((2, 64, 33, 32), 32, BF16, F32, "channels last", id="a few slices"),
        pytest.param((1, 64, 33, 32), 1, F16, F16, "contiguous", id="a few slices of one group, planar"),
        pytest.param((1, 128, 64, 34), 4, BF16, BF16, "channels last", id="slices that a kernel of its own joins"),
        pytest.param((1, 2, 300, 450), 1, BF16, F32, "contiguous", id="slices that a kernel of its own joins, planar"),
        pytest.param((2, 320, 4, 4), 32, F32, F32, "channels last", id="more channels than a block has vectors"),
        pytest.param((1, 2560, 2, 2), 32, F32, F32, "channels last", id="more shared memory than a kernel has unasked"),
    ],
)
def test_group_norm_of_any_size(shape, groups, dtype, of_parameters, layout):
    check(*norms(shape, groups, dtype, of_parameters, layout))


def test_group_norm_of_thousands_of_channels_of_one_pixel():
    """What the statistics' kernel keeps of each channel, 8 bytes, fits into the 64 KiB that Turing has."""
    check(*norms((1, 7000, 1, 1), 7, F32, F32, "contiguous"))


def test_offsets_beyond_2_to_the_31_are_right():
    """The first block of each sample alone: what the others would touch is never mapped."""
    cuda = simulation(architectures.chosen[0])
    samples, size = 514, 1 << 22
    x, out = (np.empty((samples, size), np.uint16) for _ in range(2))
    x[512:, :1024] = torch.randn(2, 1024).bfloat16().view(torch.int16).numpy().view(np.uint16)
    noise = np.empty((samples, size), np.uint16)
    noise[512:, :1024] = 0
    t, rows = torch.zeros(samples, dtype=torch.int64), torch.tensor([[2.0, 0.0]])
    q = structures().QSample(
        x.ctypes.data, noise.ctypes.data, None, t.data_ptr(), rows.data_ptr(), out.ctypes.data,
        structures().Shape(samples, 1, size, False), 1, TYPES[BF16], TYPES[BF16],
    )  # fmt: skip
    (name,) = (
        kernel
        for kernel in cuda.host.module.kernels
        if "q_sample_kernel<__nv_bfloat16, __nv_bfloat16, ddpm_fast::WideTile" in toolchain.demangle(kernel)
        and "8, 1" in toolchain.demangle(kernel)
    )
    cuda.host.module.launch(
        name, (1, samples, 1), (128, 1, 1), [bytes(q), size // 8, 128], tensors=[x, noise, out, t, rows]
    )
    doubled_ = torch.from_numpy(x[512:, :1024].view(np.int16)).view(BF16) * 2
    assert torch.equal(torch.from_numpy(out[512:, :1024].view(np.int16)).view(BF16), doubled_)


# Extreme numbers


def test_normals_are_right_where_u_is_near_one_and_near_zero(cuda):
    """sqrt(-2 ln u) at u = 1 - 2^-24 is 3.5e-4: an error of an ulp in ln u would be of the same size."""
    keys = make_keys(64)
    exact = reference.normal(keys, 40_000).double()
    radius = exact.view(64, -1, 2).square().sum(-1).sqrt()
    assert radius.min() < 2e-3
    assert radius.max() > 5
    torch.testing.assert_close(cuda.normal(keys, 40_000).double(), exact, rtol=0, atol=NOISE)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_statistics_are_good_where_the_mean_is_far_from_zero(cuda, layout):
    """Also where the first element is not like the others."""
    x = images(2, 32, 24, 24, layout=layout) + 1e5
    x[1, :, 0, 0] = -1e6
    ones, zeros = torch.ones(32), torch.zeros(32)
    y, mean, rstd = cuda.group_norm_silu(x, ones, zeros, None, None, 8, 1e-5, False)
    expected, exact_mean, exact_rstd = reference.group_norm_silu(x.double(), ones, zeros, None, None, 8, 1e-5, False)
    assert bool(((mean - exact_mean).abs() <= 2**-24 * exact_mean.abs() + 1e-5 / exact_rstd).all())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-5, atol=0)
    # the mean's own rounding, 2^-24 of 1e5, is what remains
    torch.testing.assert_close(y.double()[0], expected[0], rtol=2e-5, atol=1e5 * 2**-23)


# The same bits


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_sample_has_the_same_bits_in_any_batch_and_at_any_address(layout):
    cuda = simulation(architectures.chosen[0])
    x, pred = images(N, 3, 70, 66, layout=layout), images(N, 3, 70, 66, layout=layout, dtype=BF16)
    keys, t, rows = make_keys(N), torch.tensor([0, 8, 3, 3]), torch.rand(9, 3)
    loss, grad = cuda.weighted_loss(pred, x, None, keys, t, rows, None, 0, 1.0, True)
    for one in (slice(2, 3), slice(1, 4)):
        part = cuda.weighted_loss(
            unaligned(pred[one]), unaligned(x[one]), None, keys[one], t[one], rows, None, 0, 1.0, True
        )
        assert torch.equal(part[0], loss[one])
        assert torch.equal(part[1], grad[one])
    wide = images(N, 24, 40, 20, layout=layout)
    ones = torch.ones(24)
    whole = cuda.group_norm_silu(wide, ones, ones, None, None, 3, 1e-5, True)
    for actual, expected in zip(
        cuda.group_norm_silu(wide[2:3], ones, ones, None, None, 3, 1e-5, True), whole, strict=True
    ):
        assert torch.equal(actual, expected[2:3])


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
def test_every_op_has_the_same_bits_in_every_order_of_blocks_and_warps(layout, monkeypatch):
    arch = architectures.chosen[0]
    runner, host = Runner("cuda", simulated_cuda(arch), simulated=True), simulation(arch).host
    cases = [
        *elementwise((2, 3, 70, 66), F32, BF16, layout),
        *norms((2, 64, 33, 32), 32, BF16, F32, layout),  # a few slices
        *norms((1, 128, 64, 34), 4, BF16, BF16, layout),  # slices that a kernel of its own joins
    ]
    for case in cases:
        expected = [result.clone() for result in runner.call(case.op, case.arguments)]
        assert host.launches[0].blocks > 1
        for seed in range(3):
            with monkeypatch.context() as patch:
                patch.setitem(host.launch_options, "order_seed", seed)
                results = runner.call(case.op, case.arguments)
            assert all(map(torch.equal, results, expected)), f"{case}, order {seed}"


# Nothing, and what must not be


def test_empty_tensors_launch_nothing_that_fails():
    cuda = simulation(architectures.chosen[0])
    rows, empty, t = torch.rand(3, 6), torch.empty(0, 3, 4, 4), torch.empty(0, dtype=torch.int64)
    assert cuda.normal(make_keys(0), 5).shape == (0, 5)
    assert cuda.q_sample(empty, None, make_keys(0), t, rows[:, :2].contiguous(), F32).shape == empty.shape
    cuda.reverse_step(empty, empty, None, None, None, None, None, t, rows, -1.0, 1.0, *targets(empty, empty))
    nothing = torch.empty(2, 0)
    loss, _ = cuda.weighted_loss(
        nothing, nothing, None, None, torch.tensor([0, 1]), rows[:, :3].contiguous(), None, 0, 1.0, True
    )
    assert torch.equal(loss, torch.zeros(2))
    grads = cuda.group_norm_silu_backward(
        empty, empty, torch.empty(0, 1), torch.empty(0, 1), torch.ones(3), torch.ones(3), None, None, 1, True
    )
    assert torch.equal(grads[1], torch.zeros(3))


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_an_index_outside_the_table_stops_the_kernel(wrong):
    cuda = simulation(architectures.chosen[0])
    x, keys, t = images(N, 3, 8, 8), make_keys(N), torch.tensor([0, 1, 2, wrong])
    calls = {
        "q_sample": lambda: cuda.q_sample(x, None, keys, t, torch.rand(9, 2), F32),
        "weighted_loss": lambda: cuda.weighted_loss(x, x, None, None, t, torch.rand(9, 3), None, 0, 1.0, True),
        "reverse_step": lambda: cuda.reverse_step(
            x,
            x,
            None,
            keys.expand(9, N, 2).contiguous(),
            None,
            None,
            None,
            t,
            torch.rand(9, 6),
            -1.0,
            1.0,
            *targets(x, x),
        ),
        "vlb_terms": lambda: cuda.vlb_terms(x, x, x, None, t, torch.rand(9, 6), -1.0, 1.0),
    }
    for call in calls.values():
        with pytest.raises(ptxsim.Trap, match="assert"):
            call()
