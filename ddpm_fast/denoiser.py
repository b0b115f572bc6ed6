r"""The network as a denoiser: what its prediction says of eps, of x_0, and of the mean and variance of a step.

With the rows (u, w) of the objective, x0_hat = u x_t + w pred whatever the network predicts.
"""

__all__ = ["Denoiser", "LearnedPrediction", "ModelArguments", "ModelPrediction", "Prediction", "clip_bounds", "if_any"]

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .process import DiffusionProcess
from .schedules import NoiseSchedule

ModelArguments = Mapping[str, Any]


class ModelPrediction(NamedTuple):
    """eps and x_0 as a prediction implies them, both in the shape of x_t."""

    pred_noise: Tensor
    pred_x_start: Tensor


class LearnedPrediction(NamedTuple):
    """With a learned variance, its v besides, as the network predicted it."""

    pred_noise: Tensor
    pred_x_start: Tensor
    pred_variance: Tensor


class Prediction(NamedTuple):
    """A network's output, each in the shape of x_t; v is None unless the variance is learned."""

    pred: Tensor
    v: Tensor | None


class Denoiser(DiffusionProcess):
    """A diffusion process with the network that reverses it.

    Args:
        model: called as `model(x, t)`, or `model(x, t, x_self_cond)` where it has `self_condition = True`, and with
            `model_kwargs`; x (N, C, ...) in the dtype of its parameters, t (N,) int64. It returns the shape of x, with
            a learned variance (N, 2 C, ...): a tensor, a tuple that begins with one, or an object with an attribute
            `sample`, as those of diffusers.
        schedule, objective, variance, loss_weight, decoder: see `DiffusionProcess`.
        clip_denoised: bounds of x0_hat: True for (-1, 1), False for none, or (low, high).
        rng: `philox` or `torch`: see `noise.NoiseSource`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        objective: str,
        variance: str,
        loss_weight: Tensor,
        clip_denoised: bool | tuple[float, float],
        rng: str = "philox",
        decoder: str = "discretized",
    ) -> None:
        super().__init__(schedule, objective, variance, loss_weight, rng, decoder)
        clip_bounds(clip_denoised)
        self.model = model
        self.self_condition = bool(getattr(model, "self_condition", False))
        self.clip_denoised = clip_denoised

    # Names of public methods that a subclass outside this package has replaced; see `GaussianDiffusion`.
    _overridden: frozenset[str] = frozenset()

    def overrides(self, *names: str) -> bool:
        """Whether a subclass, or this object, has a method of its own under one of the names."""
        return any(name in self._overridden or name in self.__dict__ for name in names)

    def model_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the network's parameters, in which it is given x; that of x if it has none."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype)

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        model_kwargs: ModelArguments | None = None,
    ) -> Prediction:
        """What the network predicts, as it is.

        Args:
            x: x_t, (N, C, ...).
            t: timesteps, (N,).
            x_self_cond: an earlier x0_hat, for networks with `self_condition`.
            model_kwargs: further arguments of the network, such as labels.
        """
        dtype = self.model_dtype(x)
        condition = (None if x_self_cond is None else x_self_cond.to(dtype),) if self.self_condition else ()
        output = _tensor_of(self.model(x.to(dtype), t, *condition, **(model_kwargs or {})))
        wanted = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if self.learns_variance else x.shape
        if output.shape != torch.Size(wanted):
            what = f"with variance={self.variance!r}, twice the channels" if self.learns_variance else "the shape"
            raise ValueError(
                f"the model must return {what} of its input, {tuple(wanted)}; it returned {tuple(output.shape)}"
            )
        return Prediction(*output.chunk(2, dim=1)) if self.learns_variance else Prediction(output, None)

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
        *,
        model_kwargs: ModelArguments | None = None,
    ) -> ModelPrediction | LearnedPrediction:
        """What the network's prediction says of eps and x_0.

        Args:
            x: x_t, (N, C, ...), in [-1, 1] plus noise.
            t: (N,), int64, in [0, T).
            x_self_cond: an earlier x0_hat, for networks with `self_condition`.
            clip_x_start: clip x_0 to the bounds of `clip_denoised`, (-1, 1) where it has none.
            rederive_pred_noise: find eps again from the clipped x_0, for pred_noise too.
            model_kwargs: further arguments of the network.
        """
        checks.floating("x", x)
        checks.timesteps(t, x.shape[0], self.num_timesteps)
        pred, v = self.predict(x, t, x_self_cond, model_kwargs)
        pred = pred.to(x.dtype)
        if self.objective == "pred_noise" and self.overrides("predict_start_from_noise"):
            x_start = self.predict_start_from_noise(x, t, pred)
        elif self.objective == "pred_v" and self.overrides("predict_start_from_v"):
            x_start = self.predict_start_from_v(x, t, pred)
        else:
            u, w = self._at(self.x_start_rows, t, x)
            x_start = u * x + w * pred
        if clip_x_start:
            x_start = x_start.clamp(*(clip_bounds(self.clip_denoised) or (-1.0, 1.0)))
        eps = pred
        if self.objective != "pred_noise" or (clip_x_start and rederive_pred_noise):
            eps = self.predict_noise_from_start(x, t, x_start)
        return ModelPrediction(eps, x_start) if v is None else LearnedPrediction(eps, x_start, v.to(x.dtype))

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool | tuple[float, float] | None = None,
        *,
        model_kwargs: ModelArguments | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the x_0 they follow from.

        Args:
            clip_denoised: None for the module's own.
        """
        prediction = self.model_predictions(x, t, x_self_cond, **if_any(model_kwargs))
        x_start = prediction[1]
        bounds = clip_bounds(self.clip_denoised if clip_denoised is None else clip_denoised)
        if bounds is not None:
            x_start = x_start.clamp(*bounds)
        mean, _, _ = self.q_posterior(x_start, x, t)
        return mean, *self._reverse_variance(prediction, t, x), x_start

    def _reverse_variance(self, prediction: tuple[Tensor, ...], t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sigma^2 and its logarithm, of shapes that broadcast against x."""
        if self.learns_variance:
            if len(prediction) < 3:
                raise ValueError("with a learned variance, model_predictions must return a third tensor, its v")
            low, high = self._at(self.log_variance_bounds, t, x)
            log_variance = low + (prediction[2] + 1) / 2 * (high - low)
        elif self.log_variance is not None:
            (log_variance,) = self._at(self.log_variance[:, None].to(x.dtype), t, x)
        else:
            return self._at(self.variance_rows, t, x)
        return log_variance.exp(), log_variance


def if_any(model_kwargs: ModelArguments | None) -> dict[str, ModelArguments]:
    """The keyword `model_kwargs` for a method that a subclass may have overridden without it: left out where empty."""
    return {"model_kwargs": model_kwargs} if model_kwargs else {}


def clip_bounds(clip_denoised: bool | tuple[float, float]) -> tuple[float, float] | None:
    """(low, high) of what `clip_denoised` says, None for no bounds."""
    if isinstance(clip_denoised, bool):
        return (-1.0, 1.0) if clip_denoised else None
    try:
        low, high = map(float, clip_denoised)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not low < high:
        raise ValueError(f"clip_denoised must be True, False or (low, high) with low < high; got {clip_denoised!r}")
    return low, high


def _tensor_of(output: Any) -> Tensor:
    """The prediction in what a network returned."""
    if isinstance(output, Tensor):
        return output
    found = output.get("sample") if isinstance(output, Mapping) else getattr(output, "sample", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model must return a tensor, a tuple that begins with one, or an object with a tensor `sample`; it "
            f"returned {type(output).__name__}"
        )
    return found
