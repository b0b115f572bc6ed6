"""Triton's kernels, compiled for three architectures and executed on the CPU: what only they need to be tested for.

That they compute the right thing, in every dtype, layout and shape, is in tests/ops.
"""

import functools
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from budgets import measure, settle

pytest.importorskip("triton")

import ptxsim
from compiled import simulated
from ptxsim import inductor, toolchain

from ddpm_fast import ops
from ddpm_fast.ops import reference

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
ARCHITECTURES = (80, 90, 100)
N = 4
TYPES = {"float32": (F32, F32), "float32-bfloat16": (F32, BF16), "bfloat16": (BF16, BF16)}  # of the state, of pred
LAYOUTS = {"channels-last": torch.channels_last, "planar": torch.contiguous_format}

needs_ptxas = pytest.mark.skipif(not toolchain.has_tool("cuobjdump"), reason="no CUDA toolkit")
everywhere = pytest.mark.parametrize("cc", ARCHITECTURES)


def images(*shape, dtype=F32, layout=torch.channels_last):
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def make_keys(*shape):
    return torch.randint(-(2**63), 2**63 - 1, (*shape, 2))


def elementwise(wide, narrow, channels=3, size=32, layout=torch.channels_last, n=N):
    """Name -> (a call, bytes that it must read, bytes that it must write), for images with noise from keys."""
    make = functools.partial(images, n, channels, size, size, layout=layout)
    x, pred, x_prev, v = make(dtype=wide), make(dtype=narrow), make(dtype=wide), make(dtype=narrow)
    keys, t, rows = make_keys(n), torch.arange(n), torch.rand(n, 8)
    leaf, x_0, x_t = pred.clone().requires_grad_(), x.float().clone(), x.float().clone()
    full = {"variance": v, "x_start_prev": x_prev, "return_x_start": True, "return_model_input": True}
    model_input = pred.nbytes if wide != narrow else 0
    return {
        "q_sample": (lambda: ops.q_sample(x, t, rows[:, :2], keys=keys), x.nbytes, x.nbytes),
        "weighted_loss": (lambda: ops.weighted_loss(leaf, t, rows[:, :3], keys=keys), pred.nbytes, pred.nbytes),
        "reverse_step": (
            lambda: ops.reverse_step(x, pred, t, rows[:, :6], keys=keys, clip=(-1.0, 1.0)),
            x.nbytes + pred.nbytes,
            x.nbytes,
        ),
        "reverse_step, all there is": (
            lambda: ops.reverse_step(x, pred, t, rows, keys=keys, clip=(-1.0, 1.0), **full),
            2 * (x.nbytes + pred.nbytes),
            2 * x.nbytes + model_input,
        ),
        "vlb_terms": (
            lambda: ops.vlb_terms(x_0, x_t, pred, t, rows[:, :6], clip=(-1.0, 1.0)),
            x_0.nbytes + x_t.nbytes + pred.nbytes,
            0,
        ),
    }


def group_norm(dtype, layout, shape=(2, 128, 32, 32)):
    x, grad = images(*shape, dtype=dtype, layout=layout).requires_grad_(), images(*shape, dtype=dtype, layout=layout)
    weight, bias = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)

    def forward():
        return ops.group_norm_silu(x, weight, bias, 32)

    def backward():
        return torch.autograd.grad(forward(), (x, weight, bias), grad)

    return forward, backward, x


# What a kernel uses of the machine


@functools.cache
def elementwise_kernels(cc):
    """(op, layout, types) -> what was launched."""
    kernels = {}
    for types, (wide, narrow) in TYPES.items():
        for layout, memory_format in LAYOUTS.items():
            for name, (call, *_) in elementwise(wide, narrow, n=1, size=16, layout=memory_format).items():
                with simulated(cc) as launched:
                    call()
                (kernels[name, layout, types],) = launched
    return kernels


def elements_of_a_thread(name, layout, types, warps):
    if layout == "planar" and name != "vlb_terms":
        return 3 * (8 if types == "bfloat16" else 4)
    return 1024 // (32 * warps)


@needs_ptxas
def test_no_kernel_uses_more_of_the_machine_than_its_budget(request):
    rows = {}
    for cc in ARCHITECTURES:
        for case, one in elementwise_kernels(cc).items():
            row = measure(one.report, elements_of_a_thread(*case, one.warps)) | {"shared": one.shared}
            rows.setdefault(", ".join(case), {})[f"sm_{cc}"] = row
        for dtype in (F32, BF16):
            for layout, memory_format in LAYOUTS.items():
                with simulated(cc) as launched:
                    group_norm(dtype, memory_format, (1, 64, 16, 32))[1]()
                for one in launched:
                    name = f"group_norm_silu{one.stats.kernel}, {layout}, {str(dtype).removeprefix('torch.')}"
                    rows.setdefault(name, {})[f"sm_{cc}"] = measure(one.report) | {"shared": one.shared}
    spilling = [(name, arch) for name, row in rows.items() for arch in row if row[arch]["spills"]]
    assert not spilling
    settle("triton", rows, update=request.config.getoption("update_budgets"))


@needs_ptxas
@everywhere
def test_a_reverse_step_with_its_noise_takes_60_instructions_an_element(cc):
    for (name, layout, types), one in elementwise_kernels(cc).items():
        if name == "reverse_step" and layout == "channels-last":
            instructions = one.report.instructions.total() - one.report.instructions["NOP"]
            assert instructions <= 60 * elements_of_a_thread(name, layout, types, one.warps), types


@everywhere
def test_no_data_go_from_thread_to_thread_but_for_sums(cc):
    for (name, *_), one in elementwise_kernels(cc).items():
        assert one.shared <= (16 if name in ("weighted_loss", "vlb_terms") else 0), name


@needs_ptxas
@everywhere
def test_the_widest_type_goes_by_128_bits_and_the_others_element_by_element_with_it(cc):
    for (name, _, types), one in elementwise_kernels(cc).items():
        wide, narrow = TYPES[types]
        if name == "weighted_loss":
            wide = narrow
        loads, stores = (set(one.report.accesses[opcode]) for opcode in ("LDG", "STG"))
        together = {16, 16 * narrow.itemsize // wide.itemsize}
        if name == "vlb_terms":
            assert loads >= {16, 4 * narrow.itemsize}
            assert stores == {4}  # one sum
        else:
            assert loads >= together - ({8} if name == "q_sample" else set())
            assert 16 in stores
            assert stores <= together | ({4} if name == "weighted_loss" else set())  # and the loss


@everywhere
def test_odd_sizes_and_odd_addresses_are_served(cc):
    x = torch.randn(2 * 3 * 7 * 9 + 1)[1:].view(2, 3, 7, 9)
    assert x.data_ptr() % 16
    t, rows = torch.tensor([1, 0]), torch.rand(2, 2)
    with simulated(cc):
        x_t = ops.q_sample(x, t, rows, noise=x)
    assert torch.equal(x_t, reference.q_sample(x, x, None, t, rows, F32))


# Bytes and launches


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_op_moves_the_least_bytes_in_one_launch(layout, types):
    tables = N * (8 + 16 + 32) + 8 * 32  # t, keys, rows; and tensors that begin or end within a sector
    for name, (call, loads, stores) in elementwise(*TYPES[types], layout=LAYOUTS[layout]).items():
        with simulated(90) as launched:
            call()
        ((stats, *_),) = launched
        assert loads <= stats.unique_loaded_bytes <= loads + tables, name
        assert stores <= stats.unique_stored_bytes <= stores + tables, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_moves_the_least_bytes_in_two_launches_and_three(layout):
    forward, backward, x = group_norm(BF16, LAYOUTS[layout], (2, 64, 32, 32))
    small = 2**14  # parameters, statistics, sums
    with torch.no_grad(), simulated(90) as launched:
        forward()
    assert [one.stats.kernel for one in launched] == ["_statistics", "_apply"]
    assert all(x.nbytes <= one.stats.unique_loaded_bytes <= x.nbytes + small for one in launched)
    assert x.nbytes <= launched[1].stats.unique_stored_bytes <= x.nbytes + small
    with simulated(90) as launched:
        backward()
    sums, spread, apply = (one.stats for one in launched[2:])
    assert all(2 * x.nbytes <= s.unique_loaded_bytes <= 2 * x.nbytes + small for s in (sums, apply))
    assert spread.unique_loaded_bytes <= small
    assert x.nbytes <= apply.unique_stored_bytes <= x.nbytes + small


def test_samples_of_several_parts_take_one_launch_more():
    pred, keys = images(1, 3, 64, 64, dtype=BF16).requires_grad_(), make_keys(1)
    with simulated(90) as launched:
        ops.weighted_loss(pred, torch.zeros(1, dtype=torch.int64), torch.rand(1, 3), keys=keys)
    assert [one.stats.kernel for one in launched] == ["_weighted_loss", "_add_parts"]
    with torch.no_grad(), simulated(90) as launched:
        group_norm(BF16, torch.channels_last, (1, 128, 40, 40))[0]()
    assert [one.stats.kernel for one in launched] == ["_statistics", "_merge", "_apply"]


def baseline(name, *inputs):
    return inductor.baseline(f"{Path(__file__).with_name('inductor_functions.py')}:{name}", inputs)


def test_torchinductor_needs_as_many_bytes_and_launches_or_more(capsys):
    x, keys, t, rows = images(N, 3, 32, 32, dtype=BF16), make_keys(N), torch.arange(N), torch.rand(N, 6)
    forward, backward, y = group_norm(BF16, torch.channels_last)
    y, grad, weight = y.detach(), images(*y.shape, dtype=BF16), torch.ones(128)
    mean = torch.zeros(2, 32)
    calls = {name: call for name, (call, *_) in elementwise(BF16, BF16).items()}
    cases = {
        "q_sample": (calls["q_sample"], (x, keys, t, rows[:, :2].contiguous())),
        "weighted_loss": (calls["weighted_loss"], (x, keys, t, rows[:, :3].contiguous())),
        "reverse_step": (calls["reverse_step"], (x, x, keys, t, rows)),
        "vlb_terms": (calls["vlb_terms"], (x.float(), x.float().clone(), x, t, rows)),
        "group_norm_silu": (forward, (y, weight, weight)),
        "group_norm_silu_backward": (backward, (grad, y, mean, mean, weight, weight)),
    }
    lines = [
        f"{'':26}{'launches':>20}{'bytes':>22}",
        f"{'':26}{'here':>10}{'inductor':>10}{'here':>11}{'inductor':>11}",
    ]
    for name, (call, inputs) in cases.items():
        with simulated(90) as launched:
            call()
        stats = [one.stats for one in launched]
        if name == "group_norm_silu_backward":
            stats = stats[-3:]
        bytes_ = sum(s.unique_loaded_bytes + s.unique_stored_bytes for s in stats)
        theirs = baseline(name, *inputs)
        lines.append(f"{name:26}{len(stats):10}{theirs.launches:10}{bytes_:11}{theirs.bytes:11}")
        assert len(stats) <= max(theirs.launches, 3), name
        assert bytes_ <= 1.02 * theirs.bytes, name
    with capsys.disabled():
        print("\n" + "\n".join(lines))


# What is hard to get right


@everywhere
def test_noise_is_right_near_u_of_one_and_where_the_counter_wraps(cc):
    """sqrt(-2 ln u) at u = 1 - 2^-24 is 3.5e-4: an error of an ulp in ln u would be of the same size."""
    keys = make_keys(16)
    keys[0, 1] = -2
    exact = reference.normal(keys, 40_000)
    assert exact.view(16, -1, 2).square().sum(-1).sqrt().min() < 4e-3
    with simulated(cc):
        torch.testing.assert_close(ops.normal(keys, 40_000), exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@everywhere
def test_group_norm_of_a_mean_far_larger_than_the_spread(cc, layout):
    x = images(2, 12, 20, 20, layout=layout) + 1e5
    weight, bias = torch.randn(12), torch.randn(12)
    with simulated(cc):
        y, mean, rstd = torch.ops.ddpm_fast_triton.group_norm_silu(x, weight, bias, None, None, 4, 1e-5, True)
    exact, exact_mean, exact_rstd = reference.group_norm_silu(x.double(), weight, bias, None, None, 4, 1e-5, True)
    half_ulp = 2.0**-8  # of 1e5, to which the mean is rounded
    assert (mean - exact_mean).abs().max() <= half_ulp
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-6, atol=0)
    # SiLU's slope is at most 1.1
    bound = 1.1 * half_ulp * exact_rstd.max() * weight.abs().max() + 1e-5
    assert (y - exact).abs().max() <= bound


def test_elements_past_two_to_the_31_are_reached():
    extent = 2**30 + 1024
    x_start = torch.from_numpy(np.zeros(2 * extent + 1024, np.uint8))  # whose pages come when they are touched
    out = torch.from_numpy(np.zeros(2 * extent + 1024, np.uint16)).view(BF16)
    x_start[2 * extent :] = torch.arange(1024) % 256
    t, rows, keys = torch.zeros(3, dtype=torch.int64), torch.tensor([[1.0, 0.0]]), make_keys(3)
    kernel = importlib.import_module("ddpm_fast.ops.triton.q_sample")._q_sample
    constants = {"LAYOUT": "linear", "LANES": 1, "BLOCK": 1024, "VECTOR": 8, "num_warps": 2, "enable_fp_fusion": False}
    with simulated(90):
        kernel[(3, 1, 1)](x_start, None, keys, t, rows, out, 1, extent, 1, **constants)
    expected = ((torch.arange(1024) % 256).float() * (2 / 255) - 1).bfloat16()
    assert torch.equal(out[2 * extent :], expected)


@everywhere
def test_a_timestep_outside_the_table_reads_nothing_and_gives_nan(cc):
    x, keys, rows = images(3, 3, 8, 8), make_keys(3), torch.rand(5, 6)
    t, op = torch.tensor([4, 5, -1]), torch.ops.ddpm_fast_triton
    x_next = torch.zeros_like(x)
    with simulated(cc):
        op.reverse_step(x, x, None, make_keys(5, 3), None, None, None, t, rows, -1.0, 1.0, x_next, None, None)
        results = (
            x_next,
            op.q_sample(x, None, keys, t, rows[:, :2].contiguous(), F32),
            op.weighted_loss(x, None, None, keys, t, rows[:, :3].contiguous(), None, 0, 1.0, False)[0],
            op.weighted_loss(x, x, None, None, t, rows[:, :3].contiguous(), None, 1, 1.0, True)[1],
            op.vlb_terms(x, x, x, None, t, rows, -1.0, 1.0),
        )
    for result in results:
        assert result[0].isfinite().all()
        assert result[1:].isnan().all()


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, ddpm_fast; assert 'triton' not in sys.modules, sorted(m for m in sys.modules if 'triton' in m)[:9]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_sample_has_the_same_bits_in_any_batch_and_in_every_run(layout):
    """Also where its sums are made of several parts."""
    x, pred, grad = (images(3, 12, 56, 56, layout=layout) for _ in range(3))
    keys, t, rows, op = make_keys(3), torch.tensor([2, 0, 1]), torch.rand(3, 6), torch.ops.ddpm_fast_triton
    weight = torch.randn(12)

    def results(rows_of):
        x_, pred_, grad_, keys_, t_ = (y[rows_of] for y in (x, pred, grad, keys, t))
        y, mean, rstd = op.group_norm_silu(x_, weight, weight, None, None, 1, 1e-5, True)
        gradient = op.group_norm_silu_backward(grad_, x_, mean, rstd, weight, weight, None, None, 1, True)[0]
        loss = op.weighted_loss(pred_, x_, None, keys_, t_, rows[:, :3].contiguous(), None, 2, 1.0, True)
        return *loss, op.vlb_terms(x_, x_, pred_, None, t_, rows, -1.0, 1.0), y, mean, rstd, gradient

    with simulated(90) as launched:
        together, again, alone = results(slice(None)), results(slice(None)), results(slice(1, 2))
    assert {"_add_parts", "_merge"} <= {one.stats.kernel for one in launched}
    for first, second, third in zip(together, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[1:2], third)


# Faults that these tests must find


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Gives the kernels with a fault in one file."""
    here = Path(ops.__file__).parent

    def planted(file, right, wrong):
        # The modules stay loaded: Triton unloads a kernel by the driver, and none is active after the test.
        package = tmp_path / f"planted_{hash(tmp_path) & 0xFFFFFFFF:x}"
        shutil.copytree(here / "triton", package / "triton", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("layout.py", "reference.py"):
            shutil.copy(here / name, package)
        path = package / "triton" / file
        text = path.read_text()
        assert right in text
        path.write_text(text.replace(right, wrong))
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(f"{package.name}.triton")

    return planted


def test_a_store_without_its_mask_is_found(plant):
    x = torch.randn(2, 500)
    kernels = plant(
        "tiles.py",
        "tl.store(x + at + element, value.to(x.dtype.element_ty), mask=mask)",
        "tl.store(x + at + element, value.to(x.dtype.element_ty))",
    )
    with simulated(90), pytest.raises(ptxsim.OutOfBounds):
        kernels.q_sample(x, x, None, torch.zeros(2, dtype=torch.int64), torch.rand(1, 2), F32)


def test_a_row_read_outside_its_table_is_found(plant):
    x = torch.randn(2, 512)
    kernels = plant("tiles.py", "(index >= 0) & (index < count)", "index == index")
    with simulated(90), pytest.raises(ptxsim.OutOfBounds):
        kernels.q_sample(x, x, None, torch.full((2,), 10**6), torch.rand(1, 2), F32)


def test_noise_that_goes_through_shared_memory_is_found(plant):
    x = images(1, 3, 16, 16)
    kernels = plant("tiles.py", "tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)", "tl.arange(0, BLOCK)")
    arguments = (None, make_keys(1), torch.zeros(1, dtype=torch.int64), torch.rand(1, 2), BF16)
    with simulated(90) as launched:
        kernels.q_sample(x, *arguments)
    assert launched[0].shared > 0


def test_a_logarithm_without_relative_precision_is_found(plant):
    keys = make_keys(16)
    kernels = plant("noise.py", "natural_log(uniform(word0))", "(tl.log2(1 + uniform(word0)) - 1) * 1.3862943611198906")
    with simulated(90):
        z = kernels.normal(keys, 40_000)
    assert (z - reference.normal(keys, 40_000)).abs().max() > 4e-6


def test_statistics_without_a_shift_are_found(plant):
    x = images(2, 12, 20, 20) + 1e5
    kernels = plant("group_norm_silu.py", "values - spread", "values")
    with simulated(90):
        _, _, rstd = kernels.group_norm_silu(x, torch.ones(12), torch.zeros(12), None, None, 4, 1e-5, True)
    exact = reference.group_norm_silu(x.double(), torch.ones(12), torch.zeros(12), None, None, 4, 1e-5, True)[2]
    assert not torch.allclose(rstd.double(), exact, rtol=1e-6, atol=0)


def test_offsets_in_32_bits_are_found(plant):
    kernels = plant("tiles.py", "sample.to(tl.int64)", "sample")
    kernel = sys.modules[kernels.q_sample.__module__]._q_sample
    extent = 2**30 + 1024
    x_start = torch.from_numpy(np.zeros(2 * extent + 1024, np.uint8))
    constants = {"LAYOUT": "linear", "LANES": 1, "BLOCK": 1024, "VECTOR": 8, "num_warps": 2, "enable_fp_fusion": False}
    with simulated(90), pytest.raises(ptxsim.OutOfBounds):
        kernel[(3, 1, 1)](
            x_start,
            x_start,
            None,
            torch.zeros(3, dtype=torch.int64),
            torch.rand(1, 2),
            x_start,
            1,
            extent,
            1,
            **constants,
        )
