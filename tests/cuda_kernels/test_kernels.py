"""The CUDA kernels, as nvcc compiles them for three architectures and ptxsim executes them on the CPU."""

import functools
import re
import shutil

import numpy as np
import ptxsim
import pytest
import torch
from budgets import measure, settle
from harness import targets
from ops import simulated_cuda
from ops.simulated_cuda import ARCHITECTURES, ROOT, TYPES, Simulation, structures
from ptxsim import static, toolchain

from ddpm_fast.ops import reference

pytestmark = pytest.mark.skipif(not toolchain.has_tool("nvcc"), reason="no nvcc")

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
N = 4
NOISE_TOLERANCE = 4e-6


@functools.cache
def simulation(arch):
    return Simulation(arch)


@pytest.fixture(params=ARCHITECTURES)
def cuda(request):
    return simulation(request.param)


def on_architectures(names, cases, everywhere):
    """Parametrises with all cases on one architecture, and with the first few on the others."""
    pairs = [(90, case) for case in cases] + [(arch, case) for case in cases[:everywhere] for arch in (80, 100)]
    values = [pytest.param(arch, *case, id="-".join(map(str, (arch, *case)))) for arch, case in pairs]
    return pytest.mark.parametrize(("cuda", *names), values, indirect=["cuda"])


def make_keys(*shape):
    return torch.randint(-(2**63), 2**63 - 1, (*shape, 2))


def laid_out(x, layout):
    return x.contiguous(memory_format=layout)


def images(*shape, layout=torch.channels_last, dtype=F32):
    return laid_out(torch.randn(shape), layout).to(dtype)


def unaligned(x):
    """The same values and strides, from an address that is not a multiple of 16."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def assert_rounded(actual, exact, error):
    """actual is `exact`, wrong by at most `error` before it was rounded to its dtype."""
    eps = 0 if actual.dtype == F32 else torch.finfo(actual.dtype).eps / 2
    bound = error + (exact.abs() + error) * eps + torch.finfo(actual.dtype).smallest_normal
    difference = (actual.double() - exact).abs()
    assert bool((difference <= bound).all()), f"{difference.max()} at {exact.flatten()[difference.argmax()]}"


def doubled(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


SHAPES = [
    ((N, 3, 16, 24), torch.channels_last),
    ((N, 3, 16, 24), torch.contiguous_format),
    ((N, 3, 7, 9), torch.contiguous_format),
    ((N, 5, 7, 9), torch.contiguous_format),
    ((N, 2, 3, 5, 4), torch.contiguous_format),
    ((N, 1, 28, 28), torch.contiguous_format),
    ((N, 7, 3), torch.contiguous_format),
    ((N, 2), torch.contiguous_format),
    ((N, 3, 70, 66), torch.channels_last),
]
LAYOUTS = on_architectures(("shape", "layout"), SHAPES, 2)
PAIRS = pytest.mark.parametrize(("wide", "narrow"), [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)])


# Right results


def test_keys_are_folded_to_the_bit(cuda):
    keys, data = make_keys(333), torch.randint(-(2**63), 2**63 - 1, (333,))
    assert torch.equal(cuda.fold_in(keys, data), reference.fold_in(keys, data))


@pytest.mark.parametrize("size", [4096, 4095, 3, 1])
def test_normals_are_those_of_the_reference(cuda, size):
    keys = make_keys(5)
    keys[0, 1] = -2  # a counter that wraps
    torch.testing.assert_close(cuda.normal(keys, size), reference.normal(keys, size), rtol=0, atol=NOISE_TOLERANCE)


def test_normals_are_right_where_u_is_near_one_and_near_zero(cuda):
    """sqrt(-2 ln u) at u = 1 - 2^-24 is 3.5e-4: an error of an ulp in ln u would be of the same size."""
    keys = make_keys(64)
    exact = reference.normal(keys, 40_000).double()
    radius = exact.view(64, -1, 2).square().sum(-1).sqrt()
    assert radius.min() < 2e-3
    assert radius.max() > 5
    torch.testing.assert_close(cuda.normal(keys, 40_000).double(), exact, rtol=0, atol=NOISE_TOLERANCE)


@PAIRS
@LAYOUTS
def test_q_sample_with_given_noise_has_the_bits_of_the_reference(cuda, shape, layout, wide, narrow):
    rows, t = torch.rand(9, 2), torch.tensor([0, 8, 3, 3])
    x, noise = images(*shape, layout=layout, dtype=wide), images(*shape, layout=layout, dtype=wide)
    for start in (x, unaligned(x), torch.randint(256, shape, dtype=U8).to(memory_format=layout)):
        eps = noise.float() if start.dtype == U8 else noise
        actual = cuda.q_sample(start, eps, None, t, rows, narrow)
        assert torch.equal(actual, reference.q_sample(start, eps, None, t, rows, narrow))


@PAIRS
@LAYOUTS
def test_q_sample_makes_the_noise_of_the_keys(cuda, shape, layout, wide, narrow):
    rows, t, keys = torch.rand(9, 2), torch.tensor([0, 8, 3, 3]), make_keys(N)
    x = images(*shape, layout=layout, dtype=wide)
    exact = reference.q_sample(x.double(), reference.noise_of(keys, shape).double(), None, t, rows, torch.float64)
    for start in (x, unaligned(x)):
        assert_rounded(cuda.q_sample(start, None, keys, t, rows, narrow), exact, NOISE_TOLERANCE)


def sum_tolerance(size):
    """Of sums of terms of one sign, each with four roundings: 32 in a thread, then a tree, then partial sums."""
    return (32 + 16 + size / 8192 + 4) * 2**-24


@pytest.mark.parametrize("loss_type", range(3))
@PAIRS
@LAYOUTS
def test_weighted_loss_and_its_gradient(cuda, shape, layout, wide, narrow, loss_type):
    rows, t, keys = torch.rand(9, 3) + 0.5, torch.tensor([0, 8, 3, 3]), make_keys(N)
    pred, x, eps = (images(*shape, layout=layout, dtype=dtype) for dtype in (narrow, wide, wide))
    bytes_ = torch.randint(256, shape, dtype=U8).to(memory_format=layout)
    targets = [
        (x, None, keys),
        (None, None, keys),
        (x, eps, None),
        (None, eps, None),
        (x, None, None),
        (bytes_, None, keys),
    ]
    for target in targets:
        loss, grad = cuda.weighted_loss(pred, *target, t, rows, None, loss_type, 0.25, True)
        start, noise, key = target
        noise = noise if key is None else reference.noise_of(key, shape)
        start = start if start is None or start.dtype != U8 else start.double() * (2 / 255) - 1
        exact = doubled([pred, start, noise, None, t, rows, reference.LOSS_TYPES[loss_type]])
        expected = 0.25 * reference.weighted_loss(*exact)
        # an error of 4e-6 in the noise of each element, to first order
        slope = 0.25 * reference.weighted_loss_gradient(*exact)
        from_noise = 1.5 * NOISE_TOLERANCE * slope.abs().flatten(1).sum(1)
        size = pred[0].numel()
        assert bool(((loss - expected).abs() <= from_noise + expected * sum_tolerance(size)).all())
        weight = 0.25 * 2 * 1.5 / size
        jump = loss_type == 1 and (slope.sign() != grad.double().sign()) & (slope != 0)
        if loss_type == 1:  # the sign of an error that the noise's rounding decides
            assert jump.sum() <= 2
            slope = torch.where(jump, grad.double(), slope)
        assert_rounded(grad, slope, 2 * weight * NOISE_TOLERANCE)
        without, nothing = cuda.weighted_loss(pred, *target, t, rows, None, loss_type, 0.25, False)
        assert torch.equal(without, loss)
        assert nothing.numel() == 0


@PAIRS
@LAYOUTS
def test_reverse_step(cuda, shape, layout, wide, narrow):
    rows = torch.rand(9, 8)
    rows[:, 6:] = -rows[:, 6:] - 1
    rows[3, 5] = 0
    x, eps, previous = (images(*shape, layout=layout, dtype=wide) for _ in range(3))
    pred, variance = (images(*shape, layout=layout, dtype=narrow) for _ in range(2))
    bounds = torch.tensor([[-1.0, 1.0], [-0.3, 0.2], [-9.0, 9.0], [-1.0, 0.0]])
    each, shared = torch.tensor([0, 8, 3, 3]), torch.tensor(8)
    key, keys = make_keys(1, N), make_keys(9, N)
    for noise, key_table, prev, learned, clip, step in (
        (None, key, None, None, None, each),
        (None, keys, previous, variance, bounds, each),
        (eps, None, previous, variance, None, shared),
        (None, None, previous, None, bounds, shared),
        (None, keys, None, variance, None, shared),
    ):
        table = rows if learned is not None else rows[:, :6].contiguous()
        z = noise
        if key_table is not None:
            chosen = key_table[0] if len(key_table) == 1 else key_table[step.expand(N), torch.arange(N)]
            z = reference.noise_of(chosen, shape)
        x_next, x_start, model_input = out = targets(x, pred, True, True)
        cuda.reverse_step(x, pred, noise, key_table, prev, learned, clip, step, table, -0.7, 0.9, *out)
        exact = reference.reverse_step(*doubled([x, pred, z, None, prev, learned, clip, step, table]), -0.7, 0.9)
        error = NOISE_TOLERANCE + 6 * 2**-24 * (x.abs().max() + pred.abs().max() + 5)
        assert_rounded(x_start, exact[1], error)
        assert_rounded(x_next, exact[0], error)
        assert torch.equal(model_input, x_next.to(narrow)) or wide == narrow or x_next.dtype != F32
        assert_rounded(model_input, exact[0], error)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@LAYOUTS
def test_vlb_terms(cuda, shape, layout, dtype):
    rows = torch.rand(9, 8)
    rows[:, 4:] = -4 * rows[:, 4:]
    rows[0, 4:] = -9  # as narrow as the bins
    t = torch.tensor([0, 8, 3, 0])
    x_t, pred, variance = (images(*shape, layout=layout, dtype=dtype) for dtype in (F32, dtype, dtype))
    bytes_ = torch.randint(256, shape, dtype=U8).to(memory_format=layout)
    floats = bytes_.float() * (2 / 255) - 1
    for x_start in (bytes_, floats, unaligned(floats)):
        for learned in (None, variance):
            table = rows if learned is not None else rows[:, :6].contiguous()
            expected = reference.vlb_terms(*doubled([floats, x_t, pred, learned, t, table]), -1.0, 1.0)
            actual = cuda.vlb_terms(x_start, x_t, pred, learned, t, table, -1.0, 1.0)
            torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=0)


NORMS = [
    ((2, 32, 8, 8), 8, torch.channels_last),
    ((2, 32, 8, 8), 8, torch.contiguous_format),
    ((2, 320, 4, 4), 32, torch.channels_last),
    ((3, 12, 5, 7), 3, torch.channels_last),
    ((3, 12, 5, 7), 12, torch.contiguous_format),
    ((2, 64, 33, 32), 32, torch.channels_last),
    ((2, 64, 33, 32), 1, torch.contiguous_format),
    ((1, 128, 64, 48), 4, torch.channels_last),
    ((1, 4, 300, 300), 1, torch.contiguous_format),
    ((1, 2560, 2, 2), 32, torch.channels_last),
    ((1, 7000, 1, 1), 7, torch.contiguous_format),
    ((5, 6, 11), 3, torch.contiguous_format),
    ((5, 8), 2, torch.contiguous_format),
]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("dtype", "of_parameters"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)])
@on_architectures(("shape", "groups", "layout"), NORMS, 2)
def test_group_norm_silu_and_its_gradient(cuda, shape, groups, layout, dtype, of_parameters, silu):
    x, grad = (laid_out(torch.randn(shape), layout).to(dtype) for _ in range(2))
    x += laid_out(torch.randn(shape[:2]).view(*shape[:2], *[1] * (x.ndim - 2)).expand(shape), layout).to(dtype)
    weight, bias = (torch.randn(shape[1]).to(of_parameters) for _ in range(2))
    scale, shift = (torch.randn(shape[:2]).to(dtype) for _ in range(2))
    for modulation in ((None, None), (scale, shift)):
        parameters = (weight, bias, *modulation)
        y, mean, rstd = cuda.group_norm_silu(x, *parameters, groups, 1e-5, silu)
        inputs = [x, *parameters]
        leaves = [v.double().requires_grad_() if v is not None else None for v in inputs]
        expected, exact_mean, exact_rstd = reference.group_norm_silu(*leaves, groups, 1e-5, silu)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rstd.double(), exact_rstd, rtol=4e-6, atol=0)
        assert_rounded(y, expected, 4e-6 * expected.abs().max())

        grads = cuda.group_norm_silu_backward(grad, x, mean, rstd, *parameters, groups, silu)
        exact = torch.autograd.grad(expected, [v for v in leaves if v is not None], grad.double())
        for actual, wanted in zip(grads, exact, strict=False):
            assert_rounded(actual, wanted, 6e-6 * wanted.abs().max())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_statistics_are_good_where_the_mean_is_far_from_zero(cuda, layout):
    """Also where the first element is not like the others."""
    x = laid_out(torch.randn(2, 32, 24, 24) + 1e5, layout)
    x[1, :, 0, 0] = -1e6
    ones, zeros = torch.ones(32), torch.zeros(32)
    y, mean, rstd = cuda.group_norm_silu(x, ones, zeros, None, None, 8, 1e-5, False)
    expected, exact_mean, exact_rstd = reference.group_norm_silu(x.double(), ones, zeros, None, None, 8, 1e-5, False)
    assert bool(((mean - exact_mean).abs() <= 2**-24 * exact_mean.abs() + 1e-5 / exact_rstd).all())
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-5, atol=0)
    # the mean's own rounding, 2^-24 of 1e5, is what remains
    torch.testing.assert_close(y.double()[0], expected[0], rtol=2e-5, atol=1e5 * 2**-23)


def test_nan_stays(cuda):
    x, pred = torch.zeros(N, 16), torch.zeros(N, 16)
    pred[1, 3] = torch.nan
    x_next, x_start, _ = out = targets(x, pred, True)
    cuda.reverse_step(x, pred, None, None, None, None, None, torch.tensor(0), torch.ones(1, 6), -1.0, 1.0, *out)
    assert torch.equal(x_next.isnan(), pred.isnan())
    assert torch.equal(x_start.isnan(), pred.isnan())


# The same bits


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_sample_has_the_same_bits_in_any_batch_and_at_any_address(layout):
    cuda = simulation(90)
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


def test_empty_tensors_launch_nothing_that_fails():
    cuda = simulation(90)
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


# Errors


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_an_index_outside_the_table_stops_the_kernel(wrong):
    cuda = simulation(90)
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


# Traffic and work


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
    cuda = simulation(90)
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
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_norm_silu_reads_x_twice_and_little_else(dtype, layout):
    cuda = simulation(90)
    x = images(2, 64, 32, 32, layout=layout, dtype=dtype)
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


def test_launches_fill_the_machine_and_keep_to_its_limits():
    cuda = simulation(90)
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


def test_offsets_beyond_2_to_the_31_are_right():
    """The first block of each sample alone: what the others would touch is never mapped."""
    cuda = simulation(90)
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


# Budgets


def short(name):
    """A kernel's name without what all have: q_sample_kernel<float, bfloat16, WideTile<8, 1>>."""
    name = re.sub(r"\(.*|^void |ddpm_fast::|__nv_|(?<=<)ddpm_fast::", "", name)
    return name.replace("__half", "float16").replace(" >", ">")


def test_kernels_keep_to_their_budgets(request):
    rows = {}
    for arch in ARCHITECTURES:
        for report in static.from_ptx(simulated_cuda.library().ptx(arch)):
            name = short(report.name)
            tile = re.search(r"(?:Wide|Scalar)Tile<(\d+)(?:, (\d+))?>", name)
            elements = int(tile[1]) * int(tile[2] or 1) if tile else None
            rows.setdefault(name, {})[f"sm_{arch}"] = measure(report, elements)
    assert not {name for name, by_arch in rows.items() if any(row["spills"] for row in by_arch.values())}
    settle("cuda", rows, update=request.config.getoption("update_budgets"))


def test_a_reverse_step_and_its_noise_take_at_most_sixty_instructions_an_element(request):
    """Of SASS, all included: addresses, tables, Philox, Box-Muller, conversions and the failing assertion."""
    rows = {}
    for arch in ARCHITECTURES:
        for report in static.from_cuda(
            ROOT / "tests/cuda_kernels/plain_step.cu", f"sm_{arch}", simulated_cuda.options()
        ):
            rows.setdefault(short(report.name), {})[f"sm_{arch}"] = measure(report, 8)
    assert len(rows) == 3
    assert max(row["per_element"] for by_arch in rows.values() for row in by_arch.values()) <= 60
    settle("plain_step", rows, update=request.config.getoption("update_budgets"))


# Planted faults: that the tests above would see one


FAULTS = {
    "q_sample.cu": ("for_tiles(tiles,", "for_tiles(tiles + 1,"),  # out of bounds
    "tile.cuh": ("sample_size % kWidth == 0 && aligned(tensors)", "sample_size % kWidth == 0"),
    "sample_sum.cuh": ("  __syncthreads();\n", ""),  # a race
    "reduce.cuh": ("thread % kWarp == 0", "thread % (2 * kWarp) == 0"),  # a sum that nobody wrote
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name, (right, wrong) in FAULTS.items():
        path = folder / "csrc/cuda" / name
        text = path.read_text()
        assert text.count(right) == 1, name
        path.write_text(text.replace(right, wrong))
    return Simulation(90, simulated_cuda.Library(folder / "csrc", folder, (90,)))


def test_planted_faults_are_found(broken):
    t, rows = torch.arange(N), torch.rand(N, 6)
    x, ones, odd = images(N, 3, 20, 24), torch.ones(3), torch.randn(N, 8 * 131)  # an odd number of tiles
    with pytest.raises(ptxsim.OutOfBounds):
        broken.q_sample(odd, odd, None, t, rows[:, :2].contiguous(), F32)
    with pytest.raises(ptxsim.MisalignedAccess):
        broken.reverse_step(unaligned(x), x, None, None, None, None, None, t, rows, -1.0, 1.0, *targets(x, x))
    with pytest.raises(ptxsim.SharedMemoryRace):
        broken.weighted_loss(x, x, None, None, t, rows[:, :3].contiguous(), None, 0, 1.0, True)
    with pytest.raises(ptxsim.UninitialisedSharedRead):
        broken.group_norm_silu(x.contiguous(), ones, ones, None, None, 1, 1e-5, True)
