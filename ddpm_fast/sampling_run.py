"""A sampling run: network and step in turns.

`SamplingRun` works on tensors that are allocated once. Nothing in a step is read by the host or sent to the device:
timesteps, rows, keys and the time embeddings of all steps are there from the beginning. `MethodRun` takes the same
steps through the methods of a subclass that has changed them.
"""

__all__ = ["MethodRun", "Run", "SamplingRun"]

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from . import cuda_graph, ops
from .denoiser import Denoiser, ModelArguments, clip_bounds, if_any
from .nn.evaluation import in_evaluation
from .nn.packed_weights import PackedWeights, packed
from .noise import NoiseSource
from .samplers import StepTable


class Run(Protocol):
    """A state, in [-1, 1], and how it is taken a step on.

    Attributes:
        x: the state.
        x_start: the clipped x0_hat of the last step; None where nothing needs it.
    """

    x: Tensor
    x_start: Tensor | None

    def step(self, k: int) -> None:
        """Takes step k of the table; the steps come in their order."""
        ...


class SamplingRun:
    """A run in place: every step changes `x` and `x_start`, which are float32 or float64.

    Args:
        denoiser: with the network, which is called in evaluation mode.
        x: the state to begin with, (N, ...), which is copied.
        table: the sampler's steps.
        source: of the noise.
        start_step: the first step to take; x is the state before it.
        with_x_start: keep `x_start` although neither sampler nor network needs it.
        model_kwargs: further arguments of the network.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        table: StepTable,
        source: NoiseSource,
        *,
        start_step: int = 0,
        with_x_start: bool = False,
        model_kwargs: ModelArguments | None = None,
    ) -> None:
        self._denoiser, self._source, self._model_kwargs = in_evaluation(denoiser), source, dict(model_kwargs or {})
        self._clip = clip_bounds(denoiser.clip_denoised)
        self._rows, self._timesteps = table.rows.to(x), table.t.to(x.device)
        self._indices = torch.arange(len(table), device=x.device)
        self._weights = PackedWeights()
        self._multistep = bool((table.C != 0).any())
        self._keys = None  # (K, N, 2)
        if source.keyed and bool((table.sigma[start_step:] > 0).any()):
            self._keys = source.keys(len(x), range(1, len(table) + 1))

        # Channels-last, as the ops count noise; where another package's noise is drawn, its layout is kept too.
        layout = ops.channels_last_format(x.ndim) if source.keyed else None
        self.x = torch.empty_like(x, memory_format=layout or torch.preserve_format).copy_(x)
        needed = with_x_start or self._multistep or denoiser.self_condition
        self.x_start = torch.zeros_like(self.x) if needed else None
        dtype = denoiser.model_dtype(x)
        self._model_input = self.x if dtype == x.dtype else self.x.to(dtype)
        # (K, D): all that the network makes of the timesteps, if it can tell before it sees an image
        model = self._denoiser.model
        self._time_rows = model.time_rows(self._timesteps) if hasattr(model, "time_rows") else None

        self._first = start_step
        self._replay = None
        steps = len(table) - start_step
        if x.is_cuda and source.keyed and not denoiser.self_condition and steps > cuda_graph.WARM_UP:
            self._replay = self._capture()

    @torch.no_grad()
    def step(self, k: int) -> None:
        """Takes step k of the table; the steps come in their order."""
        if self._replay is not None:
            self._replay()
            return
        noise = None
        # Other packages draw for every step but the last, whatever its sigma.
        if not self._source.keyed and k + 1 < len(self._rows):
            noise = self._source.draw(k + 1, self.x.shape)
        x_self_cond = self.x_start if self._denoiser.self_condition and k > self._first else None
        time_row = None if self._time_rows is None else self._time_rows[k]
        self._take(self._indices[k], self._timesteps[k], time_row, noise, x_self_cond)

    def _take(
        self,
        index: Tensor,
        t: Tensor,
        time_row: Tensor | None,
        noise: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> None:
        x, model_input = self.x, self._model_input
        further = self._model_kwargs if time_row is None else self._model_kwargs | {"time_row": time_row}
        with packed(self._weights):
            pred = self._denoiser.predict(model_input, t.expand(len(x)), x_self_cond, further)
        # The op writes the next input of a network in half precision; a float64 network's is converted.
        written = model_input is not x and pred.dtype == model_input.dtype and model_input.itemsize < x.itemsize
        ops.reverse_step(
            x,
            pred,
            index,
            self._rows,
            noise=noise,
            keys=self._keys,
            x_start_prev=self.x_start if self._multistep else None,
            clip=self._clip,
            out=ops.ReverseStep(x, self.x_start, model_input if written else None),
        )
        if model_input is not x and not written:
            model_input.copy_(x)

    def _capture(self) -> Callable[[], None]:
        index, t = (v[self._first : self._first + 1].clone() for v in (self._indices, self._timesteps))
        following = self._timesteps.roll(-1)

        def take() -> None:
            self._take(index[0], t, None if self._time_rows is None else self._time_rows.index_select(0, index)[0])
            torch.index_select(following, 0, index, out=t)
            index.add_(1)

        state = (self.x, self.x_start, self._model_input, index, t)
        return cuda_graph.captured(take, [y for y in state if y is not None])


class MethodRun:
    """A run through the methods of a subclass of GaussianDiffusion, as denoising_diffusion_pytorch calls them.

    With `by_p_sample`, for the whole ancestral chain, a step is `p_sample(x, t, x_self_cond)`. Any other is made from
    `model_predictions(x, t, x_self_cond, clip_x_start=True, rederive_pred_noise=True)`: with x_t = a x_0 + s eps in the
    row,

        x' = (B + A a) x_0 + A s eps + C x0_prev + sigma z.

    Args: as those of `SamplingRun`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        table: StepTable,
        source: NoiseSource,
        *,
        start_step: int = 0,
        model_kwargs: ModelArguments | None = None,
        by_p_sample: bool = False,
    ) -> None:
        self.x, self.x_start = x, None
        self._original, self._denoiser = denoiser, in_evaluation(denoiser)
        self._source, self._table, self._first = source, table, start_step
        self._further, self._by_p_sample = if_any(model_kwargs), by_p_sample
        self._clips = clip_bounds(denoiser.clip_denoised) is not None

    @torch.no_grad()
    def step(self, k: int) -> None:
        before = self._denoiser.__dict__.copy()
        x_self_cond = self.x_start if self._denoiser.self_condition and k > self._first else None
        t = int(self._table.t[k])
        if self._by_p_sample:
            self.x, self.x_start = self._denoiser.p_sample(self.x, t, x_self_cond, **self._further)
        else:
            self.x, self.x_start = self._by_predictions(k, t, x_self_cond)
        if self._denoiser is not self._original:  # what a method has assigned to self
            assigned = {name: v for name, v in self._denoiser.__dict__.items() if before.get(name) is not v}
            self._original.__dict__.update(assigned)

    def _by_predictions(self, k: int, t: int, x_self_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        x, times = self.x, torch.full((len(self.x),), t, device=self.x.device)
        eps, x_start = self._denoiser.model_predictions(
            x, times, x_self_cond, clip_x_start=self._clips, rederive_pred_noise=True, **self._further
        )
        *_, A, B, C, sigma = self._table.rows[k].tolist()
        schedule = self._denoiser.schedule
        a, s = (v[t].item() for v in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod))
        x_next = (B + A * a) * x_start + A * s * eps
        if C:
            x_next = x_next + C * self.x_start
        if k + 1 < len(self._table) and (sigma > 0 or not self._source.keyed):
            x_next = x_next + sigma * self._source.draw(k + 1, x.shape)
        return x_next, x_start
