r"""Training and sampling: the module people use.

One image's way through training: [0, 1] -> [-1, 1], t and eps are drawn, x_t = a x_0 + s eps, the network
predicts, the weighted error is the loss. Through sampling: x_T is drawn, then network and step by turns, then [-1, 1]
-> [0, 1]. The arithmetic is in `ops`, the coefficients come from `schedules`, `parameterization` and `samplers`.
"""

__all__ = ["GaussianDiffusion", "ModelPrediction", "SampleState"]

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checks, ops, samplers, schedules
from . import noise as noises
from .nn.unet import UNet
from .parameterization import loss_weight as make_loss_weight
from .process import DiffusionProcess
from .sampling import SamplingRun
from .schedules import NoiseSchedule

RNGS = ("philox", "torch")
SAMPLERS = tuple(samplers.SAMPLERS)


class ModelPrediction(NamedTuple):
    pred_noise: Tensor
    pred_x_start: Tensor


class SampleState(NamedTuple):
    """A state of a sampling run.

    `step` steps have been taken; `t` is the timestep whose noise `x` holds, -1 for the finished sample. `x` is in
    the range of `sample`; `x_start` is the clipped x0_hat of the last step in that range, None before the first.
    """

    step: int
    t: int
    x: Tensor
    x_start: Tensor | None


class GaussianDiffusion(DiffusionProcess):
    """Denoising diffusion around a network. Ho et al. (2020).

    `forward` takes and `sample` gives values in [0, 1]; all other methods work in [-1, 1], the range of the network.
    Timesteps count from 0.

    Args:
        model: called as `model(x, t)` with x (N, C, ...) in [-1, 1] and t (N,) int64; returns the shape of x.
            Where it has `self_condition = True`, as `model(x, t, x_self_cond)`.
        image_size: H = W, or the sizes of all axes after the channels: (H, W), (L,), or () for (N, D) data.
        timesteps: T. A `beta_schedule` given as numbers has its own.
        sampling_timesteps: steps of `sample` where it is given none; fewer than T select DDIM.
        objective: what the network predicts: pred_noise, pred_x0, pred_v or pred_mean.
        beta_schedule: a name of `schedules.make`, a `NoiseSchedule`, or T betas.
        schedule_fn_kwargs: arguments of the named schedule.
        variance: sigma^2 of ancestral steps: posterior or beta.
        clip_denoised: bounds of x0_hat in sampling: True for (-1, 1), False for none, or (low, high).
        loss_type: l2, l1 or huber.
        loss_weight: simple, snr, min_snr, vlb, or T numbers: see `parameterization.loss_weight`. The default
            weighs every objective as L_simple of the paper.
        min_snr_loss_weight: the same as loss_weight="min_snr".
        min_snr_gamma: the bound of min_snr.
        ddim_sampling_eta: eta of DDIM steps where `sample` is given none.
        auto_normalize: map [0, 1] to [-1, 1] and back. False: data is taken as it is, in any range.
        offset_noise_strength: adds noise that is constant over a channel in training.
        immiscible: pairs the images of a batch with near noise in training. Li et al. (2024).
        channels: C; by default `model.channels`.
        sampler: the sampler that `sample` takes by default, a name of `samplers.SAMPLERS`; None: see `sample`.
        rng: philox: noise by `noise.gaussian`; torch: by torch.randn, in denoising_diffusion_pytorch's order.

    Raises:
        ValueError: an unknown name, betas outside (0, 1), or sizes that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str | NoiseSchedule | Tensor | Sequence[float] = "sigmoid",
        schedule_fn_kwargs: Mapping[str, float] | None = None,
        variance: str = "posterior",
        clip_denoised: bool | tuple[float, float] = True,
        loss_type: str = "l2",
        loss_weight: str | Tensor | Sequence[float] = "snr",
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5.0,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        immiscible: bool = False,
        channels: int | None = None,
        rng: str = "philox",
        sampler: str | None = None,
    ) -> None:
        if isinstance(beta_schedule, str):
            schedule = schedules.make(beta_schedule, timesteps, **(schedule_fn_kwargs or {}))
        elif isinstance(beta_schedule, NoiseSchedule):
            schedule = beta_schedule
        else:
            schedule = NoiseSchedule(beta_schedule, name="beta_schedule")
        if min_snr_loss_weight and loss_weight not in ("snr", "min_snr"):
            raise ValueError(f"min_snr_loss_weight=True is loss_weight='min_snr'; got loss_weight={loss_weight!r} too")
        weight = make_loss_weight(
            schedule,
            objective,
            "min_snr" if min_snr_loss_weight else loss_weight,
            variance_kind=variance,
            min_snr_gamma=min_snr_gamma,
        )
        super().__init__(schedule, objective, variance, weight)

        self.model = model
        self.channels = getattr(model, "channels", None) if channels is None else channels
        if self.channels is None:
            raise ValueError("the model has no attribute `channels`; pass channels= to GaussianDiffusion")
        self.channels = checks.whole("channels", self.channels, 1)
        sizes = (image_size, image_size) if hasattr(image_size, "__index__") else tuple(image_size)
        self.image_size = tuple(checks.whole("image_size", size, 1) for size in sizes)
        self.self_condition = getattr(model, "self_condition", False)

        self.sampling_timesteps = self.num_timesteps if sampling_timesteps is None else sampling_timesteps
        self.is_ddim_sampling = self.sampling_timesteps < self.num_timesteps
        if loss_type not in ops.LOSS_TYPES:
            raise ValueError(f"unknown loss_type {loss_type!r}; there are {', '.join(ops.LOSS_TYPES)}")
        if rng not in RNGS:
            raise ValueError(f"unknown rng {rng!r}; there are {', '.join(RNGS)}")
        _bounds(clip_denoised)
        self.clip_denoised = clip_denoised
        self.loss_type = loss_type
        self.ddim_sampling_eta = ddim_sampling_eta
        samplers.ddim(schedule, objective, self.sampling_timesteps, eta=ddim_sampling_eta)  # raises what cannot be
        self.auto_normalize = auto_normalize
        self.offset_noise_strength = offset_noise_strength
        self.immiscible = immiscible
        if sampler is not None and sampler not in samplers.SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(samplers.SAMPLERS)}")
        self.sampler = sampler
        self.rng = rng

    # The network

    def _model_dtype(self, x: Tensor) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype)

    def _model_output(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, **more: Tensor) -> Tensor:
        condition = (x_self_cond,) if self.self_condition else ()
        pred = self.model(x.to(self._model_dtype(x)), t, *condition, **more)
        if pred.shape != x.shape:
            raise ValueError(
                f"the model must return the shape of its input, {tuple(x.shape)}; it returned {tuple(pred.shape)}"
            )
        return pred

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """What the network's output says of eps and x_0.

        Args:
            clip_x_start: clip x_0 to the bounds of `clip_denoised`, (-1, 1) where it has none.
            rederive_pred_noise: find eps again from the clipped x_0, for pred_noise too.
        """
        checks.timesteps(t, len(x), self.num_timesteps)
        pred = self._model_output(x, t, x_self_cond).to(x.dtype)
        u, w = self._at(self.x_start_rows, t, x)
        x_start = u * x + w * pred
        if clip_x_start:
            x_start = x_start.clamp(*(_bounds(self.clip_denoised) or (-1.0, 1.0)))
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(pred, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool | tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the x_0 they follow from.

        Args:
            clip_denoised: None for the module's own.
        """
        x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
        bounds = _bounds(self.clip_denoised if clip_denoised is None else clip_denoised)
        if bounds is not None:
            x_start = x_start.clamp(*bounds)
        mean, _, _ = self.q_posterior(x_start, x, t)
        variance, log_variance = self._at(self.variance_rows, t, x)
        return mean, variance, log_variance, x_start

    # Training

    def normalize(self, img: Tensor) -> Tensor:
        """[0, 1], or uint8, to [-1, 1]; in its own range without auto_normalize. float32."""
        x = img.to(self.betas.dtype)
        if img.dtype == torch.uint8:
            return x * (2 / 255) - 1
        return x * 2 - 1 if self.auto_normalize else x

    def unnormalize(self, x: Tensor) -> Tensor:
        """[-1, 1] to [0, 1]; as it is without auto_normalize."""
        return (x + 1) * 0.5 if self.auto_normalize else x

    def random_times(self, batch_size: int) -> Tensor:
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """x_t = a_t x_0 + s_t eps. Ho et al. (2020), eq. 4.

        Args:
            x_start: x_0, (N, ...); floating, or uint8, mapped to [-1, 1].
            t: (N,), int64, in [0, T).
            noise: eps, the shape of x_start; drawn as stream 0 of `seed` if None.
        """
        self._check_start(x_start, t, noise)
        given = {"noise": noise}
        if noise is None:
            given = _noise(self._source(x_start, seed, sample_offset), 0, x_start.shape)
        return ops.q_sample(x_start, t, self.q_sample_rows, **given)

    def _check_start(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> None:
        checks.pixels("x_start", x_start)
        checks.timesteps(t, len(x_start), self.num_timesteps)
        if noise is not None and noise.shape != x_start.shape:
            raise ValueError(f"noise must have the shape of x_start, {tuple(x_start.shape)}; got {tuple(noise.shape)}")

    def _source(self, like: Tensor, seed: int | torch.Generator | None, sample_offset: int) -> noises.Source:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return noises.Source(self.rng, seed=seed, sample_offset=sample_offset, device=like.device, dtype=dtype)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        *,
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """The weighted loss of predictions at the timesteps t.

        Args:
            x_start: x_0, (N, C, ...); floating in [-1, 1], or uint8, which the ops scale where they read it.
            t: (N,), int64, in [0, T).
            noise: eps; drawn as stream 0 of `seed` if None.
            offset_noise_strength: None for the module's own.
            loss_reduction: mean, or none for the loss of each sample, (N,).
        """
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be mean or none, got {loss_reduction!r}")
        self._check_start(x_start, t, noise)
        source = self._source(x_start, seed, sample_offset)
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if noise is None and (strength or self.immiscible):
            noise = source.draw(0, x_start.shape)
        if strength:
            offset = source.draw(noises.OFFSET, x_start.shape[:2])
            noise = noise + strength * offset.view(*offset.shape, *[1] * (x_start.ndim - 2))
        if self.immiscible:
            noise = noise[_nearest_assignment(x_start, noise)]
        # Otherwise eps is made twice from its keys, here and for the loss, and never stored.
        eps = _noise(source, 0, x_start.shape) if noise is None else {"noise": noise}
        dtype = None if self.self_condition else self._model_dtype(x_start)
        x = ops.q_sample(x_start, t, self.q_sample_rows, dtype=dtype, **eps)

        x_self_cond = None
        if self.self_condition and torch.rand(()) < 0.5:  # half of the time, as Chen et al. (2022), sec. 3
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start

        pred = self._model_output(x, t, x_self_cond)
        if self.objective == "pred_noise":
            x_start = None  # its p is 0
        elif self.objective == "pred_x0":
            eps = {}
        return ops.weighted_loss(
            pred, t, self.loss_rows, x_start=x_start, loss_type=self.loss_type, reduction=loss_reduction, **eps
        )

    def forward(
        self,
        img: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        *,
        times: Tensor | None = None,
        loss_reduction: str = "mean",
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """The training loss of a batch.

        Args:
            img: (N, C, *image_size); floating in [0, 1], or uint8.
            noise: eps; drawn if None.
            times: (N,), int64; drawn uniformly from [0, T) if None.
            loss_reduction: mean, or none for the loss of each sample, (N,).
            seed: of the noise; None draws one from PyTorch's default generator.
            sample_offset: index of the first image in the whole (global) batch.

        Returns:
            The loss, float32.
        """
        checks.images(img, (self.channels, *self.image_size), unit_range=self.auto_normalize)
        times = self.random_times(len(img)) if times is None else times
        memory_format = ops.channels_last_format(img.ndim)
        if memory_format is not None:
            img = img.contiguous(memory_format=memory_format)
        if img.dtype != torch.uint8 or self.betas.dtype != torch.float32 or self.immiscible:
            img = self.normalize(img)
        return self.p_losses(
            img, times, noise, offset_noise_strength, loss_reduction, seed=seed, sample_offset=sample_offset
        )

    # Sampling

    def step_table(
        self, sampler: str | None = None, steps: int | Sequence[int] | None = None, eta: float | None = None
    ) -> samplers.StepTable:
        """The coefficients of a sampling run; the arguments of `sample`."""
        fewer = "ddim" if steps is None or eta is not None else "dpmpp_2m"
        steps = self.sampling_timesteps if steps is None else steps
        sampler = self.sampler if sampler is None else sampler
        if sampler is None:
            taken = len(samplers.strided_timesteps(self.num_timesteps, steps))
            sampler = fewer if taken < self.num_timesteps else "ddpm"
        if sampler == "ddim":
            eta = self.ddim_sampling_eta if eta is None else eta
            return samplers.ddim(self.schedule, self.objective, steps, eta=eta)
        if sampler not in samplers.SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(samplers.SAMPLERS)}")
        if eta:
            raise ValueError(f"eta is of sampler='ddim', this run takes {sampler!r}; got eta={eta}")
        if sampler == "ddpm":
            return samplers.ancestral(self.schedule, self.objective, steps, variance=self.variance)
        return samplers.SAMPLERS[sampler](self.schedule, self.objective, steps)

    @torch.inference_mode()
    def _reverse(
        self,
        x: Tensor,
        table: samplers.StepTable,
        source: noises.Source,
        *,
        taken: int = 0,
        with_x_start: bool = False,
        progress: bool = False,
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields (steps taken, x, x0_hat) in [-1, 1], the state before the first step first.

        All steps work in place, so the next one changes what was yielded.

        `taken`: steps of the table that lie behind x. `with_x_start`: x0_hat is wanted.
        """

        def predict(x: Tensor, t: Tensor, guess: Tensor | None, time_row: Tensor | None) -> Tensor:
            of_step = {} if time_row is None else {"time_row": time_row}
            with _evaluating(self.model):  # each time: between two states, others may use the model
                return self._model_output(x, t, guess, **of_step)

        run = SamplingRun(
            predict,
            x,
            table,
            source,
            taken=taken,
            dtype=self._model_dtype(x),
            clip=_bounds(self.clip_denoised),
            with_x_start=with_x_start,
            self_condition=self.self_condition,
            time_rows=self.model.time_rows(table.t.to(self.device)) if isinstance(self.model, UNet) else None,
        )
        yield taken, run.x, None
        for k in tqdm(range(taken, len(table)), "sampling", disable=not progress, unit="step"):
            run.step(k)
            yield k + 1, run.x, run.x_start

    def _run(
        self,
        shape: Sequence[int],
        *,
        every: int | None = None,
        sampler: str | None = None,
        steps: int | Sequence[int] | None = None,
        eta: float | None = None,
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
        noise: Tensor | None = None,
        with_x_start: bool = False,
        progress: bool = False,
    ) -> Iterator[SampleState]:
        """The states 0, every, 2 every ... and the last (None: the last alone) of a run, in the range of `sample`."""
        shape = tuple(checks.whole("batch_size and every size", size, 1) for size in shape)
        table = self.step_table(sampler, steps, eta)
        source = self._source(self.betas, seed, sample_offset)
        if noise is None:
            noise = source.draw(0, shape)
        elif noise.shape != torch.Size(shape):
            raise ValueError(f"noise is x_T and must have the shape {tuple(shape)}; got {tuple(noise.shape)}")
        names = [*table.t.tolist(), -1]

        def mine(x: Tensor | None) -> Tensor | None:  # the run goes on in x
            return None if x is None else self.unnormalize(x) if self.auto_normalize else x.clone()

        states = self._reverse(noise.to(self.betas), table, source, with_x_start=with_x_start, progress=progress)
        return (
            SampleState(step, names[step], mine(x), mine(x_start))
            for step, x, x_start in states
            if step == len(table) or (every and step % every == 0)
        )

    def _finish(self, shape: Sequence[int], return_all_timesteps: bool, **run: Any) -> Tensor:
        if return_all_timesteps:
            return torch.stack([state.x for state in self._run(shape, every=1, **run)], dim=1)
        (last,) = self._run(shape, **run)
        return last.x

    def sample(
        self,
        batch_size: int = 16,
        *,
        sampler: str | None = None,
        steps: int | Sequence[int] | None = None,
        eta: float | None = None,
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
        noise: Tensor | None = None,
        return_all_timesteps: bool = False,
        progress: bool = False,
    ) -> Tensor:
        """Samples images.

        Args:
            batch_size: N.
            sampler: ddpm (ancestral; Ho et al. 2020, algorithm 2), ddim (Song et al. 2021), dpmpp_2m
                (DPM-Solver++(2M); Lu et al. 2022, algorithm 2) or dpmpp_2m_sde (its form with noise).
                None takes ddpm for all T steps. For fewer it takes ddim where the module's `sampling_timesteps` says
                so, as denoising_diffusion_pytorch does, or where eta is given; and for `steps` given here dpmpp_2m,
                which solves the equation of DDIM to second order.
            steps: how many, or the timesteps themselves; None for `sampling_timesteps`. They stride evenly over the
                schedule, those of dpmpp_2m and dpmpp_2m_sde as in `samplers.karras_timesteps`.
            eta: noise of DDIM, from 0 (none) to 1 (as much as ancestral); None for `ddim_sampling_eta`.
            seed: with rng="philox", sample n of the run is the same in any batch; None draws a seed.
            sample_offset: index in the run of the first sample.
            noise: x_T, (N, C, *image_size), instead of stream 0.
            return_all_timesteps: all states, x_T first.
            progress: show a bar.

        Returns:
            (N, C, *image_size), or (N, steps + 1, C, *image_size), float32, in [0, 1] (x_T and the states between
            reach further).
        """
        return self._finish(
            (batch_size, self.channels, *self.image_size),
            return_all_timesteps,
            sampler=sampler,
            steps=steps,
            eta=eta,
            seed=seed,
            sample_offset=sample_offset,
            noise=noise,
            progress=progress,
        )

    def sample_progressive(self, batch_size: int = 16, *, every: int = 1, **run: Any) -> Iterator[SampleState]:
        """Samples as `sample` with the arguments `run`, yielding every k-th state and holding no other.

        Args:
            every: k; the states 0, k, 2k, ... and the last are yielded.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        return self._run((batch_size, self.channels, *self.image_size), every=every, with_x_start=True, **run)

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False, **run: Any) -> Tensor:
        """Ancestral sampling of a (N, C, ...) shape over all T steps, or as the arguments of `sample` say."""
        run = {"steps": self.num_timesteps, "sampler": "ddpm"} | run
        return self._finish(shape, return_all_timesteps, **run)

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False, **run: Any) -> Tensor:
        """DDIM sampling of a (N, C, ...) shape over `sampling_timesteps`, or as the arguments of `sample` say."""
        return self._finish(shape, return_all_timesteps, **({"sampler": "ddim"} | run))

    @torch.inference_mode()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One ancestral step of the full chain, from x_t to x_{t-1}, in [-1, 1].

        Args:
            x: x_t, (N, C, ...).
            t: in [0, T).
            noise: z, the shape of x; drawn as stream T - t of `seed` if None, as `sample` does.

        Returns:
            (x_{t-1}, clipped x0_hat).
        """
        t = checks.whole("t", t, 0, self.num_timesteps)
        k = self.num_timesteps - 1 - t
        given = {"noise": noise}
        if noise is None and t > 0:
            given = _noise(self._source(x, seed, sample_offset), k + 1, x.shape)
        pred = self._model_output(x, torch.full((len(x),), t, device=x.device), x_self_cond)
        x, x_start, _ = ops.reverse_step(
            x,
            pred,
            torch.tensor(k, device=x.device),
            self.ancestral_rows,
            clip=_bounds(self.clip_denoised),
            return_x_start=True,
            **(given if t > 0 else {}),
        )
        return x, x_start

    def interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None = None,
        lam: float = 0.5,
        *,
        seed: int | torch.Generator | None = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """Images between two. Ho et al. (2020), sec. 4.3: mixed at x_t, then denoised from there.

        Args:
            x1, x2: (N, C, ...), in [-1, 1].
            t: the timestep at which they are mixed, in [0, T); None for T - 1.
            lam: 0 gives x1, 1 gives x2.

        Returns:
            The shape of x1, in [-1, 1].
        """
        t = checks.whole("t", self.num_timesteps - 1 if t is None else t, 0, self.num_timesteps)
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have one shape; got {tuple(x1.shape)} and {tuple(x2.shape)}")
        checks.floating("x1", x1)
        source = self._source(x1, seed, sample_offset)
        times = torch.full((len(x1),), t, device=x1.device)
        x1_t = self.q_sample(x1, times, source.draw(0, x1.shape))
        x2_t = self.q_sample(x2, times, source.draw(noises.SECOND_IMAGE, x2.shape))
        table = self.step_table("ddpm", self.num_timesteps)
        taken = self.num_timesteps - 1 - t
        *_, (_, x, _) = self._reverse((1 - lam) * x1_t + lam * x2_t, table, source, taken=taken)
        return x


def _noise(source: noises.Source, stream: int, shape: Sequence[int]) -> dict[str, Tensor]:
    """A stream's noise as the ops' argument: keys where there are any, or drawn."""
    if source.keyed:
        return {"keys": source.keys(shape[0], stream)}
    return {"noise": source.draw(stream, shape)}


def _bounds(clip_denoised: bool | tuple[float, float]) -> tuple[float, float] | None:
    if isinstance(clip_denoised, bool):
        return (-1.0, 1.0) if clip_denoised else None
    low, high = clip_denoised
    if not low < high:
        raise ValueError(f"clip_denoised must be True, False or (low, high) with low < high; got {clip_denoised}")
    return float(low), float(high)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every submodule as it was afterwards: no dropout while sampling amid training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _nearest_assignment(x_start: Tensor, noise: Tensor) -> Tensor:
    """The order of noise that lies nearest to the images, on the whole."""
    from scipy.optimize import linear_sum_assignment  # comes with ddpm_fast[train]

    distance = torch.cdist(x_start.flatten(1).float(), noise.flatten(1).float())
    return torch.from_numpy(linear_sum_assignment(distance.cpu().numpy())[1]).to(noise.device)
