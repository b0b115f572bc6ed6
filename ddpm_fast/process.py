r"""The diffusion process without a network: its tables, and the closed forms between x_0, x_t, eps and v.

x_t = a_t x_0 + s_t eps         v = a_t eps - s_t x_0         a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t)
"""

__all__ = ["DiffusionProcess", "Seed", "drawing_from"]

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, ops, samplers, variances
from .noise import NoiseSource
from .parameterization import target_rows, x_start_rows
from .schedules import NoiseSchedule
from .variational_bound import DECODERS, bound_rows

RNGS = ("philox", "torch")
Seed = int | torch.Generator | None

# The noise of a run or of a training step in whose course a subclass' methods are called, which know of no seed.
_source: ContextVar[NoiseSource | None] = ContextVar("noise source", default=None)


@contextmanager
def drawing_from(source: NoiseSource) -> Iterator[None]:
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


class DiffusionProcess(nn.Module):
    """The tables of the process as buffers, the rows of coefficients for the ops, and the closed forms.

    The buffers have the names and values of denoising_diffusion_pytorch's. The rows are not part of the state dict.
    Both stay in float32 (float64 after `.double()`) whatever dtype the network is converted to.

    Data has the shape (N, C, ...), timesteps t (N,), int64, in [0, T).

    Args:
        schedule: the betas.
        objective: what the network predicts; see `parameterization`.
        variance: sigma^2 of ancestral steps, a name in `variances.NAMES`.
        loss_weight: the weight of each timestep, (T,), float64.
        rng: `philox` or `torch`: see `noise.NoiseSource`.
        decoder: of the variational bound's last term, a name in `variational_bound.DECODERS`.

    Attributes:
        log_variance: with the variance `learnable` the parameter log sigma^2, (T,), float32; otherwise None.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        objective: str,
        variance: str,
        loss_weight: Tensor,
        rng: str = "philox",
        decoder: str = "discretized",
    ) -> None:
        super().__init__()
        self.rng = checks.choice("rng", rng, RNGS)
        self.schedule = schedule
        self.objective = objective
        self.variance = checks.choice("variance", variance, variances.NAMES)
        self.decoder = checks.choice("decoder", decoder, DECODERS)
        self.num_timesteps = len(schedule)
        self._tables, self._rows = self._make_tables(loss_weight)
        if not all(_fits_float32(table) for table in (self._tables | self._rows).values()):
            raise ValueError(
                f"float32 cannot hold the tables of this schedule: its {self.num_timesteps} timesteps leave "
                f"abar_T = {schedule.alphas_cumprod[-1]:.3g} of the signal; take fewer timesteps or smaller betas"
            )
        device = torch.get_default_device()
        for name, table in self._tables.items():
            self.register_buffer(name, table.to(device, torch.float32))
        for name, rows in self._rows.items():
            self.register_buffer(name, rows.to(device, torch.float32), persistent=False)
        initial = variances.positive(schedule.posterior_variance, schedule).log()
        learnable = nn.Parameter(initial.to(device, torch.float32)) if variance == variances.LEARNABLE else None
        self.register_parameter("log_variance", learnable)

    def _make_tables(self, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The buffers that are saved, and the rows for the ops, in float64."""
        schedule = self.schedule
        a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        tables = {
            "betas": schedule.betas,
            "alphas_cumprod": schedule.alphas_cumprod,
            "alphas_cumprod_prev": schedule.alphas_cumprod_prev,
            "sqrt_alphas_cumprod": a,
            "sqrt_one_minus_alphas_cumprod": s,
            "log_one_minus_alphas_cumprod": (1 - schedule.alphas_cumprod).log(),
            "sqrt_recip_alphas_cumprod": 1 / a,
            "sqrt_recipm1_alphas_cumprod": s / a,
            "posterior_variance": schedule.posterior_variance,
            "posterior_log_variance_clipped": schedule.posterior_variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": schedule.posterior_mean_coef1,
            "posterior_mean_coef2": schedule.posterior_mean_coef2,
            "loss_weight": weight,
        }
        rows = {
            "q_sample_rows": torch.stack([a, s], dim=1),  # (T, 2)
            "x_start_rows": torch.stack(x_start_rows(schedule, self.objective), dim=1),  # (T, 2)
            "loss_rows": torch.stack([*target_rows(schedule, self.objective), weight], dim=1),  # (T, 3)
            "bound_rows": bound_rows(schedule, self.objective, self.variance, self.decoder),  # (T or T + 1, 6 or 8)
        }
        if self.variance != variances.LEARNABLE:
            rows["ancestral_rows"] = samplers.ancestral(schedule, self.objective, variance=self.variance).rows
        if self.variance in variances.VARIANCES:
            sigma2 = variances.variance(schedule, self.variance)
            rows["variance_rows"] = torch.stack([sigma2, sigma2.clamp(min=1e-20).log()], dim=1)  # (T, 2)
        elif self.variance in variances.LEARNED_VARIANCES:
            rows["log_variance_bounds"] = variances.log_bounds(schedule, self.variance)  # (T, 2)
        return tables, rows

    def _apply(self, fn: Any, recurse: bool = True) -> "DiffusionProcess":
        exact = None if self.log_variance is None else self.log_variance.data
        super()._apply(fn, recurse)
        if exact is not None and self.log_variance.dtype in (torch.float16, torch.bfloat16):
            self.log_variance.data = exact.to(self.log_variance.device)
        # In half precision, 1 - abar would be 0 for the first timesteps.
        self._renew_tables(torch.float64 if self.betas.dtype == torch.float64 else torch.float32)
        return self

    def _renew_tables(self, dtype: torch.dtype) -> None:
        """Writes the buffers anew from float64, each on its device."""
        for name, table in (self._tables | self._rows).items():
            if not self._buffers[name].is_meta:
                self._buffers[name] = table.to(self._buffers[name].device, dtype)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        dtype = torch.float64 if self.betas.dtype == torch.float64 else torch.float32
        for name, table in self._tables.items():
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            if given.shape != table.shape or not torch.allclose(given.cpu().double(), table, rtol=1e-3, atol=1e-6):
                args[-1].append(
                    f"the checkpoint's `{name}` is of another schedule, objective or loss weight: make the "
                    f"GaussianDiffusion with the arguments that the checkpoint was trained with"
                )
            state_dict[prefix + name] = table.to(given.device, dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        # With assign=True, buffers on the meta device are replaced by those of the state dict, which has no rows.
        if not self.betas.is_meta:
            for name in self._rows:
                if self._buffers[name].is_meta:
                    self._buffers[name] = torch.empty_like(self._buffers[name], device=self.device)
            self._renew_tables(dtype)

    @property
    def device(self) -> torch.device:
        return self.betas.device

    @property
    def learns_variance(self) -> bool:
        """Whether the network's output has a second half, from which the variance follows."""
        return self.variance in variances.LEARNED_VARIANCES

    def ancestral_variance(self) -> str | Tensor:
        """What `samplers.ancestral` takes: the name of the variance, or what `log_variance` has come to."""
        if self.log_variance is None:
            return self.variance
        return self.log_variance.detach().cpu().double().exp()

    def _at(self, rows: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The columns of rows at t, shaped to broadcast against x."""
        picked = rows[t].view(len(t), rows.shape[1], *[1] * (x.ndim - 1))
        return picked.unbind(1)

    def _extract(self, t: Tensor, named: dict[str, Tensor], *tables: Tensor) -> list[Tensor]:
        """The numbers of tables at t, shaped to broadcast against the tensors, which have one shape."""
        (first, x), *others = named.items()
        checks.floating(first, x)
        for name, y in others:
            checks.shape(name, y, x.shape, first)
        checks.timesteps(t, len(x), self.num_timesteps)
        return [table[t].view(-1, *[1] * (x.ndim - 1)) for table in tables]

    def noise_source(self, like: Tensor, seed: Seed = None, sample_offset: int | Tensor = 0) -> NoiseSource:
        """Where noise of a tensor's device and dtype comes from; see `noise.NoiseSource`."""
        current = None if torch.compiler.is_compiling() else _source.get()
        if current is not None and seed is None and not (isinstance(sample_offset, Tensor) or sample_offset):
            return current
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return NoiseSource(self.rng, seed=seed, sample_offset=sample_offset, device=like.device, dtype=dtype)

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        seed: Seed = None,
        sample_offset: int = 0,
    ) -> Tensor:
        """x_t = a_t x_0 + s_t eps. Ho et al. (2020), eq. 4.

        Args:
            x_start: x_0, (N, ...); floating, or uint8, mapped to [-1, 1].
            t: (N,), int64, in [0, T).
            noise: eps, the shape of x_start; drawn as stream 0 of `seed` if None.
        """
        self._check_start(x_start, t, noise)
        eps = {"noise": noise}
        if noise is None:
            eps = self.noise_source(x_start, seed, sample_offset).arguments(0, x_start.shape)
        return ops.q_sample(x_start, t, self.q_sample_rows, **eps)

    def _check_start(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> None:
        checks.pixels("x_start", x_start)
        checks.timesteps(t, x_start.shape[0], self.num_timesteps)
        if noise is not None:
            checks.shape("noise", noise, x_start.shape, "x_start")

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = x_t / a - eps s / a. Ho et al. (2020), eq. 4."""
        recip, recipm1 = self._extract(
            t, {"x_t": x_t, "noise": noise}, self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        )
        return recip * x_t - recipm1 * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """eps = (x_t - a x_0) / s."""
        a, s = self._extract(t, {"x_t": x_t, "x0": x0}, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        return (x_t - a * x0) / s

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = a eps - s x_0. Salimans & Ho (2022), appendix D."""
        a, s = self._extract(
            t, {"x_start": x_start, "noise": noise}, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        )
        return a * noise - s * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = a x_t - s v."""
        a, s = self._extract(t, {"x_t": x_t, "v": v}, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        return a * x_t - s * v

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance (clipped at 1e-20) of q(x_{t-1} | x_t, x_0). Ho et al. (2020), eq. 7."""
        coef1, coef2, variance, log_variance = self._extract(
            t,
            {"x_t": x_t, "x_start": x_start},
            self.posterior_mean_coef1,
            self.posterior_mean_coef2,
            self.posterior_variance,
            self.posterior_log_variance_clipped,
        )
        return coef1 * x_start + coef2 * x_t, variance, log_variance


def _fits_float32(table: Tensor) -> bool:
    """Whether float32 holds it, but for 1 / a at the end of a schedule whose terminal SNR is 0."""
    finite = table.float().isfinite()
    return bool(finite[:-1].all() and (finite[-1] | table[-1].isinf()).all())
