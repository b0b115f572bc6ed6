"""The compiled modules."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ddpm_fast
from ddpm_fast.ops import native


def test_the_tests_are_run_on_a_built_package():
    package = Path(ddpm_fast.__file__).parent
    assert (package / "_build.json").exists(), f"{package} was never built: pip install, then pytest (no python -m)"


@pytest.mark.skipif("CI" not in os.environ, reason="a machine without compilers is fine, but not for CI")
def test_ci_tests_the_compiled_modules():
    expected = ["cpu", "cuda"] if torch.version.cuda and shutil.which("nvcc") else ["cpu"]
    assert [native.modules[name].reason for name in expected] == [""] * len(expected)


def test_a_module_is_there_or_says_why_not():
    assert all(module.available or module.reason for module in native.modules.values())


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_the_modules_use_nothing_of_pytorch_but_its_stable_abi():
    for library in Path(ddpm_fast.__file__).parent.glob("*.abi3.so"):
        symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
        assert "torch_library_impl" in symbols
        # PyTorch's C++ (at::, c10::, torch::) changes with every release; Python's C is not needed at all.
        assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w+|\b_?Py\w+", symbols)
