r"""The reverse process: sampling, from noise to images.

x_T is drawn, network and step take turns, and the result is mapped from [-1, 1] back to [0, 1].
"""

__all__ = ["ReverseProcess", "SampleState"]

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checks, ops, samplers
from .denoiser import Denoiser, ModelArguments, clip_bounds, if_any
from .noise import NoiseSource
from .process import Seed, drawing_from
from .samplers import StepTable
from .sampling_run import MethodRun, Run, SamplingRun
from .schedules import NoiseSchedule


class SampleState(NamedTuple):
    """A state of a sampling run.

    `step` steps have been taken; `t` is the timestep whose noise `x` holds, -1 for the finished sample. `x` is in
    the range of `sample`; `x_start` is the clipped x0_hat of the last step in that range, None before the first.
    """

    step: int
    t: int
    x: Tensor
    x_start: Tensor | None


class ReverseProcess(Denoiser):
    """A denoiser that samples.

    Args:
        model, schedule, objective, variance, loss_weight, clip_denoised, rng, decoder: see `Denoiser`.
        shape: of a sample, (C, ...).
        sampler, sampling_timesteps, spacing, ddim_sampling_eta: what `sample` takes where it is given none.
        auto_normalize: samples are mapped from [-1, 1] to [0, 1].

    Attributes:
        fitted: the tables for `sampler="fitted"` by their number of steps: those of a run that was loaded, or yours.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        objective: str,
        variance: str,
        loss_weight: Tensor,
        clip_denoised: bool | tuple[float, float],
        rng: str,
        decoder: str,
        *,
        shape: tuple[int, ...],
        sampler: str | None,
        sampling_timesteps: int | None,
        spacing: str | None,
        ddim_sampling_eta: float,
        auto_normalize: bool,
    ) -> None:
        super().__init__(model, schedule, objective, variance, loss_weight, clip_denoised, rng, decoder)
        self.channels, *self.image_size = shape
        self.image_size = tuple(self.image_size)
        steps = self.num_timesteps if sampling_timesteps is None else sampling_timesteps
        self.sampling_timesteps = checks.integer("sampling_timesteps", steps, 1, self.num_timesteps + 1)
        self.is_ddim_sampling = self.sampling_timesteps < self.num_timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        samplers.ddim(schedule, objective, self.sampling_timesteps, eta=ddim_sampling_eta)  # validates eta
        self.sampler, self.spacing = sampler, spacing
        self.fitted: Mapping[int, StepTable] = {}
        self.step_table()  # validates the sampler and the spacing
        self.auto_normalize = auto_normalize

    # Methods of denoising_diffusion_pytorch that call others of its methods, and that subclasses override.
    CALLED_BY_MODEL_PREDICTIONS = ("predict_start_from_noise", "predict_noise_from_start", "predict_start_from_v")
    CALLED_BY_DDIM_SAMPLE = ("model_predictions", *CALLED_BY_MODEL_PREDICTIONS)
    CALLED_BY_P_SAMPLE = ("p_sample", "p_mean_variance", "q_posterior", *CALLED_BY_DDIM_SAMPLE)

    def normalize(self, img: Tensor) -> Tensor:
        """[0, 1], or uint8, to [-1, 1]; floating images as they are without auto_normalize. float32."""
        checks.pixels("img", img)
        x = img.to(self.betas.dtype)
        if img.dtype == torch.uint8:
            return x * (2 / 255) - 1
        return x * 2 - 1 if self.auto_normalize else x

    def unnormalize(self, x: Tensor) -> Tensor:
        """[-1, 1] to [0, 1]; as it is without auto_normalize."""
        return (x + 1) * 0.5 if self.auto_normalize else x

    def step_table(
        self,
        sampler: str | StepTable | None = None,
        steps: int | Sequence[int] | None = None,
        eta: float | None = None,
        spacing: str | None = None,
    ) -> StepTable:
        """The coefficients of a sampling run; the arguments are those of `sample`."""
        if sampler == "fitted":
            sampler, steps = samplers.find(self.fitted, self.sampling_timesteps if steps is None else steps), None
        if isinstance(sampler, StepTable):
            if steps is not None or eta is not None or spacing is not None:
                raise ValueError("a StepTable has its steps, their spacing and its eta; give it alone")
            samplers.check_table(sampler, self.schedule, self.objective, clip_bounds(self.clip_denoised))
            return sampler
        sampler = self.sampler_name(sampler, steps, eta)
        steps = self.sampling_timesteps if steps is None else steps
        if spacing is None and samplers.is_count(steps):
            spacing = self.spacing
        function = samplers.SAMPLERS[checks.choice("sampler", sampler, samplers.SAMPLERS)]
        own = {"eta": self.ddim_sampling_eta if eta is None else eta, "variance": self.ancestral_variance()}
        wanted = inspect.signature(function).parameters
        chosen = {name: value for name, value in own.items() if name in wanted}
        if "eta" not in wanted and eta:
            chosen["eta"] = eta  # an error that says what the sampler takes
        return samplers.make(sampler, self.schedule, self.objective, steps, spacing=spacing, **chosen)

    def sampler_name(self, sampler: str | None, steps: int | Sequence[int] | None, eta: float | None) -> str:
        """The sampler that `sample` takes."""
        sampler = self.sampler if sampler is None else sampler
        if sampler is not None:
            return sampler
        visited = self.sampling_timesteps if steps is None else steps
        if len(samplers.strided_timesteps(self.num_timesteps, visited)) == self.num_timesteps:
            return "ddpm"
        return "ddim" if steps is None or eta is not None else "dpmpp_2m"

    def _last_steps(
        self,
        strength: float,
        sampler: str | StepTable | None,
        steps: int | Sequence[int] | None,
        eta: float | None,
        spacing: str | None,
    ) -> StepTable:
        """A table of the last `strength` of the timesteps that `step_table` visits, which begins as a run does."""
        if not (isinstance(strength, int | float) and 0 < strength <= 1):
            raise ValueError(f"strength is the share of the steps to take, above 0 and up to 1; got {strength!r}")
        table = self.step_table(sampler, steps, eta, spacing)
        visited = table.t.unique().flip(0)  # heun calls the network twice at some
        kept = max(1, round(strength * len(visited)))
        if kept == len(visited):
            return table
        if isinstance(sampler, StepTable) or sampler == "fitted":
            raise ValueError(
                f"a StepTable is taken as a whole: give the steps you want, and strength=1; got {strength}"
            )
        return self.step_table(self.sampler_name(sampler, steps, eta), visited[-kept:], eta)

    def _whole_chain(self) -> Tensor:
        """The rows of ancestral sampling over all timesteps, (T, 6), with a learned variance (T, 8)."""
        if self.log_variance is None:
            return self.ancestral_rows
        table = samplers.ancestral(self.schedule, self.objective, variance=self.ancestral_variance())
        return table.rows.to(self.betas)

    def _start(
        self,
        x: Tensor,
        table: StepTable,
        source: NoiseSource,
        *,
        start_step: int = 0,
        with_x_start: bool = False,
        dynamic_threshold: float | None = None,
        model_kwargs: ModelArguments | None = None,
    ) -> Run:
        """A run from the state x before step `start_step`, in [-1, 1]."""
        ancestral = self._whole_chain()
        whole_chain = table.rows.shape == ancestral.shape and torch.equal(table.rows.to(ancestral), ancestral)
        how = {"start_step": start_step, "model_kwargs": model_kwargs}
        if self.overrides(*(self.CALLED_BY_P_SAMPLE if whole_chain else self.CALLED_BY_DDIM_SAMPLE)):
            if dynamic_threshold is not None:
                raise ValueError("dynamic_threshold needs the methods of GaussianDiffusion; a subclass changed some")
            return MethodRun(self, x, table, source, **how, by_p_sample=whole_chain)
        how |= {"with_x_start": with_x_start, "dynamic_threshold": dynamic_threshold}
        return SamplingRun(self, x, table, source, **how)

    @torch.no_grad()
    def _states(
        self,
        shape: Sequence[int],
        *,
        every: int | None = None,
        sampler: str | StepTable | None = None,
        steps: int | Sequence[int] | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        init: Tensor | None = None,
        strength: float | None = None,
        dynamic_threshold: float | None = None,
        seed: Seed = None,
        sample_offset: int = 0,
        noise: Tensor | None = None,
        model_kwargs: ModelArguments | None = None,
        with_x_start: bool = False,
        progress: bool = False,
    ) -> Iterator[SampleState]:
        """The states 0, every, 2 every ... and the last (None: the last alone) of a run, in the range of `sample`."""
        shape = checks.sample_shape(shape, self.channels, len(self.image_size))
        if (init is None) != (strength is None):
            raise ValueError("init (images to begin with) and strength (the share of the steps) need each other")
        if init is None:
            table = self.step_table(sampler, steps, eta, spacing)
        else:
            table = self._last_steps(strength, sampler, steps, eta, spacing)
        source = self.noise_source(self.betas, seed, sample_offset)
        if noise is None:
            noise = source.draw(0, shape)
        else:
            checks.shape("noise", noise, shape, "x_T")
            checks.require(noise.isfinite().all(), lambda: "noise holds NaN or inf")
        x = noise.to(self.betas)
        if init is not None:
            first = torch.full((len(init),), int(table.t[0]), device=self.device)
            x = self.q_sample(self._given(init), first, x)
        how = {"with_x_start": with_x_start, "dynamic_threshold": dynamic_threshold}
        run = self._start(x, table, source, **how, model_kwargs=model_kwargs)
        timesteps = [*table.t.tolist(), -1]

        def state(step: int) -> SampleState:
            x_start = None if step == 0 or run.x_start is None else self._result(run.x_start)
            return SampleState(step, timesteps[step], self._result(run.x), x_start)

        def states() -> Iterator[SampleState]:
            if every:
                yield state(0)
            for k in tqdm(range(len(table)), "sampling", disable=not progress, unit="step"):
                with drawing_from(source):
                    run.step(k)
                if k + 1 == len(table) or (every and (k + 1) % every == 0):
                    yield state(k + 1)

        return states()

    @torch.no_grad()
    def _result(self, x: Tensor) -> Tensor:
        """A tensor of its own, in the range of `sample`; the run goes on in x."""
        return self.unnormalize(x) if self.auto_normalize else x.clone()

    def _finish(self, shape: Sequence[int], return_all_timesteps: bool, **run: Any) -> Tensor:
        if return_all_timesteps:
            return torch.stack([state.x for state in self._states(shape, every=1, **run)], dim=1)
        (last,) = self._states(shape, **run)
        return last.x

    def _batch_shape(self, batch_size: int | None, init: Tensor | None) -> tuple[int, ...]:
        """The shape of the samples: 16 of them, or as many as there are in `init`."""
        if init is None:
            return 16 if batch_size is None else batch_size, self.channels, *self.image_size
        shape = self._checked(init)
        if batch_size not in (None, len(init)):
            raise ValueError(f"batch_size is that of init, {len(init)}, and may be left out; got {batch_size}")
        return shape

    def _checked(self, images: Tensor) -> tuple[int, ...]:
        """The shape of given images, whose form and range are validated."""
        bounds = clip_bounds(self.clip_denoised)
        checks.images(images, (self.channels, *self.image_size), unit_range=self.auto_normalize, bounds=bounds)
        return images.shape

    def _given(self, images: Tensor) -> Tensor:
        """Images in the range of the network, on its device and in the layout of noise, so that runs share a graph."""
        layout = ops.channels_last_format(images.ndim) if self.rng == "philox" else None
        return self.normalize(images.to(self.device)).contiguous(memory_format=layout or torch.contiguous_format)

    def sample(
        self,
        batch_size: int | None = None,
        return_all_timesteps: bool = False,
        *,
        sampler: str | StepTable | None = None,
        steps: int | Sequence[int] | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        init: Tensor | None = None,
        strength: float | None = None,
        dynamic_threshold: float | None = None,
        seed: Seed = None,
        sample_offset: int = 0,
        noise: Tensor | None = None,
        model_kwargs: ModelArguments | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples images.

        Args:
            batch_size: N; None for that of `init`, or 16.
            return_all_timesteps: all states, x_T first.
            sampler: a `StepTable`, or a name in `samplers.SAMPLERS`: ddpm (ancestral; Ho et al. 2020, algorithm 2),
                ddim (Song et al. 2021), dpmpp_2m (DPM-Solver++(2M); Lu et al. 2022, algorithm 2), dpmpp_2m_sde (its
                form with noise), unipc (Zhao et al. 2023) or heun (Karras et al. 2022, algorithm 1); or `fitted`,
                for one of the tables in `fitted`. None takes the module's `sampler`, or else ddpm for all T steps. For
                fewer it takes ddim if the module's `sampling_timesteps` says so, as denoising_diffusion_pytorch does,
                or if eta is given; and for `steps` given here dpmpp_2m, which solves the equation of DDIM to second
                order.
            steps: how many calls of the network, or the timesteps themselves; None for `sampling_timesteps`.
            eta: noise of DDIM, from 0 (none) to 1 (as much as ancestral); None for `ddim_sampling_eta`.
            spacing: of the timesteps, a name in `samplers.SPACINGS`; None for the module's `spacing`, or else the
                sampler's own: even for ddpm and ddim, karras for the others.
            init: images to begin with instead of noise, in the range of `sample` or uint8, (N, C, *image_size): they
                are noised to the first of the timesteps that are left of the run, by stream 0 of the noise. Meng et
                al. (2022), SDEdit.
            strength: with `init`, the share of the timesteps that are left: the last of them, rounded to the nearest
                number and at least one. 1 takes all; the less, the closer the results are to `init`.
            dynamic_threshold: a quantile of |x0_hat|, such as 0.995: each x0_hat is clipped to it and scaled back into
                the bounds of `clip_denoised` wherever it exceeds them. Saharia et al. (2022), sec. 2.3. None clips to
                the bounds.
            seed: with rng="philox", sample n of the run is the same in any batch; None draws a seed.
            sample_offset: index in the run of the first sample.
            noise: x_T, or with `init` the noise that is added to it, (N, C, *image_size), instead of stream 0.
            model_kwargs: further arguments of the network, such as {"class_labels": labels}.
            progress: show a bar.

        Returns:
            (N, C, *image_size), or (N, steps + 1, C, *image_size), float32, in [0, 1]; x_T and intermediate states may
            leave [0, 1].

        Raises:
            ValueError: an unknown sampler or spacing, steps, eta, strength, threshold or seed that cannot be, or noise
                or images of another shape.
        """
        shape = self._batch_shape(batch_size, init)
        run = {"sampler": sampler, "steps": steps, "eta": eta, "noise": noise, "model_kwargs": model_kwargs}
        further = {"spacing": spacing, "init": init, "strength": strength, "dynamic_threshold": dynamic_threshold}
        chosen = (sampler, steps, eta, self.sampler, *further.values())
        defaults = all(value is None for value in chosen)
        loop = "ddim_sample" if self.is_ddim_sampling else "p_sample_loop"
        if defaults and self.overrides(loop):
            given = {name: value for name, value in run.items() if value is not None}
            if progress:
                given["progress"] = True
            with drawing_from(self.noise_source(self.betas, seed, sample_offset)):
                return getattr(self, loop)(shape, return_all_timesteps=return_all_timesteps, **given)
        run |= further | {"seed": seed, "sample_offset": sample_offset, "progress": progress}
        return self._finish(shape, return_all_timesteps, **run)

    def sample_progressive(self, batch_size: int | None = None, *, every: int = 1, **run: Any) -> Iterator[SampleState]:
        """Samples as `sample` with the arguments `run`, yielding every k-th state and holding no other.

        Args:
            every: k; the states 0, k, 2k, ... and the last are yielded.
        """
        every = checks.integer("every", every, 1)
        return self._states(self._batch_shape(batch_size, run.get("init")), every=every, with_x_start=True, **run)

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False, **run: Any) -> Tensor:
        """Ancestral sampling of a (N, C, ...) shape over all T steps, or as the arguments of `sample` say."""
        run = {"steps": self.num_timesteps, "sampler": "ddpm"} | run
        return self._finish(shape, return_all_timesteps, **run)

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False, **run: Any) -> Tensor:
        """DDIM sampling of a (N, C, ...) shape over `sampling_timesteps`, or as the arguments of `sample` say."""
        return self._finish(shape, return_all_timesteps, **({"sampler": "ddim"} | run))

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        seed: Seed = None,
        sample_offset: int = 0,
        model_kwargs: ModelArguments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One ancestral step of the whole chain, from x_t to x_{t-1}, in [-1, 1].

        Args:
            x: x_t, (N, C, ...).
            t: in [0, T).
            noise: z, the shape of x; drawn as stream T - t of `seed` if None, as `sample` does.

        Returns:
            (x_{t-1}, clipped x0_hat).
        """
        t = checks.integer("t", t, 0, self.num_timesteps)
        checks.floating("x", x)
        checks.shape("noise", x if noise is None else noise, x.shape, "x")
        stream = self.num_timesteps - t
        source = self.noise_source(x, seed, sample_offset)
        times = torch.full((x.shape[0],), t, device=x.device)
        if self.overrides(*self.CALLED_BY_P_SAMPLE[1:]):
            mean, _, log_variance, x_start, *_ = self.p_mean_variance(
                x=x, t=times, x_self_cond=x_self_cond, clip_denoised=self.clip_denoised, **if_any(model_kwargs)
            )
            if t == 0:
                return mean, x_start
            z = source.draw(stream, x.shape) if noise is None else noise
            return mean + (0.5 * log_variance).exp() * z, x_start
        z = {} if t == 0 else {"noise": noise}
        if t > 0 and noise is None and source.keyed:
            z = source.arguments(stream, x.shape)
        pred, v = self.predict(x, times, x_self_cond, model_kwargs)
        if t > 0 and noise is None and not source.keyed:
            z = source.arguments(stream, x.shape)  # after the network, as other packages draw it
        x, x_start, _ = ops.reverse_step(
            x,
            pred,
            torch.tensor(self.num_timesteps - 1 - t, device=x.device),
            self._whole_chain(),
            variance=v,
            clip=clip_bounds(self.clip_denoised),
            return_x_start=True,
            **z,
        )
        return x, x_start
