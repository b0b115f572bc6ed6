"""A sampling run: network and step in turns.

`SamplingRun` works on tensors that are allocated once. Nothing in a step is read by the host or sent to the device:
timesteps, rows, keys and the time embeddings of all steps are there from the beginning. `MethodRun` takes the same
steps through the methods of a subclass that has changed them.
"""

__all__ = ["MethodRun", "Run", "SamplingRun"]

from typing import Protocol

import torch
from torch import Tensor

from . import cuda_graph
from .denoiser import Denoiser, ModelArguments, clip_bounds, if_any
from .kept_graphs import kept_graph
from .nn.evaluation import in_evaluation
from .noise import NoiseSource
from .parameterization import x_start_rows
from .samplers import StepTable
from .sampling_step import SamplingStep


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

    def put(self, x: Tensor) -> None:
        """Goes on from another state."""
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
        dynamic_threshold: the quantile of |x0_hat| to which it is clipped and by which it is scaled; see `threshold`.
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
        dynamic_threshold: float | None = None,
        model_kwargs: ModelArguments | None = None,
    ) -> None:
        self._denoiser, self._source = in_evaluation(denoiser), source
        self._first, self._last = start_step, len(table) - 1
        model_kwargs = dict(model_kwargs or {})
        kind = {
            "keyed": source.keyed,
            "noisy": bool((table.sigma[start_step:] > 0).any()),
            "multistep": bool((table.C != 0).any()),
            "learned": table.log_bounds is not None,
            "with_x_start": with_x_start,
            "dynamic_threshold": dynamic_threshold,
        }

        def step_of(capacity: int) -> SamplingStep:
            return SamplingStep(self._denoiser, x, capacity, **kind, model_kwargs=model_kwargs)

        def load(step: SamplingStep) -> None:
            step.load(self._denoiser, x, table, source, start_step, model_kwargs)

        self._graph = None
        if cuda_graph.enabled(x) and len(table) - start_step > cuda_graph.WARM_UP:
            capacity = max(len(table), denoiser.num_timesteps)  # one graph for any number of steps
            form = (x.shape, x.stride(), x.dtype, x.device, capacity, *kind.values())
            self._graph = kept_graph(
                self, denoiser.model, self._denoiser, lambda: step_of(capacity), load, form, model_kwargs
            )
        if self._graph is not None:
            self._step = self._graph.step
        else:
            self._step = step_of(len(table))
            load(self._step)
        self.x, self.x_start = self._step.x, self._step.x_start

    @torch.no_grad()
    def step(self, k: int) -> None:
        """Takes step k of the table; the steps come in their order."""
        conditioned = self._denoiser.self_condition and k > self._first
        noise = None
        # Other packages draw for every step but the last, whatever its sigma.
        if not self._source.keyed and k < self._last:
            noise = self._source.draw(k + 1, self.x.shape)
        if self._graph is None:
            self._step.take(self._denoiser, k, noise, conditioned=conditioned)
        elif conditioned == self._denoiser.self_condition:
            if noise is not None:
                self._step.give_noise(noise)
            self._graph.replay()
        else:  # a network that is not given an x0_hat yet
            self._step.take(self._denoiser, k, noise, conditioned=False)
            self._step.index.add_(1)

    def put(self, x: Tensor) -> None:
        """Goes on from another state."""
        self._step.put(x)


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
        if table.log_bounds is not None and not by_p_sample:
            raise ValueError(
                "ancestral steps of a learned variance go through p_sample, for all timesteps; for fewer of them, with "
                "model_predictions overridden, take another sampler"
            )
        own = torch.stack(x_start_rows(denoiser.schedule, denoiser.objective), dim=1)[table.t]
        if not torch.allclose(table.rows[:, :2], own):
            raise ValueError(
                "a StepTable with u and w of its own, as a fitted one, says how x_0 follows from a prediction, as the "
                "methods do that a class overrides; take another sampler, or a GaussianDiffusion around the network"
            )

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

    def put(self, x: Tensor) -> None:
        self.x = x

    def _by_predictions(self, k: int, t: int, x_self_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        x, times = self.x, torch.full((len(self.x),), t, device=self.x.device)
        eps, x_start = self._denoiser.model_predictions(
            x, times, x_self_cond, clip_x_start=self._clips, rederive_pred_noise=True, **self._further
        )[:2]
        A, B, C, sigma = self._table.rows[k, 2:6].tolist()
        schedule = self._denoiser.schedule
        a, s = (v[t].item() for v in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod))
        x_next = (B + A * a) * x_start + A * s * eps
        if C:
            x_next = x_next + C * self.x_start
        if k + 1 < len(self._table) and (sigma > 0 or not self._source.keyed):
            x_next = x_next + sigma * self._source.draw(k + 1, x.shape)
        return x_next, x_start
