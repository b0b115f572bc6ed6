"""The compiled q_sample against the reference; where it was not compiled, the same holds for the fallback."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.ops import native, reference

T = 1000
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5,), (257, 2), (3, 3, 7, 5), (4, 1, 28, 28), (4, 3, 96, 96), (0, 3, 4, 4), (2, 0, 4)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "reversed axes": lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
    "broadcast": lambda x: x[:, :1].expand_as(x),
}


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return request.param


def make_rows(dtype=torch.float32, device="cpu"):
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
    return torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()], dim=1).to(device, dtype)


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    t = torch.randint(T, shape[:1], generator=generator).to(device)
    return x_start, noise, t, make_rows(torch.float64 if dtype == torch.float64 else torch.float32, device)


def assert_same_bits(actual, expected):
    # The kernels round where the reference does and nowhere else, so nothing less will do.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_the_tests_are_run_on_a_built_package():
    package = Path(ddpm_fast.__file__).parent
    assert (package / "_build.json").exists(), f"{package} was never built: pip install, then pytest (no python -m)"


@pytest.mark.skipif("CI" not in os.environ, reason="a machine without compilers is fine, but not for CI")
def test_ci_tests_the_compiled_modules():
    expected = ["cpu", "cuda"] if torch.version.cuda and shutil.which("nvcc") else ["cpu"]
    assert [native.modules[name].reason for name in expected] == [""] * len(expected)


def test_a_module_is_there_or_says_why_not():
    assert all(module.available or module.reason for module in native.modules.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_x_t_has_the_bits_of_the_reference(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    assert_same_bits(ops.q_sample(*inputs), reference.q_sample(*inputs))


@pytest.mark.parametrize("noise_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_any_strides_give_the_same_image_in_the_strides_of_x_start(x_layout, noise_layout, device):
    x_start, noise, t, rows = make_inputs((4, 6, 8, 8), torch.bfloat16, device)
    x_start, noise = LAYOUTS[x_layout](x_start), LAYOUTS[noise_layout](noise)
    x_t = ops.q_sample(x_start, noise, t, rows)
    assert_same_bits(x_t, reference.q_sample(x_start, noise, t, rows))
    assert x_t.stride() == torch.empty_like(x_start).stride()


def test_t_and_rows_may_be_strided_too(device):
    x_start, noise, t, rows = make_inputs((4, 3, 8, 8), device=device)
    strided = ops.q_sample(x_start, noise, torch.stack([t, t], dim=1)[:, 0], rows.t().contiguous().t())
    assert_same_bits(strided, ops.q_sample(x_start, noise, t, rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nans_and_subnormals_are_kept(dtype, device):
    info = torch.finfo(dtype)
    finite = [0.0, info.eps, info.tiny, info.tiny / 4, info.max]
    values = [*finite, *(-value for value in finite), torch.inf, -torch.inf, torch.nan]
    x_start = torch.tensor(values, dtype=dtype).repeat(len(values))
    noise = torch.tensor(values, dtype=dtype).repeat_interleave(len(values))
    t = torch.randint(T, (4,))
    inputs = x_start.expand(4, -1), noise.expand(4, -1), t, make_rows()
    inputs = [tensor.to(device) for tensor in inputs]
    x_t, expected = ops.q_sample(*inputs), reference.q_sample(*inputs)
    assert_same_bits(x_t, expected)
    assert_same_bits(x_t.signbit()[~x_t.isnan()], expected.signbit()[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_cast_to_the_type_of_the_arithmetic(dtype, device):
    x_start, noise, t, _ = make_inputs((4, 3, 8, 8), dtype, device)
    for rows in (make_rows(torch.float32, device), make_rows(torch.float64, device)):
        assert_same_bits(ops.q_sample(x_start, noise, t, rows), reference.q_sample(x_start, noise, t, rows))


def test_x_t_does_not_depend_on_the_number_of_threads():
    inputs = make_inputs((3, 3, 123, 131), torch.bfloat16)
    expected, threads = ops.q_sample(*inputs), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same_bits(ops.q_sample(*inputs), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [-1, T, 2**40])
def test_a_timestep_outside_the_schedule_is_an_error_that_names_it(wrong):
    x_start, noise, t, rows = make_inputs((4, 3, 8, 8))
    t[2] = wrong
    fallback = importlib.import_module("ddpm_fast.ops.q_sample")._reference
    for q_sample in (ops.q_sample, fallback):
        with pytest.raises(RuntimeError, match=rf"q_sample: t\[2\] is {wrong}, but rows has T = {T} timesteps"):
            q_sample(x_start, noise, t, rows)


@pytest.mark.parametrize(
    "change",
    [
        {"x_start": torch.zeros(4, 1, dtype=torch.int32), "noise": torch.zeros(4, 1, dtype=torch.int32)},
        {"x_start": torch.zeros(()), "noise": torch.zeros(())},
        {"noise": torch.zeros(4, 3, 8, 9)},
        {"noise": torch.zeros(4, 3, 8, 8, dtype=torch.float16)},
        {"t": torch.zeros(3, dtype=torch.int64)},
        {"t": torch.zeros(4)},
        {"rows": torch.zeros(T, 3)},
        {"rows": torch.zeros(T, 2, dtype=torch.float16)},
    ],
    ids=lambda change: ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in change.items()),
)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_inputs_that_do_not_fit_are_an_error_that_names_them(where, change):
    inputs = dict(zip(("x_start", "noise", "t", "rows"), make_inputs((4, 3, 8, 8)), strict=True)) | change
    with pytest.raises(RuntimeError, match=r"q_sample needs x_start .*; got x_start .*, rows "):
        ops.q_sample(**{name: tensor.to(where) for name, tensor in inputs.items()})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself looks at it
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "with gaps"])
def test_the_op_passes_opcheck(layout, dtype, device):
    x_start, noise, t, rows = make_inputs((4, 3, 8, 8), dtype, device)
    x_start = LAYOUTS[layout](x_start)
    torch.library.opcheck(torch.ops.ddpm_fast.q_sample, (x_start, noise, t, rows))
    torch.library.opcheck(torch.ops.ddpm_fast.q_sample, (x_start.requires_grad_(), noise.requires_grad_(), t, rows))


def test_the_op_compiles_into_a_full_graph(device):
    x_start, noise, t, rows = make_inputs((4, 3, 8, 8), torch.bfloat16, device)
    x_start = LAYOUTS["channels last"](x_start)
    x_t = torch.compile(ops.q_sample, fullgraph=True)(x_start, noise, t, rows)
    assert_same_bits(x_t, ops.q_sample(x_start, noise, t, rows))
    assert x_t.stride() == x_start.stride()


def test_gradients_to_any_order_are_those_of_the_formula():
    x_start, noise, t, rows = make_inputs((3, 2, 3), torch.float64)
    inputs = x_start.requires_grad_(), noise.requires_grad_(), t, rows
    assert torch.autograd.gradcheck(ops.q_sample, inputs)
    assert torch.autograd.gradgradcheck(ops.q_sample, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_a_t_and_s_t_times_it_in_its_own_dtype(dtype, device):
    x_start, noise, t, rows = make_inputs((4, 3, 8, 8), dtype, device)
    x_start.requires_grad_(), noise.requires_grad_()
    grad = torch.randn_like(x_start)
    grads = torch.autograd.grad(ops.q_sample(x_start, noise, t, rows), (x_start, noise), grad)
    expected = torch.autograd.grad(reference.q_sample(x_start, noise, t, rows), (x_start, noise), grad)
    assert_same_bits(grads, expected)


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_the_modules_use_nothing_of_pytorch_but_its_stable_abi():
    for library in Path(ddpm_fast.__file__).parent.glob("*.abi3.so"):
        symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
        assert "torch_library_impl" in symbols
        # PyTorch's C++ (at::, c10::, torch::) changes with every release; Python's C is not needed at all.
        assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w+|\b_?Py\w+", symbols)
