"""The compiled modules: what the build makes of a compiler that fails, and which module is loaded."""

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ddpm_fast
from ddpm_fast import info
from ddpm_fast.ops import native

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ddpm_fast.__file__).parent


def test_the_tests_are_run_on_a_built_package():
    assert (PACKAGE / "_build.json").exists(), f"{PACKAGE} was never built: pip install, then pytest (no python -m)"


@pytest.mark.skipif("CI" not in os.environ, reason="a machine without compilers is fine, but not for CI")
def test_ci_tests_the_compiled_modules():
    with_cuda = torch.version.cuda and shutil.which("nvcc")
    record = json.loads((PACKAGE / "_build.json").read_text())
    assert set(record) == ({"cuda_architectures"} if with_cuda else {"cuda"})
    for name in ["cpu", "cuda"] if with_cuda else ["cpu"]:
        module = native.modules[name]
        assert (module.available, module.reason, module.better) == (True, "", "")


def test_a_module_is_there_or_says_why_not():
    assert all(module.available or module.reason for module in native.modules.values())


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_the_modules_use_nothing_of_pytorch_but_its_stable_abi():
    for library in PACKAGE.glob("*.abi3.so"):
        symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
        assert "torch_library_impl" in symbols
        # PyTorch's C++ (at::, c10::, torch::) changes with every release; Python's C is not needed at all.
        assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w+|\b_?Py\w+", symbols)


# Which module is loaded


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package with some modules, for a processor with AVX-512, and loads its CPU module."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def load(library):
        if library.read_text():
            raise OSError from ValueError(library.read_text())

    monkeypatch.setattr(torch.ops, "load_library", load)

    def make(libraries, missing=None):
        for name, fault in libraries.items():
            (tmp_path / f"_{name}.abi3.so").write_text(fault)
        (tmp_path / "_build.json").write_text(json.dumps(missing or {}))
        return native._load("cpu", tmp_path)

    return make


def test_the_module_of_the_processors_own_instruction_set_is_loaded(package):
    assert package({"cpu": "", "cpu_avx2": "", "cpu_avx512": ""}) == (True, "", "_cpu_avx512.abi3.so", "")


def test_a_module_that_was_not_built_is_replaced_by_the_next_lower_one(package):
    module = package({"cpu": "", "cpu_avx2": ""}, {"cpu_avx512": "unrecognized option '-mavx512f'"})
    reason = "the module was not built: unrecognized option '-mavx512f'"
    assert module == (True, "", "_cpu_avx2.abi3.so", reason)


def test_a_module_that_does_not_load_is_replaced_by_the_next_lower_one(package):
    module = package({"cpu": "", "cpu_avx2": "undefined symbol", "cpu_avx512": "undefined symbol"})
    assert module == (True, "", "_cpu.abi3.so", "the module does not load: undefined symbol")


def test_without_any_module_the_reason_is_given_once(package):
    missing = dict.fromkeys(("cpu", "cpu_avx2", "cpu_avx512"), "no C++ compiler was found (c++)")
    assert package({}, missing) == (False, "the module was not built: no C++ compiler was found (c++)", "", "")


def test_a_lower_capability_never_loads_the_module_of_a_higher_one(package, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    module = package({"cpu_avx2": "", "cpu_avx512": ""})
    assert module == (False, "the module was not built: it was removed", "", "")


def test_info_says_why_a_faster_module_is_not_used(monkeypatch):
    slower = native.Module(True, "", "_cpu_avx2.abi3.so", "the module was not built: unrecognized option '-mavx512f'")
    monkeypatch.setitem(native.modules, "cpu", slower)
    _, description = info.backends()["cpu"]
    assert description.endswith(
        "_cpu_avx2.abi3.so (no faster one: the module was not built: unrecognized option '-mavx512f')"
    )


# Which GPUs the CUDA module has kernels for


@pytest.fixture
def unserved(tmp_path, monkeypatch):
    """A function that gives the compute capabilities without kernels, for a module compiled for some architectures."""

    def find(architectures, *capabilities):
        gpus = [tuple(map(int, capability.split("."))) for capability in capabilities]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        record = {} if architectures is None else {"cuda_architectures": architectures}
        (tmp_path / "_build.json").write_text(json.dumps(record))
        found = native.unserved_gpus(tmp_path)
        assert all(f"GPU {index} has {capabilities[index]}" in reason for index, reason in found.items())
        return {capabilities[index] for index in found}

    return find


def test_code_serves_its_major_version_and_ptx_all_that_is_newer(unserved):
    everything = ("6.1", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "13.0")
    assert unserved("7.5;8.0;9.0;10.0+PTX;12.0+PTX", *everything) == {"6.1", "7.0"}
    assert unserved("7.5 8.0;9.0 10.0;12.0+PTX", *everything) == {"6.1", "7.0", "11.0"}
    assert unserved("9.0", *everything) == {*everything} - {"9.0"}
    assert unserved("8.6", *everything) == {*everything} - {"8.6", "8.9"}
    assert unserved("8.6+PTX", *everything) == {"6.1", "7.0", "7.5", "8.0"}


@pytest.mark.parametrize("architectures", [None, "", "native", "Ampere;9.0"])
def test_architectures_without_numbers_leave_no_gpu_out(unserved, architectures):
    assert unserved(architectures, "5.0", "9.0") == set()


@pytest.mark.skipif(not native.modules["cuda"].available, reason="no CUDA module")
def test_the_gpus_without_kernels_are_found_when_pytorch_initialises_cuda(tmp_path):
    code = """
import torch
from ddpm_fast.ops import dispatch, native
torch.cuda.device_count = lambda: 0  # for what else PyTorch does then
torch._C._cuda_init = lambda: None
native.unserved_gpus = lambda: {1: "too old"}
assert not dispatch._unserved
torch.cuda.init()
assert dispatch._unserved == {1: "too old"}
"""
    # Elsewhere than beside the sources, which Python would import first, without their modules.
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


# What the build makes of compilers that fail

# Stands for a compiler that works: it writes empty files, which is enough to be packed.
COMPILES = """
case "$*" in *-dumpversion*) echo 13.0.0; exit;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
# nvcc that says what it is, and compiles nothing.
NVCC = f"""
case "$*" in
  *--version*) echo "Cuda compilation tools, release {torch.version.cuda}, V0";;
  *--list-gpu-code*) echo sm_90;;
  *) echo "kernel.cu(7): error: expected a declaration" >&2; exit 1;;
esac
"""
# What nvcc that fails gives as a reason; PyTorch without CUDA is one already.
NO_CUDA = (
    "compiling or linking failed: kernel.cu(7): error: expected a declaration"
    if torch.version.cuda
    else f"torch has no CUDA ({torch.__version__})"
)


@pytest.fixture
def build(tmp_path):
    """A function that builds a wheel with the given compilers, and returns the process and what it wrote.

    The compilers are shell scripts, each run with the arguments of a compiler.
    """
    folder = tmp_path / "research"  # "arch" is what PyTorch looks for in nvcc's options
    folder.mkdir()
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks of a build
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests do not lie beside the sources")
    for name in ("csrc", "ddpm_fast"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)

    def script(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def run(cxx, nvcc, **variables):
        environment = os.environ | {"CXX": script(tmp_path / "bin/g++", cxx), "MAX_JOBS": "2"}
        environment |= {"CC": environment["CXX"], "CUDA_HOME": str(tmp_path / "cuda")}
        environment |= {"DDPM_FAST_BUILD_CUDA": ""} | variables
        script(tmp_path / "cuda/bin/nvcc", nvcc)
        command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return process, sorted((folder / "dist").glob("*.whl"))

    return run


def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name).name for name in archive.namelist() if name.endswith(".so")]
        return sorted(names), json.loads(archive.read("ddpm_fast/_build.json"))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set")
def test_what_cannot_be_compiled_or_linked_is_left_out_with_the_compilers_own_words(build):
    fails = """
case " $* " in
  *" -mavx512f "*) echo "unrecognized option '-mavx512f'" >&2; exit 1;;
  *" -shared "*_cpu_avx2*) echo "ld: cannot find -lc10" >&2; exit 1;;
esac
"""
    process, (wheel,) = build(fails + COMPILES, NVCC)
    assert process.returncode == 0, process.stderr
    assert "cp310-abi3-" in wheel.name
    libraries, missing = content(wheel)
    assert libraries == ["_cpu.abi3.so"]
    assert missing == {
        "cpu_avx512": "compiling or linking failed: unrecognized option '-mavx512f'",
        "cpu_avx2": "compiling or linking failed: ld: cannot find -lc10",
        "cuda": NO_CUDA,
    }


@pytest.mark.skipif(not torch.version.cuda, reason="torch has no CUDA")
@pytest.mark.parametrize("asked_for", [None, "7.5;8.6+PTX"])
def test_nvcc_compiles_for_each_architecture_that_the_wheel_names(build, tmp_path, monkeypatch, asked_for):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    known = "sm_75 sm_80 sm_86 sm_90 sm_100"  # those of an older CUDA
    nvcc = f"""
case "$*" in
  *--version*) echo "Cuda compilation tools, release {torch.version.cuda}, V0";;
  *--list-gpu-code*) printf '%s\\n' {known};;
  *) echo "$@" >> {tmp_path}/commands
     while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done;;
esac
"""
    process, (wheel,) = build(COMPILES, nvcc, **({"TORCH_CUDA_ARCH_LIST": asked_for} if asked_for else {}))
    assert process.returncode == 0, process.stderr
    libraries, record = content(wheel)
    assert "_cuda.abi3.so" in libraries
    assert record == {"cuda_architectures": asked_for or "7.5;8.0;9.0;10.0+PTX"}
    code = {"75", "86", "ptx 86"} if asked_for else {"75", "80", "90", "100", "ptx 100"}
    for command in (tmp_path / "commands").read_text().splitlines():
        found = re.findall(r"-gencode=arch=compute_(\d+),code=(sm|compute)_(\d+)", command)
        assert all(virtual == real for virtual, _, real in found)
        assert {("ptx " if kind == "compute" else "") + real for _, kind, real in found} == code


def test_a_wheel_without_any_module_is_tagged_as_plain_python(build):
    killed = 'case " $* " in *" -c "*) kill -9 $$;; esac'  # as when memory runs out
    process, (wheel,) = build(killed, "echo 'error: no libdevice' >&2; exit 1")
    assert process.returncode == 0, process.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    libraries, missing = content(wheel)
    assert libraries == []
    assert "Killed" in missing["cpu"]
    assert "error: no libdevice" in missing["cuda"] or not torch.version.cuda


def test_a_build_that_insists_on_cuda_fails_with_the_reason(build):
    process, wheels = build(COMPILES, NVCC, DDPM_FAST_BUILD_CUDA="1")
    assert process.returncode != 0
    assert not wheels
    assert f"DDPM_FAST_BUILD_CUDA is 1, but {NO_CUDA}" in process.stderr
