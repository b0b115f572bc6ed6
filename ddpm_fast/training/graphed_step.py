"""A training step, from the images to the updated weights, that a GPU replays as one CUDA graph."""

__all__ = ["GraphedStep"]

import random
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import cuda_graph


class GraphedStep:
    """Takes training steps: loss, gradients, clipping and the optimizer's update. On a GPU, they become a CUDA graph.

    A step of a U-Net is a thousand launches or more, which can take the host longer than the GPU needs to compute it; a
    graph is one launch. The first step is taken launch by launch, and the second is captured:

        lr = torch.full((), 2e-4, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, capturable=True)
        first = torch.zeros((), dtype=torch.int64, device="cuda")  # the index of the first image of a batch
        step = GraphedStep(lambda images: diffusion(images, seed=0, sample_offset=first), optimizer, clip=1.0)
        for k, images in enumerate(batches):
            first.fill_(k * len(images))
            loss = step(images)

    A graph repeats what the host did when it was captured. What changes from step to step is therefore an argument of
    the step, or a tensor on the device that is written to in place, such as the learning rate (`lr.fill_`; PyTorch's
    schedulers do that). Random numbers of the device are drawn anew, and follow `torch.manual_seed` as they do without
    a graph. The optimizer's other settings, and addresses and shapes, are compared in each step: where they differ from
    those of the graph, the step is taken launch by launch, and if they then stay, it is captured anew.

    What cannot be captured runs launch by launch, with a warning that has the reason: a loss that makes the host wait
    or draw random numbers, a learning rate that is a number, an optimizer without `capturable=True`, scaled gradients.
    So does everything on a CPU, or with the environment variable DDPM_FAST_GRAPHS=0. For a capture, the loss and its
    gradients are computed twice more, without an update: buffers that the loss writes to are written to twice more.

    A step whose loss or gradients are not finite is skipped: weights, moments and the number of steps stay as they are,
    bit for bit. The host does not wait to find this out: the optimizer's kernel reads it on the device. Fused
    optimizers of PyTorch can do so; others take every step. An enabled scaler alone decides which steps it skips.

    Args:
        loss: from the arguments of a step, on the device of the parameters, to the loss, a tensor of shape (), or to a
            tuple of it and further tensors.
        optimizer: of all parameters, on one device. Their gradients are None before and after a step.
        clip: an upper bound of the norm of all gradients together; None for none.
        scaler: scales the gradients of a float16 loss.
        after: called at the end of each step with what the loss returned, without gradients. What may not be repeated,
            such as a sum over the steps, belongs here: it works on the same tensors of the device in every call, and
            never waits for it.

    Attributes:
        skipped: whether the last step was not taken, 1 or 0, a float32 tensor of shape () on the device.
        norm: of all gradients of the last step together, before clipping, a tensor of shape () on the device.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor | tuple[Tensor, ...]],
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        self.loss, self.optimizer, self.clip, self.after = loss, optimizer, clip, after
        self.scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
        self._refused = False  # whether the step could not be captured
        self._before: Hashable = None  # the form of the step before
        self._captured: Hashable = None  # the form of the step that was captured
        self._inputs: list[Tensor] = []  # the tensors that the graph reads and writes
        self._results: tuple[Tensor, ...] = ()  # of a step, in the graph
        self._replay: Callable[[], None] | None = None
        self.skipped: Tensor | None = None
        self.norm: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Takes a step.

        Args:
            inputs: the arguments of the loss, on any device; copied from pinned memory without waiting.

        Returns:
            What the loss returned, without gradients.
        """
        parameters = self._parameters()
        device = parameters[0].device
        if self._refused or not cuda_graph.enabled(parameters[0]):
            return self._told(self._take([x.to(device, non_blocking=True) for x in inputs]))
        form = self._form(inputs)
        if form == self._before and form != self._captured:
            self._capture(inputs, form, device)
        if form != self._captured:
            results = self._take([x.to(device, non_blocking=True) for x in inputs])
            self._before = self._form(inputs)  # not before, since the first step makes the optimizer's tensors
            return self._told(results)
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x, non_blocking=True)
        self._replay()
        self._before = form
        return self._told(tuple(x.clone() for x in self._results))  # the next replay writes to them

    def _told(self, results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """What a step returns."""
        self.skipped, self.norm, *returned = results
        return returned[0] if len(returned) == 1 else tuple(returned)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _take(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Takes a step launch by launch. Returns `skipped`, `norm`, and what the loss returned."""
        returned = _as_tuple(self.loss(*inputs))
        self.scaler.scale(returned[0]).backward()
        returned = tuple(x.detach() for x in returned)
        loss, skipped = returned[0], torch.zeros((), device=returned[0].device)
        skips = not self.scaler.is_enabled() and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), self.clip, norm)
        if skips:
            skipped = (~(loss.isfinite() & norm.isfinite())).float()
            self.optimizer.found_inf = skipped  # as a GradScaler does
        try:
            self.scaler.step(self.optimizer)  # left out where a scaled gradient is too large for float16
        finally:
            if skips:
                del self.optimizer.found_inf
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.after is not None:
            with torch.no_grad():
                self.after(*returned)
        return skipped, norm, *returned

    def _form(self, inputs: tuple[Tensor, ...]) -> Hashable:
        """What a graph takes from its inputs, its parameters and the optimizer."""
        state = self.optimizer.state
        return (
            tuple((x.shape, x.dtype, x.stride()) for x in inputs),
            tuple(
                (
                    tuple((name, _kept(value)) for name, value in group.items() if name != "params"),
                    tuple(
                        (p.data_ptr(), p.grad is None, *(_kept(value) for value in state.get(p, {}).values()))
                        for p in group["params"]
                    ),
                )
                for group in self.optimizer.param_groups
            ),
        )

    def _capture(self, inputs: tuple[Tensor, ...], form: Hashable, device: torch.device) -> None:
        """Captures a step of this form, without taking one; or warns, and nothing has changed."""
        self._captured = self._replay = None  # frees the graph before
        self._results = ()

        def loss_and_gradients() -> None:
            _as_tuple(self.loss(*self._inputs))[0].backward()
            self.optimizer.zero_grad()

        def step() -> None:
            self._results = self._take(self._inputs)

        try:
            if self.scaler.is_enabled():
                raise cuda_graph.CannotCapture("its gradients are scaled")
            for group in self.optimizer.param_groups:
                if not group.get("capturable"):
                    raise cuda_graph.CannotCapture("the optimizer may wait for the device; give it capturable=True")
                if not isinstance(group["lr"], Tensor):
                    raise cuda_graph.CannotCapture("the learning rate is a number, not a tensor on the device")
            self._inputs = [torch.empty_like(x, device=device).copy_(x) for x in inputs]
            with _generators_put_back(device):
                self._replay = cuda_graph.capture(step, device, warm_up=loss_and_gradients)
        except (cuda_graph.CannotCapture, torch.OutOfMemoryError) as error:
            self._refused, self._inputs, self._results = True, [], ()
            warnings.warn(f"training runs launch by launch, since the step cannot be captured: {error}", stacklevel=3)
        else:
            self._captured = form
        finally:
            self.optimizer.zero_grad()  # where an error left some


def _as_tuple(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def _kept(value: Any) -> Any:
    """A tensor by its address, since its values may change; another setting by its value."""
    return ("tensor", value.data_ptr()) if isinstance(value, Tensor) else value


@contextmanager
def _generators_put_back(device: torch.device) -> Iterator[None]:
    """Gives the generators the state that they had before.

    Raises:
        CannotCapture: one of the host was drawn from, whose numbers a graph would repeat.
    """
    python, host = random.getstate(), torch.get_rng_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices, device_type="cuda"):
            yield
            drawn = random.getstate() != python or (device.type == "cuda" and (torch.get_rng_state() != host).any())
    finally:
        random.setstate(python)
    if drawn:
        raise cuda_graph.CannotCapture("it draws random numbers on the host, which a graph would repeat")
