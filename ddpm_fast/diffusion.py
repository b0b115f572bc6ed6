r"""Training and sampling: the module people use.

In training, an image is mapped from [0, 1] to [-1, 1], t and eps are drawn, x_t = a x_0 + s eps, the network predicts,
and the weighted error is the loss. The arithmetic is in `ops`; the coefficients come from `schedules`,
`parameterization` and `samplers`.

The class is built up downwards: `DiffusionProcess` has the tables and closed forms, `Denoiser` adds the network,
`ReverseProcess` sampling, `ImageEditing` sampling from given images, and `GaussianDiffusion` the loss.
"""

__all__ = ["GaussianDiffusion"]

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, likelihood, ops, schedules, variances
from .denoiser import ModelArguments, Prediction, clip_bounds, if_any
from .image_editing import ImageEditing
from .likelihood import Likelihood
from .loss_weights import loss_weight as make_loss_weight
from .noise import OFFSET, NoiseSource
from .process import Seed, drawing_from
from .schedules import NoiseSchedule

LOSS_TYPES = (*ops.LOSS_TYPES, "hybrid", "kl")


class GaussianDiffusion(ImageEditing):
    """Denoising diffusion around a network. Ho et al. (2020).

    `forward` takes and `sample` gives values in [0, 1]; all other methods work in [-1, 1], the range of the network.
    Timesteps count from 0. Methods that a subclass overrides are called where denoising_diffusion_pytorch calls them,
    and the fused path is taken where there is no override.

    Args:
        model: called as `model(x, t)` with x (N, C, ...) in [-1, 1] and t (N,) int64, or as `model(x, t, x_self_cond)`
            where it has `self_condition = True`, and with `model_kwargs`. It returns the shape of x: a tensor, a tuple
            that begins with one, or an object with an attribute `sample`.
        image_size: H = W, or the sizes of all axes after the channels: (H, W), (L,), or () for (N, D) data.
        timesteps: T. A `beta_schedule` given as numbers has its own.
        sampling_timesteps: steps of `sample` where it is given none; fewer than T select DDIM.
        sampler: of `sample` where it is given none; a name in `samplers.SAMPLERS`.
        spacing: of the timesteps of `sample` where it is given none; a name in `samplers.SPACINGS`, or None for the
            sampler's own.
        objective: what the network predicts, a name in `parameterization.OBJECTIVES`: pred_noise, pred_x0, pred_v or
            pred_mean.
        beta_schedule: a name of `schedules.make`, a `NoiseSchedule`, or T betas.
        schedule_fn_kwargs: arguments of the named schedule.
        zero_terminal_snr: change the schedule so that x_T is noise alone. Lin et al. (2023). Not for pred_noise.
        variance: sigma^2 of ancestral steps: posterior or beta (or another name in `variances.VARIANCES`); learnable,
            one number a timestep, the parameter `log_variance` of this module; learned or learned_range (or another
            name in `variances.LEARNED_VARIANCES`), by the second half of the network's output, (N, 2 C, ...).
        clip_denoised: bounds of x0_hat in sampling: True for (-1, 1), False for none, or (low, high).
        loss_type: l2, l1 or huber; kl, the variational bound itself, of which a training step's loss is an unbiased
            estimate, in bits/dim, without its constant term L_T; or hybrid, l2 plus T / 1000 times the bound's term,
            whose gradient goes to the variance alone (Nichol & Dhariwal 2021, eq. 16). None: l2, or hybrid where the
            variance is learned, which the others do not train.
        loss_weight: of l2, l1, huber and the l2 of hybrid: l_simple, uniform, min_snr, p2, vlb, or T numbers: see
            `loss_weights.loss_weight`. The default weighs every objective as L_simple of the paper.
        min_snr_loss_weight: the same as loss_weight="min_snr".
        min_snr_gamma: the bound of min_snr.
        p2_gamma, p2_k: of p2.
        decoder: what the bound's L_0 is of: discretized, images on 256 levels, or gaussian, continuous data. None:
            discretized if auto_normalize.
        ddim_sampling_eta: eta of DDIM steps where `sample` is given none.
        auto_normalize: map [0, 1] to [-1, 1] and back. False: data is taken as it is, within the bounds of
            `clip_denoised`, since samples are clipped to them.
        offset_noise_strength: adds noise that is constant over a channel in training.
        immiscible: pairs the images of a batch with near noise in training. Li et al. (2024).
        channels: C; by default that of the model: `channels`, `in_channels`, or `config.in_channels`.
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
        sampler: str | None = None,
        spacing: str | None = None,
        objective: str = "pred_v",
        beta_schedule: str | NoiseSchedule | Tensor | Sequence[float] = "sigmoid",
        schedule_fn_kwargs: Mapping[str, float] | None = None,
        zero_terminal_snr: bool = False,
        variance: str = "posterior",
        clip_denoised: bool | tuple[float, float] = True,
        loss_type: str | None = None,
        loss_weight: str | Tensor | Sequence[float] = "l_simple",
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5.0,
        p2_gamma: float = 1.0,
        p2_k: float = 1.0,
        decoder: str | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        immiscible: bool = False,
        channels: int | None = None,
        rng: str = "philox",
    ) -> None:
        if isinstance(beta_schedule, str):
            schedule = schedules.make(beta_schedule, timesteps, **(schedule_fn_kwargs or {}))
        elif isinstance(beta_schedule, NoiseSchedule):
            schedule = beta_schedule
        else:
            schedule = NoiseSchedule(beta_schedule, name="beta_schedule", zero_terminal_snr=zero_terminal_snr)
        if zero_terminal_snr:
            schedule = schedule.with_zero_terminal_snr()
        if min_snr_loss_weight:
            if not isinstance(loss_weight, str) or loss_weight not in ("l_simple", "snr", "min_snr"):
                raise ValueError(
                    f"min_snr_loss_weight=True is loss_weight='min_snr'; got loss_weight={loss_weight!r} too"
                )
            loss_weight = "min_snr"
        numbers = {"min_snr_gamma": min_snr_gamma, "p2_gamma": p2_gamma, "p2_k": p2_k}
        weight = make_loss_weight(schedule, objective, loss_weight, variance=variance, **numbers)
        channels = _channels_of(model) if channels is None else checks.integer("channels", channels, 1)
        super().__init__(
            model,
            schedule,
            objective,
            variance,
            weight,
            clip_denoised,
            rng,
            ("discretized" if auto_normalize else "gaussian") if decoder is None else decoder,
            shape=(channels, *_sizes(image_size)),
            sampler=sampler,
            sampling_timesteps=sampling_timesteps,
            spacing=spacing,
            ddim_sampling_eta=ddim_sampling_eta,
            auto_normalize=auto_normalize,
        )
        self.loss_type = _loss_type(loss_type, variance)
        self.offset_noise_strength = checks.finite("offset_noise_strength", offset_noise_strength, 0)
        self.immiscible = immiscible

    # What a subclass may override: see `overrides`.
    _OVERRIDABLE = (
        *ImageEditing.CALLED_BY_P_SAMPLE, "p_sample_loop", "ddim_sample", "q_sample", "predict_v", "p_losses",
        "normalize", "unnormalize",
    )  # fmt: skip

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = GaussianDiffusion
        cls._overridden = frozenset(n for n in own._OVERRIDABLE if getattr(cls, n) is not getattr(own, n))

    def random_times(self, batch_size: int) -> Tensor:
        """Timesteps of a batch, uniformly from [0, T); (N,), int64."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        *,
        seed: Seed = None,
        sample_offset: int | Tensor = 0,
        model_kwargs: ModelArguments | None = None,
    ) -> Tensor:
        """The weighted loss of predictions at the timesteps t.

        Args:
            x_start: x_0, (N, C, ...); floating in [-1, 1], or uint8, which the ops scale where they read it.
            t: (N,), int64, in [0, T).
            noise: eps; drawn as stream 0 of `seed` if None.
            offset_noise_strength: None for the module's own.
            loss_reduction: mean; none for the loss of each sample, (N,); or share for what each adds to the mean, (N,).
            model_kwargs: further arguments of the network.
        """
        checks.choice("loss_reduction", loss_reduction, ("mean", "none", "share"))
        self._check_start(x_start, t, noise)
        source = self.noise_source(x_start, seed, sample_offset)
        # An overridden method is given what it is given in denoising_diffusion_pytorch: tensors.
        by_methods = self.overrides("q_sample", "predict_v")
        if by_methods and x_start.dtype == torch.uint8:
            x_start = self.normalize(x_start)
        noise = self._training_noise(x_start, noise, offset_noise_strength, source, as_tensor=by_methods)
        # Otherwise eps is made twice from its keys, here and for the loss, and never stored.
        eps = source.arguments(0, x_start.shape) if noise is None else {"noise": noise}
        if self.overrides("q_sample"):
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        else:
            # The bound reads x_t too, and in half precision it would be another.
            exact = self.self_condition or self.loss_type in ("hybrid", "kl")
            dtype = None if exact else self.model_dtype(x_start)
            x = ops.q_sample(x_start, t, self.q_sample_rows, dtype=dtype, **eps)

        x_self_cond = None
        if self.self_condition and self._conditions_itself():
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t, **if_any(model_kwargs))[1]

        prediction = self.predict(x, t, x_self_cond, model_kwargs)
        each, parts = ("none", 1) if loss_reduction == "none" else ("share", len(x_start))
        if self.loss_type == "kl":
            losses = self._bits_of_bound(x_start, x, t, prediction) * self.num_timesteps / parts
        else:
            losses = self._simple_loss(prediction.pred, t, x_start, noise, eps, each)
        if self.loss_type == "hybrid":
            detached = prediction._replace(pred=prediction.pred.detach())
            losses = losses + self._bits_of_bound(x_start, x, t, detached) * (self.num_timesteps / 1000) / parts
        return losses.sum() if loss_reduction == "mean" else losses

    def _simple_loss(
        self, pred: Tensor, t: Tensor, x_start: Tensor, noise: Tensor | None, eps: dict[str, Tensor], reduction: str
    ) -> Tensor:
        """The weighted error of the prediction; eps is the noise as an op takes it."""
        rows = self.loss_rows
        if self.objective == "pred_v" and self.overrides("predict_v"):
            x_start, eps = self.predict_v(x_start, t, noise), {}
            rows = torch.stack([torch.ones_like(rows[:, 0]), torch.zeros_like(rows[:, 1]), rows[:, 2]], dim=1)
        elif self.objective == "pred_noise":
            x_start = None  # its p is 0
        elif self.objective == "pred_x0":
            eps = {}
        loss_type = "l2" if self.loss_type == "hybrid" else self.loss_type
        return ops.weighted_loss(pred, t, rows, x_start=x_start, loss_type=loss_type, reduction=reduction, **eps)

    def _bits_of_bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The bound's term at t of each sample, in bits/dim, (N,)."""
        return likelihood.bound_term(self, x_start, x_t, t, prediction) / (x_t[0].numel() * math.log(2))

    def _training_noise(
        self, x_start: Tensor, noise: Tensor | None, strength: float | None, source: NoiseSource, as_tensor: bool
    ) -> Tensor | None:
        """eps as a tensor, where it is given, changed, or asked for."""
        if strength is None:
            strength = self.offset_noise_strength
        else:
            strength = checks.finite("offset_noise_strength", strength, 0)
        if noise is None and (strength or self.immiscible or as_tensor):
            noise = source.draw(0, x_start.shape)
        if strength:
            offset = source.draw(OFFSET, x_start.shape[:2])
            noise = noise + strength * offset.view(*offset.shape, *[1] * (x_start.ndim - 2))
        if self.immiscible:
            noise = noise[_nearest_assignment(x_start, noise)]
        return noise

    def _conditions_itself(self) -> bool:
        """Half of the time, as Chen et al. (2022), sec. 3; with rng="torch" by Python's generator, as its peer does."""
        return random.random() < 0.5 if self.rng == "torch" else bool(torch.rand(()) < 0.5)

    def forward(
        self,
        img: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        *,
        times: Tensor | None = None,
        loss_reduction: str = "mean",
        seed: Seed = None,
        sample_offset: int | Tensor = 0,
        model_kwargs: ModelArguments | None = None,
        **further: Any,
    ) -> Tensor:
        """The training loss of a batch.

        Args:
            img: (N, C, *image_size); floating in [0, 1], or uint8.
            noise: eps; drawn if None.
            offset_noise_strength: None for the module's own.
            times: (N,), int64; drawn uniformly from [0, T) if None.
            loss_reduction: mean; none for the loss of each sample, (N,); or share for what each adds to the mean, (N,).
            seed: of the noise; None draws one from PyTorch's default generator.
            sample_offset: index of the first image in the whole (global) batch; an int64 tensor of shape () on the
                device is not read by the host.
            model_kwargs: further arguments of the network, such as {"class_labels": labels}.
            further: arguments of a p_losses that a subclass has overridden.

        Returns:
            The loss, float32.

        Raises:
            ValueError: images of another shape or range, or non-finite ones.
        """
        bounds = clip_bounds(self.clip_denoised)
        checks.images(img, (self.channels, *self.image_size), unit_range=self.auto_normalize, bounds=bounds)
        times = self.random_times(img.shape[0]) if times is None else times
        memory_format = ops.channels_last_format(img.ndim)
        if memory_format is not None:
            img = img.contiguous(memory_format=memory_format)
        by_methods = self.overrides("p_losses", "normalize")
        if img.dtype != torch.uint8 or self.betas.dtype != torch.float32 or self.immiscible or by_methods:
            img = self.normalize(img)
        if not self.overrides("p_losses"):
            if further:
                name = next(iter(further))
                raise TypeError(
                    f"forward() got an unexpected keyword argument {name!r}; the network's go into model_kwargs"
                )
            how = {"seed": seed, "sample_offset": sample_offset, **if_any(model_kwargs)}
            return self.p_losses(img, times, noise, offset_noise_strength, loss_reduction, **how)
        given = {
            "noise": noise,
            "offset_noise_strength": offset_noise_strength,
            "loss_reduction": loss_reduction,
            "model_kwargs": model_kwargs,
        }
        # It may know none of these, nor of seeds.
        given = {name: v for name, v in given.items() if v is not None and (name, v) != ("loss_reduction", "mean")}
        with drawing_from(self.noise_source(img, seed, sample_offset)):
            return self.p_losses(img, times, **given, **further)

    def likelihood(
        self,
        images: Tensor,
        *,
        steps: int | None = None,
        seed: Seed = None,
        sample_offset: int = 0,
        model_kwargs: ModelArguments | None = None,
        progress: bool = False,
    ) -> Likelihood:
        """The variational bound on -log p of images, term by term; see `likelihood`. Ho et al. (2020), eq. 5.

        Args:
            images: (N, C, *image_size) in the range of `forward`; on 256 levels if the decoder is the discretized one.
            steps: how many timesteps are evaluated for each image, at least 3; None for all T. Fewer of them give an
                unbiased estimate with its standard error: t = 0, and others that are drawn at random for each image.
            seed: of the noise and of these timesteps; None draws one from PyTorch's default generator.
            sample_offset: index of the first image in the data set: the bound of an image is the same in any batch.
            model_kwargs: further arguments of the network.
            progress: show a bar.

        Raises:
            ValueError: images of another shape, range or number of levels, or steps that cannot be.
        """
        bounds = clip_bounds(self.clip_denoised)
        checks.images(images, (self.channels, *self.image_size), unit_range=self.auto_normalize, bounds=bounds)
        if self.decoder == "discretized" and images.dtype != torch.uint8:
            levels = images.double() * 255 if self.auto_normalize else (images.double() + 1) * 127.5
            checks.require(
                (levels - levels.round()).abs().max() < 0.01,
                lambda: (
                    "the discretized decoder needs images on 256 levels, and these lie between them; give uint8 "
                    "images, or a GaussianDiffusion with decoder='gaussian'"
                ),
            )
        x = self._given(images)
        source = self.noise_source(x, seed, sample_offset)
        return likelihood.evaluate(self, x, source, steps=steps, model_kwargs=model_kwargs, progress=progress)


def _loss_type(name: str | None, variance: str) -> str:
    is_learned = variance not in variances.VARIANCES
    if name is None:
        return "hybrid" if is_learned else "l2"
    checks.choice("loss_type", name, LOSS_TYPES)
    if is_learned and name not in ("hybrid", "kl"):
        raise ValueError(f"loss_type {name!r} does not train a variance that is {variance}; take 'hybrid' or 'kl'")
    if not is_learned and name == "hybrid":
        raise ValueError(f"loss_type 'hybrid' trains a variance that is learned; variance {variance!r} is not")
    return name


def _channels_of(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for found in (
        getattr(model, "channels", None),
        getattr(model, "in_channels", None),
        getattr(config, "in_channels", None),
    ):
        if isinstance(found, int) and not isinstance(found, bool):
            return checks.integer("the model's channels", found, 1)
    raise ValueError("the model has no integer attribute `channels`; pass channels= to GaussianDiffusion")


def _sizes(image_size: int | Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(image_size)
    except TypeError:
        sizes = (image_size, image_size)
    return tuple(checks.integer("image_size", size, 1) for size in sizes)


def _nearest_assignment(x_start: Tensor, noise: Tensor) -> Tensor:
    """The order of noise that lies nearest to the images, on the whole."""
    from scipy.optimize import linear_sum_assignment  # comes with ddpm_fast[train]

    distance = torch.cdist(x_start.flatten(1).float(), noise.flatten(1).float())
    return torch.from_numpy(linear_sum_assignment(distance.cpu().numpy())[1]).to(noise.device)
