"""Whether an optimised network computes what it did before, and faster: see `verify`.

Each module is compared by itself, on what it receives in a call of the network. With y its result, y* that of the
original, and y' that of the original with its weights and inputs rounded to the dtype of y,

    |y - y*| <= min(|y' - y*|, u sqrt(n) |y'|) + 4 (u + n v) |y'|,

in Euclidean norms, with n the length of the sums. The first part is what rounding to u (2^-8 in bfloat16) does to n
terms of random signs; it is computed, and is to be no more than where the sum is no larger than its terms. The second
is for the kernel, which rounds its result to u and its sums to v = 2^-24: the errors of n additions grow as sqrt(n),
and are relative to the sum of absolute values, some sqrt(n) times the sum. The 4 is for kernels that round in between.
"""

__all__ = ["ModuleReport", "Verification", "verify", "verify_first_call"]

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cuda_graph
from .former import Former, State, network_of
from .lazy_group_norm import PendingGroupNorm, computed, watched
from .mixed_dtypes import each, is_timestep
from .optimized_modules import AS_IT_WAS, OPTIMIZED_LAYERS, SHARED, STATE, Shared, call_as_it_was, calling

# Of these calls the fastest counts; the original and the changed module take turns, and each is the first in half of
# them. Fresh memory can take three times as long as the layer that writes to it, and one of the two may always be given
# it: medians, and turns in one order, decided wrongly on a loaded machine.
REPEATS = 8
SLOWER = 1.2  # times as long as the original, and a module is left as it was: noise of a tenth decides nothing


@dataclass
class ModuleReport:
    """What was found out about a module.

    Attributes:
        name: in the network.
        kind: its class.
        error: |y - y*| / |y*|, the largest of its calls; None where it was not compared.
        bound: that the error is to keep, for the call of that error.
        before, after: seconds of the fastest call of the original, with the casts that it needs in the optimised
            network, and of the changed module; a sum over calls of different shapes.
        reason: why the module was left as it was, or not compared; empty if it is right and fast.
        kept: whether it is still optimised.
    """

    name: str
    kind: str
    error: float | None = None
    bound: float | None = None
    before: float = 0.0
    after: float = 0.0
    reason: str = ""
    kept: bool = True

    def __str__(self) -> str:
        verdict = ", ".join(filter(None, ("kept" if self.kept else "as it was", self.reason)))
        if self.error is None:
            return f"{self.name} ({self.kind}): {verdict}"
        times = f"{self.before * 1e3:.3f} -> {self.after * 1e3:.3f} ms"
        return f"{self.name} ({self.kind}): error {self.error:.1e} of {self.bound:.1e}, {times}, {verdict}"


@dataclass
class Verification:
    """What `verify` found: a report for each module that `optimize` has changed. `print` it."""

    modules: list[ModuleReport] = field(default_factory=list)

    @property
    def reverted(self) -> list[ModuleReport]:
        return [module for module in self.modules if not module.kept]

    def __str__(self) -> str:
        compared = [module for module in self.modules if module.error is not None]
        before, after = (sum(getattr(m, name) for m in compared) for name in ("before", "after"))
        count, reverted = len(self.modules), len(self.reverted)
        lines = [
            *map(str, self.modules),
            f"{len(compared)} of {count} changed modules were compared: {before * 1e3:.1f} -> {after * 1e3:.1f} ms.",
            f"{reverted} were left as they were." if reverted else "All are kept.",
        ]
        return "\n".join(lines) if self.modules else "optimize changed no module."


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Verification:
    """Calls an optimised model and leaves those of its modules as they were that are wrong or slower here.

    PyTorch's kernels for bfloat16 are wrong in some versions on some processors, without an error, and a layer may be
    slower in bfloat16 than in float32. Every convolution, linear layer, norm or other module whose class or weights
    `ddpm_fast.optimize` has changed is compared with its original, on the inputs that it receives in this call. It is
    left as it was if its error exceeds that of the dtype, or if the fastest of eight calls takes more than 1.2 times as
    long as that of the original. It then has its former weights and computes with them, in a network that is optimised
    otherwise.

        model = ddpm_fast.optimize(unet)
        print(ddpm_fast.verify(model, x_t, t))

    The arithmetic between modules, such as the products of an attention, is not compared, nor is a module that is not
    called itself, or that has other changed modules in it: these are compared. Times are those of inference; where they
    are close to the margin, another run may decide otherwise.

    Args:
        model: what `ddpm_fast.optimize` was given, in evaluation mode.
        args, kwargs: what it is called with: inputs of the shape and the values that it is going to have.

    Returns:
        A report for each module. `print` shows it; `.reverted` are the modules that were left as they were.

    Raises:
        ValueError: the model is not optimised, or in training mode.
    """
    network = network_of(model)
    if STATE not in vars(network):
        raise ValueError("the model is not optimised: ddpm_fast.optimize it first")
    if network.training:
        raise ValueError("the model is in training mode, but times and errors of inference are compared: .eval() it")
    return _verified(network, lambda: model(*args, **kwargs))


def verify_first_call(network: nn.Module, call: Callable[[], Any]) -> None:
    """Verifies a network with the first call that it is given, and warns of what was left as it was."""
    found = _verified(network, call)
    if found.reverted:
        modules = "\n".join(map(str, found.reverted))
        warnings.warn(f"ddpm_fast.optimize left {len(found.reverted)} modules as they were:\n{modules}", stacklevel=2)


def _verified(network: nn.Module, call: Callable[[], Any]) -> Verification:
    judges = _judges(network)
    while judges:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(cuda_graph.without())
            for module, judge in judges.items():
                if judge.can and type(module) is not PendingGroupNorm:
                    hook = module.register_forward_pre_hook(judge.before_call, with_kwargs=True)
                    stack.callback(hook.remove)
            stack.enter_context(watched(lambda norm, *how: judges[norm].before_norm(*how) if norm in judges else None))
            call()
        # What follows a module that makes NaN is compared once that is as it was.
        if not _revert(network, judges) or all(judge.finite for judge in judges.values()):
            break
    return Verification([judge.report for judge in judges.values()])


def _judges(network: nn.Module) -> "dict[nn.Module, _Judge]":
    """One for each changed module, in the order of the network."""
    state: State = vars(network)[STATE]
    shared = vars(network).get(SHARED)  # None where there was nothing to change
    classes, formers = dict(state.modules), {}
    for former in state.tensors:
        tensor = former.tensor()
        if tensor is not None:
            formers[id(tensor)] = former
    names: dict[nn.Module, str] = {module: name for name, module in network.named_modules()}

    def own(module: nn.Module) -> dict[str, Former]:
        tensors = {**module._parameters, **module._buffers}
        return {name: formers[id(x)] for name, x in tensors.items() if id(x) in formers}

    changed = {  # a dict, for the order
        module: None
        for module in names
        if AS_IT_WAS not in vars(module)
        and (type(module) in OPTIMIZED_LAYERS or any(former.kept is not None for former in own(module).values()))
    }
    judges = {}
    for module in changed:
        cls = classes.get(module, type(module))
        reason = ""
        if any(other is not module and other in changed for other in module.modules()):
            reason = "it has changed modules in it"
        elif type(module) not in (cls, calling(cls), *OPTIMIZED_LAYERS) or "forward" in vars(module):
            reason = "it was changed since"
        elif any(x.is_meta for x in module.parameters()):
            reason = "its weights are on the meta device"
        elif module.training:
            reason = "it is in training mode"
        report = ModuleReport(names[module] or "the model", cls.__name__, reason=reason and f"not compared: {reason}")
        judges[module] = _Judge(module, cls, own(module), shared, state.dtype, report)
    return judges


class _Judge:
    """Compares one module with what it was, in its calls."""

    def __init__(
        self,
        module: nn.Module,
        cls: type,
        formers: dict[str, Former],
        shared: Shared,
        dtype: torch.dtype,
        report: ModuleReport,
    ) -> None:
        self.module, self.cls, self.formers, self.report = module, cls, formers, report
        self.can = not report.reason
        self._shared, self._dtype = shared, dtype
        self._exact = torch.promote_types(dtype, torch.float32)
        self._seen: set[Any] = set()
        self.finite = True  # whether there was no call that could not be compared
        self._excess = 0.0  # the largest error, in terms of its bound

    def before_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook: the module is about to be called."""
        self._compare(args, kwargs, None, lambda y, cast: y)

    def before_norm(self, x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> None:
        """The norm is about to be computed, with what follows it."""
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))
        modulation = None if scale is None else (1 + scale.view(shape), shift.view(shape))

        def follow(y: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
            if modulation is not None:
                factor, offset = map(cast, modulation)
                y = y * factor + offset
            return F.silu(y) if silu else y

        with watched(None):
            self._compare((x,), {}, (scale is None, silu), follow)

    def _compare(self, args: tuple, kwargs: dict, how: Any, follow: Callable) -> None:
        """Compares the module with its original on one input, the first of its form."""
        args, kwargs = each(computed, (args, kwargs))
        reduced = self._shared.reduced
        tensors = _tensors((args, kwargs))
        form = (how, tuple((x.shape, x.dtype, x.stride()) for x in tensors))
        if not self.can or form in self._seen or not tensors:
            return

        def up(x: Tensor) -> Tensor:
            return x.to(self._exact) if x.is_floating_point() else x

        def rounded(x: Tensor) -> Tensor:
            return up(x.to(reduced) if reduced and x.is_floating_point() and not is_timestep(x) else x)

        def result_of(original: nn.Module, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
            copies, named = each(lambda x: cast(x).clone(), (args, kwargs))
            with torch.autocast(tensors[0].device.type, enabled=False):
                return _floating(follow(self.cls.forward(original, *copies, **named), cast))

        def changed(args: tuple, kwargs: dict) -> Any:
            return computed(follow(type(self.module).forward(self.module, *args, **kwargs), lambda x: x))

        def as_it_was(args: tuple, kwargs: dict) -> Any:
            y = call_as_it_was(original, lambda *a, **k: self.cls.forward(original, *a, **k), args, kwargs)
            return follow(y, lambda x: x)

        exact = result_of(self._original(lambda former: former.data().to(self._exact)), up)
        self.finite = math.isfinite(_norm(exact))
        if not self.finite:
            return
        self._seen.add(form)
        near = result_of(self._original(lambda former: former.tensor().to(self._exact)), rounded)
        original = self._original(Former.data)
        found = _floating(changed(*each(Tensor.clone, (args, kwargs))))
        self._judge_error(found, exact, near, tensors[0])

        given = each(Tensor.clone, (args, kwargs))
        turns = [as_it_was, changed]
        fastest = {}
        for _ in range(REPEATS):
            for turn in turns:
                seconds = _seconds(lambda turn=turn: turn(*given), tensors[0].device)
                fastest[turn] = min(seconds, fastest.get(turn, seconds))
            turns.reverse()
        self.report.before += fastest[as_it_was]
        self.report.after += fastest[changed]

    def _judge_error(self, found: list[Tensor], exact: list[Tensor], near: list[Tensor], x: Tensor) -> None:
        u, n, size = _roundoff(self._shared.reduced or self._dtype, x.device), self._terms(x), _norm(near)
        bound = min(_difference(near, exact), u * n**0.5 * size) + 4 * (u + n * min(u, 2.0**-24)) * size
        error, report = _difference(found, exact), self.report
        excess = error / bound if 0 < error < math.inf and bound else 0.0 if error == 0 else math.inf
        if excess >= self._excess:
            size = _norm(exact) or 1.0
            self._excess, report.error, report.bound = excess, error / size, bound / size

    def _terms(self, x: Tensor) -> int:
        """The most terms that a sum in the module has, roughly."""
        weights = [w for w in self.module.parameters(recurse=False) if w.dim() > 1]
        if weights:
            return max(w.numel() // min(w.shape[:2]) for w in weights)
        return x[0].numel() // getattr(self.module, "num_groups", 1) if x.dim() > 1 else x.numel()

    def _original(self, value: Callable[[Former], Tensor]) -> nn.Module:
        """A module of the former class, whose weights are values of the former ones."""
        original = self.cls.__new__(self.cls)
        original.__dict__ = self.module.__dict__ | {SHARED: self._shared}
        for kind in ("_parameters", "_buffers"):
            own = original.__dict__[kind]
            original.__dict__[kind] = {
                name: value(self.formers[name]).detach() if name in self.formers else x for name, x in own.items()
            }
        return original

    def decide(self) -> bool:
        """Whether the module is to be left as it was."""
        report, wrong = self.report, self._excess > 1
        slower = report.after > SLOWER * report.before
        report.reason = "wrong" if wrong else "slower" if slower else ""
        if report.error is None:
            report.reason = f"not compared: {'it was not called' if self.finite else 'its result is not finite'}"
        return wrong or slower

    def revert(self, state: State, reason: str) -> None:
        self.can, self.report.kept, self.report.reason = False, False, reason
        for former in self.formers.values():
            former.put_back()
        if all(module is not self.module for module, _ in state.modules):
            state.modules.append((self.module, self.cls))
        self.module.__class__ = calling(self.cls)
        setattr(self.module, SHARED, self._shared)
        setattr(self.module, AS_IT_WAS, True)


def _revert(network: nn.Module, judges: dict[nn.Module, _Judge]) -> bool:
    """Leaves modules as they were where that is decided; whether there are any."""
    state: State = vars(network)[STATE]
    back = [judge for judge in judges.values() if judge.can and judge.decide()]
    tensors = {id(former) for judge in back for former in judge.formers.values()}
    for judge in back:
        judge.revert(state, judge.report.reason)
    for judge in judges.values():
        if judge.can and any(id(former) in tensors for former in judge.formers.values()):
            judge.revert(state, "shares a weight with one that was left as it was")
    return bool(back)


def _roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """To which results are rounded; in float32, to which operands may be."""
    if dtype == torch.float32:
        precision = torch.get_float32_matmul_precision()
        if precision == "medium":
            return 2.0**-8
        if precision == "high" or (device.type == "cuda" and torch.backends.cudnn.allow_tf32):
            return 2.0**-11
    return torch.finfo(dtype).eps / 2


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda device: None)
    wait(device)
    start = perf_counter()
    call()
    wait(device)
    return perf_counter() - start


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(lambda x: found.append(x) or x, value)
    return found


def _floating(value: Any) -> list[Tensor]:
    return [x for x in _tensors(value) if x.is_floating_point()]


def _difference(tensors: list[Tensor], others: list[Tensor]) -> float:
    return _norm([a.to(b.dtype) - b for a, b in zip(tensors, others, strict=True)])


def _norm(tensors: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
