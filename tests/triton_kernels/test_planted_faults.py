"""Faults planted in copies of Triton's kernels, which the simulator or a comparison must find."""

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import ptxsim
from compiled import simulated
from kernel_calls import BF16, F32, images, make_keys

from ddpm_fast import ops
from ddpm_fast.ops import reference


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Gives the kernels with a fault in one file."""
    here = Path(ops.__file__).parent

    def planted(file, right, wrong):
        # The modules stay loaded: Triton unloads a kernel by the driver, and none is active after the test.
        package = tmp_path / f"planted_{hash(tmp_path) & 0xFFFFFFFF:x}"
        shutil.copytree(here / "triton", package / "triton", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("layout.py", "reference.py", "transforms.py"):
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


@pytest.mark.parametrize(
    ("file", "right", "wrong", "size"),
    [
        ("group_norm_planes.py", "values - spread", "values", 80),
        ("group_norm_slab.py", "squares - correction * total", "squares", 20),
        ("group_norm_slab.py", "center += correction", "center += 0", 20),
    ],
)
def test_statistics_that_do_not_bear_a_large_mean_are_found(plant, file, right, wrong, size):
    x = images(2, 12, size, size) + 1e5
    kernels = plant(file, right, wrong)
    given = (torch.ones(12), torch.zeros(12), None, None, 4, 1e-5, True)
    with simulated(90):
        _, *found = kernels.group_norm_silu(x, *given)
    _, *exact = reference.group_norm_silu(x.double(), *given)
    right_mean = (found[0] - exact[0]).abs().max() <= 2.0**-8
    assert not (right_mean and torch.allclose(found[1].double(), exact[1], rtol=1e-6, atol=0))


def test_a_residual_read_past_its_channels_is_found(plant):
    """Where the slab has channels of skip too."""
    x, residual, skip = (images(1, 8, 4, 4) for _ in range(3))
    kernels = plant("group_norm_parts.py", "mask & (channel < channels)", "mask")
    given = (torch.ones(16), torch.zeros(16), None, None, 1, 1e-5, True, True)
    expected = reference.add_inputs(x, None, residual, skip)
    with simulated(90):
        try:
            h = kernels.add_group_norm_silu(x, None, residual, skip, *given)[1]
        except ptxsim.OutOfBounds:
            return
    assert not torch.equal(h, expected)


def test_a_sum_in_another_order_is_found(plant):
    x, residual, input_bias = images(1, 8, 8, 8), images(1, 8, 8, 8), torch.randn(8)
    kernels = plant(
        "group_norm_parts.py",
        "            total += more.to(tl.float32)",
        "            total = h.to(tl.float32) + (of_bias + more)",
    )
    given = (torch.ones(8), torch.zeros(8), None, None, 1, 1e-5, True, True)
    with simulated(90):
        h = kernels.add_group_norm_silu(x, input_bias, residual, None, *given)[1]
    assert not torch.equal(h, reference.add_inputs(x, input_bias, residual, None))


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
