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
