"""Compiles csrc/ into ddpm_fast/_cpu*.abi3.so and, given a CUDA toolkit, ddpm_fast/_cuda.abi3.so.

The sources of the CPU's kernels are compiled once for each instruction set; ddpm_fast.ops.native loads the module that
fits the processor.

A module that cannot be compiled here, for whatever reason, is left out, and the package runs without it: with the
module for the next lower instruction set, or in plain PyTorch. ddpm_fast/_build.json says why it was left out, and for
which GPUs the CUDA module was compiled.
DDPM_FAST_BUILD_CUDA=0 leaves CUDA out, =1 makes its absence an error. TORCH_CUDA_ARCH_LIST names its architectures.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.absolute()
TARGET = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # the ABI of torch 2.11, which later ones keep
# Turing, Ampere with Ada, Hopper, and Blackwell's two. Code runs on GPUs of the same major version, PTX on all that are
# as new: that of 10.0 is for 11.0, which would have nothing otherwise.
CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0+PTX", "12.0+PTX")
# Without contraction of a * b + c into one operation, all backends round alike, to the last bit.
# Nothing here reads errno or the floating-point exception flags, and preserving them blocks vectorisation.
CXX_FLAGS = [
    *("-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="),
]
# The features of a processor that PyTorch calls AVX2 or AVX512. Not -march=native, so that a wheel runs on every one.
INSTRUCTION_SETS = {"": []}
if platform.machine() in ("x86_64", "AMD64"):
    fma = ["-mfma", "-mf16c"]
    INSTRUCTION_SETS["_avx2"] = ["-mavx2", *fma]
    INSTRUCTION_SETS["_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *fma]
NVCC_FLAGS = ["-O3", "--fmad=false", *(f"-Xcompiler={flag}" for flag in CXX_FLAGS)]


class MissingError(Exception):
    """What this machine lacks to build a module."""


def run(*command: str) -> str:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        raise MissingError(f"{shlex.join(command)} failed: {reason_in(result.stdout) or result.returncode}")
    return result.stdout


def reason_in(output: str) -> str:
    """The line of a compiler's or linker's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("ninja:")]
    errors = [line for line in lines if re.search(r"error ?:|cannot find|undefined reference", line)]
    return (errors[:1] or lines[-1:] or [""])[0]


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
    release = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    if release is None:
        raise MissingError(f"{nvcc} does not say which release of CUDA it belongs to")
    if release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        raise MissingError(
            f"nvcc belongs to CUDA {release[1]}, but torch {torch.__version__} to CUDA {torch.version.cuda}; with a "
            "fitting torch installed, build with pip install --no-build-isolation"
        )

    if not home:
        # The nvcc on PATH may be a link or a script; --dryrun prints where its toolkit lies.
        top = re.search(r"TOP=(.*)", run(nvcc, "--dryrun", "-x", "cu", os.devnull))
        if top is None:
            raise MissingError(f"{nvcc} does not say where its toolkit lies; set CUDA_HOME")
        os.environ["CUDA_HOME"] = os.path.realpath(top[1])
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        known = run(nvcc, "--list-gpu-code").split()
        targets = [arch for arch in CUDA_ARCHITECTURES if "sm_" + re.sub(r"\.|\+PTX", "", arch) in known]
        if not targets:
            raise MissingError(f"nvcc of CUDA {release[1]} compiles for none of {', '.join(CUDA_ARCHITECTURES)}")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(targets).removesuffix("+PTX") + "+PTX"


def code_for(architectures: str) -> list[str]:
    """nvcc's options for architectures as TORCH_CUDA_ARCH_LIST has them; none for names, which are left to PyTorch.

    PyTorch adds options of its own unless one of ours has "arch" in it, as CXX_FLAGS have in a folder named research.
    """
    options = []
    for part in re.split(r"[; ]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", part)
        if found is None:
            return []
        number = found[1] + found[2]
        kinds = ("sm", "compute") if found[3] else ("sm",)
        options += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return options


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
    if os.environ.get("DDPM_FAST_BUILD_CUDA") == "0":
        raise MissingError("DDPM_FAST_BUILD_CUDA was 0")
    sources = sorted(str(path) for path in Path("csrc/cuda").glob("*") if path.suffix in (".cpp", ".cu"))
    if not sources:
        raise MissingError("these sources have no csrc/cuda")
    find_compiler()
    find_cuda()
    from torch.utils.cpp_extension import CUDAExtension

    return [
        CUDAExtension(
            "ddpm_fast._cuda",
            sources,
            include_dirs=[f"{ROOT}/csrc"],
            define_macros=[TARGET, ("USE_CUDA", None)],  # without it, PyTorch's headers hide their CUDA part
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + code_for(os.environ["TORCH_CUDA_ARCH_LIST"])},
            py_limited_api=True,
        )
    ]


missing = {}  # module -> why it is left out


def leave_out(name: str, reason: str) -> None:
    if name == "cuda" and os.environ.get("DDPM_FAST_BUILD_CUDA") == "1":
        sys.exit(f"DDPM_FAST_BUILD_CUDA is 1, but {reason}")
    missing[name] = reason
    print(f"ddpm_fast: the module {name} is left out: {reason}", file=sys.stderr)


@contextlib.contextmanager
def output_of_commands() -> Iterator[list[str]]:
    """Collects what compilers print, in a list that is filled at the end, when it is printed as well."""
    found: list[str] = []
    with tempfile.TemporaryFile() as file:
        saved = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield found
        finally:
            sys.stdout.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            file.seek(0)
            found.append(file.read().decode(errors="replace"))
            print(found[0], end="", flush=True)


class BuildPy(build_py):
    """Starts from an empty folder, or what an earlier build left would be packed too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        record("." if self.editable_mode else self.build_lib)


def record(folder: str) -> None:
    """Writes beside the modules why any is missing and which GPUs they are for, for ddpm_fast.ops.native to report."""
    package = Path(folder, "ddpm_fast")
    package.mkdir(parents=True, exist_ok=True)
    architectures = {} if "cuda" in missing else {"cuda_architectures": os.environ["TORCH_CUDA_ARCH_LIST"]}
    (package / "_build.json").write_text(json.dumps(missing | architectures))


class BdistWheel(bdist_wheel):
    """Builds first and tags afterwards: a wheel without compiled modules is one for any platform."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


commands: dict[str, type] = {"build_py": BuildPy, "bdist_wheel": BdistWheel}
modules: list[Extension] = []
# CUDA first: cpp_extension looks for CUDA_HOME once, when it is imported.
for make, names in (
    (cuda_modules, ["cuda"]),
    (cpu_modules, [f"cpu{instruction_set}" for instruction_set in INSTRUCTION_SETS]),
):
    try:
        modules += make()
    except MissingError as error:
        for name in names:
            leave_out(name, str(error))

if modules:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Builds each module in a folder of its own, and leaves out those whose compilation fails."""

        def run(self) -> None:
            inplace = self.inplace
            super().run()
            self.distribution.ext_modules = self.extensions  # those that are left
            for name in missing if inplace else ():
                Path("ddpm_fast", f"_{name}.abi3.so").unlink(missing_ok=True)  # of an earlier build
            record("." if inplace else self.build_lib)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # PyTorch checks the compilers of all modules before it builds the first
                cuda = [extension for extension in self.extensions if extension.name == "ddpm_fast._cuda"]
                for extension in cuda or self.extensions:
                    self._leave_out(extension, f"PyTorch cannot use the compiler: {error}")
                if self.extensions:
                    self.build_extensions()

        def build_extension(self, extension: Extension) -> None:
            # The modules are compiled from the same sources: their objects are kept apart.
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            output = [""]
            try:
                with output_of_commands() as output:
                    super().build_extension(extension)
            except Exception as error:
                self._leave_out(extension, f"compiling or linking failed: {reason_in(output[0]) or error}")
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            finally:
                self.build_temp = shared

        def _leave_out(self, extension: Extension, reason: str) -> None:
            leave_out(extension.name.removeprefix("ddpm_fast._"), reason)
            self.extensions = [other for other in self.extensions if other is not extension]

    commands["build_ext"] = BuildExt

setup(ext_modules=modules, cmdclass=commands, options={"bdist_wheel": {"py_limited_api": "cp310"}})
