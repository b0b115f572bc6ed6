"""Compiles csrc/ into ddpm_fast/_cpu*.abi3.so and, given a CUDA toolkit, ddpm_fast/_cuda.abi3.so.

The sources of the CPU's kernels become a module for each instruction set; ddpm_fast.ops.native loads the one that fits.

What cannot be compiled here is left out, and the package runs in plain PyTorch instead.
DDPM_FAST_BUILD_CUDA=0 leaves CUDA out, =1 insists on it. TORCH_CUDA_ARCH_LIST names its architectures.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.absolute()
TARGET = ("TORCH_TARGET_VERSION", "0x020d000000000000")  # the ABI of torch 2.13, which later ones keep
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")
# Products and sums are not fused unless the code says so: all backends then round alike, to the last bit.
# Nobody reads errno or the flags that floating-point exceptions leave; while they count, loops are not vectorised.
CXX_FLAGS = [
    *("-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="),
]
# What PyTorch asks of a processor before it calls it AVX2 or AVX512. Never -march=native: a wheel runs everywhere.
INSTRUCTION_SETS = {"": []}
if platform.machine() in ("x86_64", "AMD64"):
    fma = ["-mfma", "-mf16c"]
    INSTRUCTION_SETS["_avx2"] = ["-mavx2", *fma]
    INSTRUCTION_SETS["_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *fma]
NVCC_FLAGS = ["-O3", "--fmad=false", *(f"-Xcompiler={flag}" for flag in CXX_FLAGS)]


class MissingError(Exception):
    """What this machine lacks to build a module."""


def run(*command: str) -> str:
    result = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.stdout


def find_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        raise MissingError(f"no C++ compiler was found ({compiler})")


def find_cuda() -> None:
    """Sets CUDA_HOME and TORCH_CUDA_ARCH_LIST, unless the user did, for torch.utils.cpp_extension."""
    if torch.version.cuda is None:
        raise MissingError(f"torch has no CUDA ({torch.__version__})")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [os.environ["PATH"], "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise MissingError(f"no nvcc was found in {places[0] if home else 'PATH'}")
    version = re.search(r"release ([\d.]+)", run(nvcc, "--version"))[1]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise MissingError(f"nvcc is of CUDA {version}, but torch of CUDA {torch.version.cuda}")

    if not home:
        # The nvcc on PATH may be a link or a script: only the compiler itself knows where its toolkit lies.
        top = re.search(r"TOP=(.*)", run(nvcc, "--dryrun", "-x", "cu", os.devnull))[1]
        os.environ["CUDA_HOME"] = os.path.realpath(top)
    known = run(nvcc, "--list-gpu-code").split()
    targets = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch.replace('.', '')}" in known]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(targets) + "+PTX")


def cpu_modules() -> list[Extension]:
    find_compiler()
    from torch.utils.cpp_extension import CppExtension

    return [
        CppExtension(
            f"ddpm_fast._cpu{name}",
            sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            include_dirs=[f"{ROOT}/csrc"],
            define_macros=[TARGET],
            extra_compile_args={"cxx": CXX_FLAGS + flags},
            py_limited_api=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


def cuda_modules() -> list[Extension]:
    wish = os.environ.get("DDPM_FAST_BUILD_CUDA")
    if wish == "0":
        raise MissingError("DDPM_FAST_BUILD_CUDA was 0")
    sources = sorted(str(path) for path in Path("csrc/cuda").glob("*") if path.suffix in (".cpp", ".cu"))
    if not sources:
        raise MissingError("these sources have no csrc/cuda")
    try:
        find_compiler()
        find_cuda()
    except MissingError as reason:
        if wish == "1":
            sys.exit(f"DDPM_FAST_BUILD_CUDA is 1, but {reason}")
        raise
    from torch.utils.cpp_extension import CUDAExtension

    return [
        CUDAExtension(
            "ddpm_fast._cuda",
            sources,
            include_dirs=[f"{ROOT}/csrc"],
            define_macros=[TARGET, ("USE_CUDA", None)],  # without it, PyTorch's headers hide their CUDA part
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    ]


modules, missing = [], {}
# CUDA first: cpp_extension looks for CUDA_HOME once, when it is imported.
for name, make in {"cuda": cuda_modules, "cpu": cpu_modules}.items():
    try:
        modules += make()
    except MissingError as reason:
        missing[name] = str(reason)
        print(f"ddpm_fast: no {name} kernels: {reason}", file=sys.stderr)


class BuildPy(build_py):
    """Leaves beside the modules why one of them is missing, for ddpm_fast.ops.native to tell."""

    def run(self) -> None:
        package = Path("ddpm_fast")
        if not self.editable_mode:
            package = Path(self.build_lib, "ddpm_fast")
            shutil.rmtree(self.build_lib, ignore_errors=True)  # or what an earlier build left is packed too
        super().run()
        (package / "_build.json").write_text(json.dumps(missing))


commands = {"build_py": BuildPy}
if modules:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Keeps the objects of each module apart: they are made from the same sources."""

        def build_extension(self, extension: Extension) -> None:
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            super().build_extension(extension)
            self.build_temp = shared

    commands["build_ext"] = BuildExt

setup(ext_modules=modules, cmdclass=commands, options={"bdist_wheel": {"py_limited_api": "cp311"}})
