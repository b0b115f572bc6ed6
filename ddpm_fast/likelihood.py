r"""Likelihood: the variational bound on -log p(x_0), term by term. Ho et al. (2020), eq. 5.

    -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0

`prior_term`, `transition_term` and `reconstruction_term` are its three kinds, in nats for each sample; `evaluate` is
the whole of it, in bits/dim: nats / (D ln 2) for samples of D numbers. The network may compute in any dtype; the bound
is float32 (float64 after `.double()`). Since t counts from 0 here, the term at t is the paper's L_t.
"""

__all__ = ["Likelihood", "bound_term", "evaluate", "prior_term", "reconstruction_term", "transition_term"]

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import checks, ops
from .denoiser import Denoiser, ModelArguments, Prediction, clip_bounds
from .nn.evaluation import in_evaluation
from .noise import LIKELIHOOD, NoiseSource, fold_in
from .ops.noise import noise_of
from .process import DiffusionProcess
from .variational_bound import decoder_constant


def prior_term(process: DiffusionProcess, x_start: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each sample, in nats, (N,).

    Args:
        x_start: x_0, (N, ...); floating in the range of the network, or uint8, mapped to [-1, 1].
    """
    schedule = process.schedule
    x = x_start.to(process.betas.dtype)
    if x_start.dtype == torch.uint8:
        x = x * (2 / 255) - 1
    abar = schedule.alphas_cumprod[-1].item()
    # The variance of x_T is 1 - abar, and abar - 1 - log(...) loses all digits of a small abar.
    variances_part = -abar - math.log1p(-abar)
    return 0.5 * (abar * x.square() + variances_part).flatten(1).sum(1)


def transition_term(
    denoiser: Denoiser, x_start: Tensor, x_t: Tensor, t: Tensor, model_kwargs: ModelArguments | None = None
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each sample, in nats, (N,).

    Args:
        x_start: x_0, (N, C, ...); floating in the range of the network, or uint8.
        x_t: (N, C, ...), floating.
        t: (N,), int64, in [1, T).
        model_kwargs: further arguments of the network.
    """
    checks.timesteps(t, len(x_t), denoiser.num_timesteps)
    checks.require((t > 0).all(), lambda: "transitions have t of at least 1; t = 0 is the reconstruction's")
    prediction = denoiser.predict(x_t, t, None, model_kwargs)
    return bound_term(denoiser, x_start, x_t, t, prediction, clip_bounds(denoiser.clip_denoised))


def reconstruction_term(
    denoiser: Denoiser, x_start: Tensor, x_t: Tensor, model_kwargs: ModelArguments | None = None
) -> Tensor:
    """L_0 = -ln p(x_0 | x_t) at t = 0 of each sample, by the diffusion's decoder, in nats, (N,).

    Args: as those of `transition_term`.
    """
    t = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
    prediction = denoiser.predict(x_t, t, None, model_kwargs)
    return bound_term(denoiser, x_start, x_t, t, prediction, clip_bounds(denoiser.clip_denoised))


def bound_term(
    denoiser: Denoiser,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction: Prediction,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """The bound's term at t of each sample, from a prediction, in nats, (N,). Gradients flow to the prediction.

    Args:
        x_start, x_t, t: as those of `transition_term`, with t from 0.
        prediction: of `Denoiser.predict`.
        clip: bounds of x0_hat.
    """
    pred, v = prediction
    if denoiser.log_variance is not None:
        v = denoiser._at(denoiser.log_variance[:, None], t, x_t)[0].expand(x_t.shape)
        pred = pred.to(v.dtype)  # the op takes both in one dtype, and bfloat16 would move a logarithm by 1 %
    gaussian = denoiser.decoder == "gaussian"
    row = t + 1 if gaussian else t
    terms = ops.vlb_terms(x_start, x_t, pred, row, denoiser.bound_rows, variance=v, clip=clip)
    if gaussian:
        terms = torch.where(t == 0, terms + decoder_constant(x_t[0].numel()), terms)
    return terms


@dataclass(frozen=True)
class Likelihood:
    """The variational bound of each of N images. The lower, the likelier.

    Attributes:
        total_bpd: (N,), in bits/dim; an estimate where not every timestep was evaluated.
        prior_bpd: (N,), L_T in bits/dim.
        vb: (N, K), the terms at the timesteps `t` in bits/dim. Their sum and the prior are the total if K = T.
        x_start_mse, eps_mse: (N, K), mean squared errors of x0_hat, clipped as in sampling, and of the eps that
            follows from it.
        t: (N, K), the timesteps, rising.
        standard_error: (N,), of total_bpd, for which timesteps were chosen; 0 if K = T.
        size: D, the numbers in an image.
    """

    total_bpd: Tensor
    prior_bpd: Tensor
    vb: Tensor
    x_start_mse: Tensor
    eps_mse: Tensor
    t: Tensor
    standard_error: Tensor
    size: int

    @property
    def total_nats(self) -> Tensor:
        """(N,), the bound on -log p(x_0) of whole images, in nats."""
        return self.total_bpd * (self.size * math.log(2))


@torch.no_grad()
def evaluate(
    denoiser: Denoiser,
    x_start: Tensor,
    source: NoiseSource,
    *,
    steps: int | None = None,
    model_kwargs: ModelArguments | None = None,
    progress: bool = False,
) -> Likelihood:
    """The variational bound of images; see `GaussianDiffusion.likelihood`.

    Args:
        x_start: x_0, (N, C, ...), float32 or float64, in the range of the network.
        source: of the noise.
    """
    denoiser = in_evaluation(denoiser)
    n, size = len(x_start), x_start[0].numel()
    bits = 1 / (size * math.log(2))
    strata = _Strata(denoiser.num_timesteps, steps)
    t = strata.choose(n, source)
    clip = clip_bounds(denoiser.clip_denoised)
    terms, x_start_mse, eps_mse = [], [], []
    for k in tqdm(range(t.shape[1]), "likelihood", disable=not progress, unit="step"):
        now = t[:, k].contiguous()
        x_t, eps = _noised(denoiser, x_start, now, source)
        prediction = denoiser.predict(x_t, now, None, model_kwargs)
        terms.append(bound_term(denoiser, x_start, x_t, now, prediction, clip) * bits)
        u, w = denoiser._at(denoiser.x_start_rows, now, x_t)
        x_hat = u * x_t + w * prediction.pred.to(x_t.dtype)
        x_hat = x_hat if clip is None else x_hat.clamp(*clip)
        x_start_mse.append((x_hat - x_start).square().flatten(1).mean(1))
        eps_mse.append((denoiser.predict_noise_from_start(x_t, now, x_hat) - eps).square().flatten(1).mean(1))
    vb = torch.stack(terms, dim=1)
    total, variance = strata.estimate(vb)
    prior = prior_term(denoiser, x_start) * bits
    mse = (torch.stack(x_start_mse, dim=1), torch.stack(eps_mse, dim=1))
    return Likelihood(total + prior, prior, vb, *mse, t, variance.sqrt(), size)


def _noised(denoiser: Denoiser, x_start: Tensor, t: Tensor, source: NoiseSource) -> tuple[Tensor, Tensor]:
    """x_t and its eps, which belongs to the image and the timestep, whichever others are evaluated."""
    if source.keyed:
        keys = fold_in(source.keys(len(t), LIKELIHOOD), t)
        eps = noise_of(keys, x_start.shape).to(denoiser.betas.dtype)
    else:
        eps = source.draw(LIKELIHOOD, x_start.shape)
    return ops.q_sample(x_start, t, denoiser.q_sample_rows, noise=eps), eps


class _Strata:
    """Which K of T timesteps are evaluated for each image, and how their terms estimate the sum over all.

    t = 0 always is, since its term is the largest and unlike the others. The rest are drawn at random, two or three
    without replacement from each of (K - 1) / 2 ranges of timesteps: the estimate is unbiased, and so is that of its
    variance. The ranges grow like powers where they can, since terms fall about as 1 / t.

    Raises:
        ValueError: K is below 3 or above T.
    """

    def __init__(self, timesteps: int, steps: int | None) -> None:
        steps = timesteps if steps is None else checks.integer("steps", steps, min(3, timesteps), timesteps + 1)
        if steps == timesteps:
            self.ranges, self.draws = [range(timesteps)], [timesteps]
            return
        count = (steps - 1) // 2
        self.draws = [1, *[2] * (count - 1), 2 + (steps - 1) % 2]
        ends = [1]
        for i, m in enumerate(self.draws[1:], 1):
            most = timesteps - sum(self.draws[i + 1 :])
            ends.append(min(max(round(timesteps ** (i / count)), ends[-1] + m), most))
        self.ranges = [range(1), *(range(a, b) for a, b in itertools.pairwise(ends))]

    def choose(self, n: int, source: NoiseSource) -> Tensor:
        """(n, K), int64, rising; those of an image depend on the seed and its index alone."""
        chosen = []
        for strata, m in zip(self.ranges, self.draws, strict=True):
            all_of_them = torch.arange(strata.start, strata.stop, device=source.device).expand(n, len(strata))
            if m < len(strata):
                order = self._random(n, strata, source).argsort(dim=1)[:, :m]
                all_of_them = all_of_them.gather(1, order).sort(dim=1).values
            chosen.append(all_of_them)
        return torch.cat(chosen, dim=1)

    def _random(self, n: int, strata: range, source: NoiseSource) -> Tensor:
        if not source.keyed:
            return source.draw(LIKELIHOOD, (n, len(strata)))
        # Timesteps from T on, so that no key of a timestep's noise is used again.
        keys = source.keys(n, LIKELIHOOD + 1)[:, None]
        return fold_in(keys, torch.arange(strata.start, strata.stop, device=source.device))[..., 0]

    def estimate(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """The estimated sum over all timesteps and its variance, (N,) each, from the terms at those chosen, (N, K)."""
        total, variance = torch.zeros_like(terms[:, 0]), torch.zeros_like(terms[:, 0])
        for strata, part in zip(self.ranges, terms.split(self.draws, dim=1), strict=True):
            size, m = len(strata), part.shape[1]
            total += part.mean(1) * size
            if m < size:  # Cochran (1977), eq. 5.7, of a sum
                variance += size**2 * (1 - m / size) * part.var(1) / m
        return total, variance
