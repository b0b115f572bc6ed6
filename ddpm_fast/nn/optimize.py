"""Networks of other packages, made fast in place: see `optimize`.

The modules keep their parameters and their code. What changes is their class (see `optimized_modules`): convolutions
and linear layers keep packed weights, a group norm is fused with the SiLU that follows it, and the module of a network
that is called from outside casts what it is given.
"""

__all__ = ["computes_in_bfloat16", "optimize", "restore"]

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import packed_weights as packing
from .former import Former, State, network_of, replace
from .optimized_modules import AS_IT_WAS, OPTIMIZED_LAYERS, SHARED, STATE, Shared, calling, replacement
from .verification import verify_first_call

M = TypeVar("M", bound=nn.Module)


def optimize(model: M, dtype: torch.dtype | None = None, *, verify: bool = False) -> M:
    """Makes a network fast in place: channels-last, in a faster dtype, with packed weights and fused group norms.

    For networks of other packages, such as diffusers' UNet2DModel, denoising_diffusion_pytorch's Unet or OpenAI's
    UNetModel, and for `ddpm_fast.UNet`. `restore` undoes it. The results are those of the network to the rounding of
    the dtype, gradients too.

    - Parameters, and buffers of modules that have parameters, are converted to `dtype`, and on a GPU convolutions'
      weights to channels-last. The Parameter objects stay, so that optimizers, hooks and averages that hold them
      remain valid. Buffers of modules without parameters, such as tables of frequencies, are not converted.
    - Images and embeddings that the model, or one of its modules, is called with are cast to that dtype, and its
      results are cast back; a `dtype` property of the model stays what it was. Inputs of one number a sample, such as
      timesteps, are not cast, since bfloat16 has no odd number above 256. Within the model, products, convolutions and
      norms whose operands have several dtypes are computed in `dtype`, in modules of any class.
    - A group norm is fused with the SiLU that follows it (also if it is written as x * sigmoid(x)), and with a scale
      and a shift of each channel between the two, h * (1 + scale) + shift.
    - Without gradients and on a CPU, nn.Conv2d and nn.Linear keep their weights in oneDNN's order from call to call.
      They are packed again when the weights change. A write through `weight.data`, as averages do, is seen when the
      model is called next, if it changes any of 32 elements of each weight.
    - Without gradients, in evaluation mode and on an NVIDIA GPU, a call is captured as a CUDA graph when its form (the
      shapes and dtypes of the tensors, the values of all else) comes again within the last two calls. Later calls
      replay it and return copies of its results, so that the Python of the network costs nothing, and does nothing
      either: what a forward does besides computing, such as printing or storing tensors, is done while capturing only.
      Weights that are written to in place are followed; a network in which anything is replaced is captured anew. What
      cannot be captured (hooks within the network, code that waits for the device) is called as ever, after a warning
      that gives the reason. Two graphs are kept, each with the memory of its activations. The environment variable
      `DDPM_FAST_GRAPHS=0` switches graphs off.

    To train with float32 weights, give `dtype=torch.float32` and use autocast as ever: updates of an optimizer are
    too small for bfloat16. Training on a CPU without autocast, where neither channels-last nor fused norms make a
    network faster, is left as it is. torch.compile, DistributedDataParallel and the like go around an optimised model.

    Args:
        model: the network; or a GaussianDiffusion (of this package or of denoising_diffusion_pytorch), whose `.model`
            is optimised.
        dtype: of the weights and the arithmetic. None is bfloat16 for a float32 model on a processor that computes in
            it (AMX or AVX512-BF16, GPUs since Ampere), and otherwise the model's own.
        verify: whether modules are to be left as they were that turn out to be wrong or slower than before, in the
            first call without gradients in evaluation mode. That call takes as long as some twelve of the original
            network, and a warning says which modules. It is what `ddpm_fast.verify(model, x, t)` does at once, with a
            report. A call that GaussianDiffusion.sample captures as a CUDA graph is not verified: use that before.

    Returns:
        `model` itself. A deep copy or a pickle of it is optimised too. What it was is kept in it: the float32 weights
        for `restore`, twice the memory of those in bfloat16.

    Raises:
        TypeError: not a module, or one of TorchScript, torch.compile or DistributedDataParallel.
        ValueError: a dtype that is not floating, a model optimised before, or parameters on the meta device.
    """
    network = network_of(model)
    floats = [p for p in network.parameters() if p.is_floating_point()]
    if any(p.is_meta for p in network.parameters()):
        raise ValueError(
            "the model has parameters on the meta device: load its weights first, or remove the hooks that "
            "offload them, and offload the optimised model"
        )
    if any(SHARED in vars(m) for m in network.modules()):
        raise ValueError("the model, or a part of it, is optimised already: ddpm_fast.restore it first")
    if dtype is None:
        dtype = _fast_dtype(floats)
    elif not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating, got {dtype}")

    former = floats[0].dtype if floats else None
    reduced = None if dtype == former or not floats else dtype
    said = network.dtype if isinstance(getattr(type(network), "dtype", None), property) else None
    kinds = [(module, replacement(module)) for module in network.modules()]
    shared, state = Shared(reduced, said), State(former, reduced, [], [])
    for module, kind in kinds:
        if kind is not None:
            state.modules.append((module, type(module)))
            module.__class__ = kind
            setattr(module, SHARED, shared)
    for module, name, tensor in _tensors(network):
        old = tensor.data
        # On a CPU the order of a weight in memory does not matter for speed, but it does for PyTorch's fused AdamW: it
        # goes through a weight and its existing moments in the order of memory, and would mix those of a reordered one.
        reordered = tensor.dim() == 4 and isinstance(tensor, nn.Parameter) and tensor.device.type != "cpu"
        layout = torch.channels_last if reordered else torch.preserve_format
        new = old.to(dtype or old.dtype, memory_format=layout)
        kept = old if new.dtype != old.dtype else None
        state.tensors.append(Former(module, name, old.dtype, old.stride(), new.dtype, kept))
        if new is not old:
            replace(tensor, new)
    setattr(network, STATE, state)
    if verify:
        shared.first_call = verify_first_call
    return model


def restore(model: M) -> M:
    """Undoes `optimize` in place, entirely or, with an error, not at all.

    A tensor whose values have not changed has its former bits again, whatever dtype it was converted to since; one
    that has changed (by training, or by loading a state dict) is converted to its former dtype. Memory formats and
    classes are the former ones too. Modules that were wrapped since, as by adapters, are restored where they are, and
    weights that were added since in the dtype of the optimised model are converted to the dtype that it had before.

    Args:
        model: what `optimize` was given, or a copy of it.

    Returns:
        `model` itself.

    Raises:
        ValueError: not an optimised model, or one that was changed in a way that cannot be undone here: modules whose
            class or parameters were replaced by others (parametrizations, pruning), weights on the meta device.
    """
    network = network_of(model)
    state = vars(network).get(STATE)
    if state is None:
        raise ValueError("the model is not optimised")
    _check_restorable(network, state)
    delattr(network, STATE)
    for module, cls in state.modules:
        module.__class__ = cls
        delattr(module, SHARED)
        vars(module).pop(AS_IT_WAS, None)
    known = {id(former.tensor()) for former in state.tensors}
    for former in state.tensors:
        former.put_back()
    for _, _, tensor in _tensors(network):
        if state.reduced is not None and id(tensor) not in known and tensor.dtype == state.reduced:
            replace(tensor, tensor.data.to(state.dtype))
    return model


def _check_restorable(network: nn.Module, state: State) -> None:
    names = {module: name or "the model" for name, module in network.named_modules()}
    for module, cls in state.modules:
        if type(module) not in (calling(cls), *OPTIMIZED_LAYERS):
            raise ValueError(
                f"cannot restore: the class of {names.get(module, cls.__name__)} was changed since ddpm_fast.optimize, "
                "as parametrizations do; remove them first"
            )
    for former in state.tensors:
        name = f"{former.name} of {names.get(former.module, type(former.module).__name__)}"
        tensor = former.tensor()
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"cannot restore: {name} was removed since ddpm_fast.optimize, as pruning and weight norm do; undo "
                "that first"
            )
        if tensor.is_meta:
            raise ValueError(
                f"cannot restore: {name} is on the meta device; load the weights, or remove the hooks that offload "
                "them, first"
            )


def _fast_dtype(parameters: list[Tensor]) -> torch.dtype | None:
    if not parameters or any(p.dtype != torch.float32 for p in parameters):
        return None
    return torch.bfloat16 if computes_in_bfloat16(parameters[0].device.type) else None


def computes_in_bfloat16(kind: str) -> bool:
    """Whether devices of a kind, `cpu` or `cuda`, have instructions for it; others are not known."""
    if kind == "cpu":
        return torch.bfloat16 in packing.DTYPES and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _tensors(network: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The floating parameters, and the buffers of modules that have some; each once."""
    seen = set()
    for module in network.modules():
        own = [*module.named_parameters(recurse=False)]
        if any(p.is_floating_point() for _, p in own):
            own += module.named_buffers(recurse=False)
        for name, tensor in own:
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, name, tensor
