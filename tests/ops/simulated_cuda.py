"""The CUDA kernels and their launchers on CPU tensors: the PTX that nvcc makes, executed by ptxsim.

`Simulation(arch)` has a method for each op, with the op's strict signature; what it launched lies in `launches`.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import torch
from ptxsim import Module, cuda_host, toolchain
from torch import Tensor

from ddpm_fast.ops.layout import empty_with_channels, memory_format

ROOT = Path(__file__).parents[2]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # enum class Type


def options(csrc: Path = ROOT / "csrc") -> list[str]:
    """How device code is compiled, as in setup.py."""
    return ["-O3", "--fmad=false", "-DUSE_CUDA", f"-I{csrc}", f"-I{Path(torch.__file__).parent / 'include'}"]


class Library:
    """The launchers with the PTX of some architectures inside, linked with ptxsim's stand-in for the CUDA runtime."""

    def __init__(self, csrc: Path, folder: Path, architectures: Sequence[int]) -> None:
        """Compiles csrc, unless it lies compiled in the folder."""
        self.path = folder / "entry.so"
        if not self.path.exists():
            command = [toolchain.find_tool("nvcc"), "-shared", "-cudart", "none", "-std=c++17", *options(csrc)]
            command += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in architectures]
            command += ["-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=default", "-Xlinker", "-Bsymbolic"]
            partial = self.path.with_suffix(f".{os.getpid()}")
            shim = Path(cuda_host.__file__).with_name("host_shim.c")
            toolchain.run_tool([*command, "-o", str(partial), str(ROOT / "tests/cuda_kernels/entry.cu"), str(shim)])
            partial.rename(self.path)
        self.functions = ctypes.CDLL(str(self.path))

    @functools.cache  # noqa: B019 - a library lives as long as the tests
    def ptx(self, arch: int) -> str:
        text = toolchain.run_tool([toolchain.find_tool("cuobjdump"), "-ptx", str(self.path)])
        parts = re.split(r"^(?=\.version)|^Fatbin.*", text, flags=re.MULTILINE)
        (found,) = (part for part in parts if re.search(rf"^\.target sm_{arch}\b", part, re.MULTILINE))
        return found


@functools.cache
def library() -> Library:
    """The project's own, kept from run to run until a source or the compiler changes."""
    digest = hashlib.sha256(toolchain.run_tool([toolchain.find_tool("nvcc"), "--version"]).encode())
    sources = [*(ROOT / "csrc/common").iterdir(), *(ROOT / "csrc/cuda").iterdir(), ROOT / "tests/cuda_kernels/entry.cu"]
    for path in (*sorted(sources), Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr(architectures.chosen).encode())
    folder = Path(tempfile.gettempdir()) / f"ddpm_fast-tests-{os.getuid()}" / digest.hexdigest()[:16]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of pytest's parallel processes, one compiles and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Library(ROOT / "csrc", folder, architectures.chosen)


@functools.cache
def structures() -> SimpleNamespace:
    """The structs of arguments.h as ctypes, read from it."""
    kinds: dict[str, Any] = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "bool": ctypes.c_bool}
    kinds |= {"Type": ctypes.c_int32, "LossType": ctypes.c_int32}
    text = re.sub(r"//.*", "", (ROOT / "csrc/common/arguments.h").read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(\w+\*?) ([\w, ]+)", declaration).groups()
            fields += [(each, ctypes.c_void_p if kind[-1] == "*" else kinds[kind]) for each in names.split(", ")]
        kinds[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return SimpleNamespace(**{name: kind for name, kind in kinds.items() if name[0].isupper()})


def shape_of(x: Tensor, *, image: bool | None = None) -> Any:
    """Shape of arguments.h. Tensors without image axes are one channel, unless `image`."""
    image = x.ndim >= 4 if image is None else image
    samples = len(x)
    size = x.numel() // samples if samples else 0
    if not image:
        return structures().Shape(samples, 1, size, False)
    channels = x.shape[1]
    plane = size // channels if channels else 0
    channels_last = memory_format(x) != torch.contiguous_format
    return structures().Shape(samples, channels, plane, not channels_last and channels > 1 and plane > 1)


class Simulation:
    """The CUDA backend for one architecture, by its number: 90 for sm_90."""

    def __init__(self, arch: int, kernels: Library | None = None) -> None:
        kernels = kernels or library()
        self.host = cuda_host.HostLibrary(kernels.functions, Module(kernels.ptx(arch)), kernels.functions)
        self.launches = self.host.launches

    def _launch(self, name: str, **values: Any) -> None:
        kind = getattr(structures(), name)
        entry = getattr(self.host.library, f"size_of_{name}")
        assert ctypes.sizeof(kind) == entry(), f"{name} is laid out otherwise than ctypes believes"
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        arguments = kind(
            **{key: x.data_ptr() if isinstance(x, Tensor) else x for key, x in values.items() if x is not None}
        )
        if hasattr(kind, "workspace"):
            measure = getattr(self.host.library, f"workspace_of_{name}")
            measure.restype = ctypes.c_int64
            workspace = torch.empty(measure(ctypes.byref(arguments)))
            arguments.workspace = workspace.data_ptr() or None
            tensors.append(workspace)
        self.launches.clear()
        error = self.host.call(f"launch_{name}", ctypes.byref(arguments), tensors=tensors)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def fold_in(self, keys: Tensor, data: Tensor) -> Tensor:
        out = torch.empty_like(keys)
        self._launch("FoldIn", keys=keys, data=data, out=out, count=len(keys))
        return out

    def normal(self, keys: Tensor, size: int) -> Tensor:
        out = torch.empty(len(keys), size)
        self._launch("Normal", keys=keys, out=out, count=len(keys), size=size)
        return out

    def q_sample(
        self,
        x_start: Tensor,
        noise: Tensor | None,
        keys: Tensor | None,
        t: Tensor,
        rows: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty_like(x_start, dtype=dtype, memory_format=memory_format(x_start))
        self._launch(
            "QSample",
            x_start=x_start,
            noise=noise,
            keys=keys,
            t=t,
            rows=rows,
            out=out,
            shape=shape_of(x_start),
            timesteps=len(rows),
            x_type=TYPES[x_start.dtype],
            out_type=TYPES[dtype],
        )
        return out

    def weighted_loss(
        self,
        pred: Tensor,
        x_start: Tensor | None,
        noise: Tensor | None,
        keys: Tensor | None,
        t: Tensor,
        rows: Tensor,
        upstream: Tensor | None,
        loss_type: int,
        scale: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        loss = torch.empty(len(pred))
        grad = torch.empty_like(pred, memory_format=memory_format(pred)) if with_grad else pred.new_empty(0)
        if pred.numel() == 0:
            return loss.zero_(), grad
        data = {x.dtype for x in (x_start, noise) if x is not None} or {pred.dtype}
        bytes_ = x_start is not None and x_start.dtype == torch.uint8
        data_type = torch.float32 if bytes_ else data.pop()
        self._launch(
            "WeightedLoss",
            pred=pred,
            x_start=x_start,
            noise=noise,
            keys=keys,
            t=t,
            rows=rows,
            upstream=upstream,
            loss=loss,
            grad=grad if with_grad else None,
            shape=shape_of(pred),
            timesteps=len(rows),
            scale=scale,
            loss_type=loss_type,
            pred_type=TYPES[pred.dtype],
            data_type=TYPES[data_type],
            x_is_bytes=bytes_,
        )
        return loss, grad

    def reverse_step(
        self,
        x: Tensor,
        pred: Tensor,
        noise: Tensor | None,
        keys: Tensor | None,
        x_start_prev: Tensor | None,
        variance: Tensor | None,
        bounds: Tensor | None,
        step: Tensor,
        rows: Tensor,
        low: float,
        high: float,
        x_next: Tensor,
        x_start: Tensor | None,
        model_input: Tensor | None,
    ) -> None:
        self._launch(
            "ReverseStep",
            x=x,
            pred=pred,
            noise=noise,
            keys=keys,
            x_start_prev=x_start_prev,
            variance=variance,
            bounds=bounds,
            step=step,
            rows=rows,
            x_next=x_next,
            x_start=x_start,
            model_input=model_input,
            shape=shape_of(x),
            steps=len(rows),
            columns=rows.shape[1],
            low=low,
            high=high,
            key_steps=0 if keys is None else len(keys),
            step_is_shared=step.ndim == 0,
            x_type=TYPES[x.dtype],
            pred_type=TYPES[pred.dtype],
        )

    def vlb_terms(
        self,
        x_start: Tensor,
        x_t: Tensor,
        pred: Tensor,
        variance: Tensor | None,
        t: Tensor,
        rows: Tensor,
        low: float,
        high: float,
    ) -> Tensor:
        out = torch.empty(len(x_t))
        if x_t.numel() == 0:
            return out.zero_()
        self._launch(
            "VlbTerms",
            x_start=x_start,
            x_t=x_t,
            pred=pred,
            variance=variance,
            t=t,
            rows=rows,
            out=out,
            shape=shape_of(x_t),
            timesteps=len(rows),
            columns=rows.shape[1],
            low=low,
            high=high,
            pred_type=TYPES[pred.dtype],
            x_is_bytes=x_start.dtype == torch.uint8,
        )
        return out

    def group_norm_silu(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=memory_format(x))
        mean, rstd = torch.empty(len(x), groups), torch.empty(len(x), groups)
        self._launch(
            "GroupNormSilu",
            x=x,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
            y=y,
            mean=mean,
            rstd=rstd,
            shape=shape_of(x, image=True),
            groups=groups,
            eps=eps,
            silu=silu,
            x_type=TYPES[x.dtype],
            parameter_type=TYPES[weight.dtype],
        )
        return y, mean, rstd

    def group_norm_silu_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        grad_x = torch.empty_like(x, memory_format=memory_format(x))
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        grad_scale, grad_shift = (None if p is None else torch.empty_like(p) for p in (scale, shift))
        self._launch(
            "GroupNormSiluBackward",
            grad=grad,
            x=x,
            mean=mean,
            rstd=rstd,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
            grad_x=grad_x,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            grad_scale=grad_scale,
            grad_shift=grad_shift,
            shape=shape_of(x, image=True),
            groups=groups,
            silu=silu,
            x_type=TYPES[x.dtype],
            parameter_type=TYPES[weight.dtype],
        )
        nothing = x.new_empty(0)
        grads = (nothing if g is None else g for g in (grad_scale, grad_shift))
        return grad_x, grad_weight, grad_bias, *grads

    def add_group_norm_silu(
        self,
        x: Tensor,
        input_bias: Tensor | None,
        residual: Tensor | None,
        skip: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = empty_with_channels(x, len(weight))
        h = torch.empty_like(y) if keep else x.new_empty(0)
        mean, rstd = torch.empty(len(x), groups), torch.empty(len(x), groups)
        self._launch(
            "AddGroupNormSilu",
            x=x,
            input_bias=input_bias,
            residual=residual,
            skip=skip,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
            y=y,
            h=h if keep else None,
            mean=mean,
            rstd=rstd,
            shape=shape_of(y, image=True),
            channels=x.shape[1],
            groups=groups,
            eps=eps,
            silu=silu,
            x_type=TYPES[x.dtype],
            parameter_type=TYPES[weight.dtype],
            **_of_input_bias(input_bias, x),
        )
        return y, h, mean, rstd

    def add_group_norm_silu_backward(
        self,
        grad: Tensor,
        grad_sum: Tensor | None,
        x: Tensor,
        input_bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        silu: bool,
        kept: bool,
        channels: int,
    ) -> tuple[Tensor, ...]:
        grad_x, grad_skip = empty_with_channels(x, channels), empty_with_channels(x, x.shape[1] - channels)
        parameters = (input_bias, weight, bias, scale, shift)
        grads = [None if p is None else torch.empty(p.shape, dtype=p.dtype) for p in parameters]
        names = ("grad_input_bias", "grad_weight", "grad_bias", "grad_scale", "grad_shift")
        self._launch(
            "AddGroupNormSiluBackward",
            grad=grad,
            grad_sum=grad_sum,
            x=x,
            input_bias=input_bias,
            mean=mean,
            rstd=rstd,
            weight=weight,
            bias=bias,
            scale=scale,
            shift=shift,
            grad_x=grad_x,
            grad_skip=grad_skip if grad_skip.numel() else None,
            **dict(zip(names, grads, strict=True)),
            shape=shape_of(x, image=True),
            channels=channels,
            groups=groups,
            silu=silu,
            kept=kept,
            x_type=TYPES[x.dtype],
            parameter_type=TYPES[weight.dtype],
            **_of_input_bias(input_bias, x),
        )
        return grad_x, grad_skip, *(x.new_empty(0) if g is None else g for g in grads)

    def recompute_group_norm_silu(
        self,
        x: Tensor,
        input_bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        silu: bool,
    ) -> Tensor:
        y = empty_with_channels(x, x.shape[1])
        self._launch(
            "RecomputeGroupNormSilu",
            x=x,
            input_bias=input_bias,
            mean=mean,
            rstd=rstd,
            weight=weight,
            bias=bias,
            y=y,
            shape=shape_of(x, image=True),
            groups=groups,
            silu=silu,
            x_type=TYPES[x.dtype],
            parameter_type=TYPES[weight.dtype],
            **_of_input_bias(input_bias, x),
        )
        return y


def _of_input_bias(bias: Tensor | None, x: Tensor) -> dict[str, int]:
    if bias is None:
        return {"input_bias_stride": 0, "input_bias_type": TYPES[x.dtype]}
    stride = 0 if bias.ndim == 1 else bias.stride(0) if len(bias) > 1 else bias.shape[1]
    return {"input_bias_stride": stride, "input_bias_type": TYPES[bias.dtype]}


@functools.cache
def simulation(arch: int) -> Simulation:
    """The project's kernels for one architecture: compiled once, and parsed once a process, which takes seconds."""
    return Simulation(arch)
