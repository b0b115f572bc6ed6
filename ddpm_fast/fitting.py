r"""Samplers of few steps that are fitted to one network.

A step of a sampler is a timestep t and the coefficients (u, w, A, B, C). A solver's coefficients are good for many
steps; for K = 5, others are better. Here they are learned, together with the timesteps, so that K steps from x_T end
where many steps of a solver, the teacher, end:

    minimise over theta   E |x_0(x_T; theta) - teacher(x_T)|^2,     theta = (t, u, w, A, B, C) of each step

The rows are those of DPM-Solver++(2M) at the timesteps t, plus a learned delta:  row_k = dpmpp_2m(t)_k + delta_k.

Coefficients learned from a teacher: Frankel et al. (2025), "S4S"; timesteps: Tong et al. (2024), "LD3". The timesteps
of a table are integers, so they are learned as real numbers, which are rounded in every update. Their gradient is that
of finite differences, of the solver's rows and of the network's prediction.
"""

__all__ = ["fit_sampler", "weights_digest"]

import copy
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import samplers
from .checks import integer
from .denoiser import clip_bounds
from .noise import FITTING, VALIDATION, derive_seed, gaussian
from .reverse_process import ReverseProcess
from .samplers import FittedTable, StepTable

TEACHER_STEPS = 50
HELD_OUT = 256
BATCH = 32  # noises in an update; the K predictions of each are kept for its backward pass
UPDATES = 150
CHECKS = 10  # of the distance on held-out noise, evenly over the updates
LR = 0.01  # of the coefficients, which multiply values of about 1
LR_TIMESTEPS = 0.008  # of the timesteps, in units of T


def fit_sampler(
    diffusion: ReverseProcess, steps: int, *, n: int = 1024, seed: int = 0, progress: bool = False
) -> FittedTable:
    """Fits a sampler of few steps to the network, for `sample(sampler=table)`.

    The distance is the mean squared error, in the range of the network, between the samples of K steps and those of
    the teacher (dpmpp_2m in 50 steps) from the same x_T. It is measured on 256 noises that the fit does not see, and
    the table with the least is returned: that of dpmpp_2m with K steps, if no other is better.

    Args:
        diffusion: a `GaussianDiffusion` with a trained network that takes no `model_kwargs`. It is not changed.
        steps: K, the number of the network's predictions for a sample. Most is gained below 10.
        n: number of noises x_T to fit on; the teacher samples an image from each.
        seed: of these noises and of those held out. The same seed gives the same table.
        progress: show bars.

    Raises:
        ValueError: steps, n or the seed cannot be, or the diffusion is of a class that takes steps by its own methods.
    """
    steps = integer("steps", steps, 1, diffusion.num_timesteps + 1)
    n = integer("n", n, 1)
    if diffusion.overrides(*diffusion.CALLED_BY_P_SAMPLE):
        raise ValueError(
            f"{type(diffusion).__name__} overrides methods that sampling calls, which know nothing of a table's u and "
            "w; fit a sampler to a GaussianDiffusion around its network"
        )
    weights = weights_digest(diffusion.model.state_dict())[:32]
    diffusion = copy.deepcopy(diffusion).eval().requires_grad_(False)
    with tqdm(desc="teacher", total=n + HELD_OUT, unit=" images", disable=not progress) as bar:
        x_fit, target_fit = _taught(diffusion, n, seed, FITTING, bar)
        x_held, target_held = _taught(diffusion, HELD_OUT, seed, VALIDATION, bar)

    start = samplers.dpmpp_2m(diffusion.schedule, diffusion.objective, steps)
    best, distance = start, _distance(diffusion, start, x_held, target_held)
    start_distance = distance
    few = slice(BATCH)
    lists = [start.t.tolist(), *_candidates(diffusion, steps)]
    solvers = [samplers.dpmpp_2m(diffusion.schedule, diffusion.objective, t) for t in lists]
    nearest = min(solvers, key=lambda table: _distance(diffusion, table, x_fit[few], target_fit[few]))

    student = _Student(diffusion, nearest.t)
    optimizer = torch.optim.Adam(
        [{"params": [student.delta], "lr": LR}, {"params": [student.t], "lr": LR_TIMESTEPS * len(diffusion.schedule)}]
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    generator = torch.Generator().manual_seed(derive_seed(seed, FITTING))
    batches = _batches(n, generator)
    with tqdm(range(UPDATES), "fitting", unit="update", disable=not progress) as bar:
        for update in bar:
            indices = next(batches).to(x_fit.device)
            # A sum, since Adam does not depend on the scale, and a mean over all pixels underflows in float16.
            loss = (student.samples(x_fit[indices]) - target_fit[indices]).square().sum()
            student.delta.grad, student.t.grad = torch.autograd.grad(loss, [student.delta, student.t])
            optimizer.step()
            decay.step()
            if (update + 1) % math.ceil(UPDATES / CHECKS) == 0 or update + 1 == UPDATES:
                table = student.table()
                if table is not None and (found := _distance(diffusion, table, x_held, target_held)) < distance:
                    best, distance = table, found
                bar.set_postfix({"distance": f"{distance:.3g}", "before": f"{start_distance:.3g}"})

    fitted_to = samplers.conditions(diffusion.schedule, diffusion.objective, clip_bounds(diffusion.clip_denoised))
    return FittedTable(
        **{name: getattr(best, name) for name in ("t", "u", "w", "A", "B", "C", "sigma")},
        fitted_to=fitted_to | {"weights": weights},
        start_distance=start_distance,
        distance=distance,
    )


class _Student:
    """K steps that are differentiable in their timesteps and coefficients.

    Attributes:
        t: (K,), the timesteps as real numbers.
        delta: (K, 5), what is added to the solver's (u, w, A, B, C).
    """

    def __init__(self, diffusion: ReverseProcess, timesteps: Tensor) -> None:
        self._diffusion = diffusion
        self.t = timesteps.double().requires_grad_()
        self.delta = torch.zeros(len(timesteps), 5, dtype=torch.float64).requires_grad_()

    def table(self) -> StepTable | None:
        """The steps as they are now; None if they have become infinite."""
        if not (self.t.isfinite().all() and self.delta.isfinite().all()):
            return None
        t = self._rounded()
        u, w, A, B, C = (self._solver(t) + self.delta.detach()).unbind(1)
        return StepTable(t=torch.tensor(t), u=u, w=w, A=A, B=B, C=C, sigma=torch.zeros_like(u))

    def samples(self, x: Tensor) -> Tensor:
        """What K steps from x_T = x end in."""
        t = self._rounded()
        shift = self.t - self.t.detach()  # zero, with the gradient of the timesteps
        rows = self._solver(t) + torch.einsum("j,jkc->kc", shift, self._slopes(t)) + self.delta
        return _steps(self._diffusion, x, t, rows.to(x), shift.to(x))

    def _solver(self, t: list[int]) -> Tensor:
        """The rows (K, 5) of DPM-Solver++(2M)."""
        return samplers.dpmpp_2m(self._diffusion.schedule, self._diffusion.objective, t).rows[:, :5]

    def _slopes(self, t: list[int]) -> Tensor:
        """The derivatives of the solver's rows by each timestep, (K, K, 5), by differences to the next timesteps."""
        slopes = []
        for j in range(len(t)):
            low, high = list(t), list(t)
            low[j] = max(t[j] - 1, t[j + 1] + 1 if j + 1 < len(t) else 0)
            high[j] = min(t[j] + 1, t[j - 1] - 1 if j else self._diffusion.num_timesteps - 1)
            slopes.append((self._solver(high) - self._solver(low)) / max(high[j] - low[j], 1))
        return torch.stack(slopes)

    def _rounded(self) -> list[int]:
        """The nearest timesteps that are in [0, T) and fall."""
        last = self._diffusion.num_timesteps - 1
        order = torch.arange(len(self.t))
        t = self.t.detach().nan_to_num().clamp(0, last).round().long()
        falling = (t + order).cummin(0).values - order
        return torch.maximum(falling, order.flip(0)).clamp(max=last - order).tolist()


def _steps(diffusion: ReverseProcess, x: Tensor, t: list[int], rows: Tensor, shift: Tensor | None = None) -> Tensor:
    """What `sample` computes with a table without noise, in the range of the network; differentiable.

    Args:
        x: x_T, (N, C, ...).
        rows: (K, 5), (u, w, A, B, C).
        shift: (K,), zeros with the gradient of the timesteps, by which the predictions change too.
    """
    bounds = clip_bounds(diffusion.clip_denoised)
    x_start = None
    for k, step in enumerate(t):
        condition = x_start if diffusion.self_condition else None

        def predict(timestep: int, x: Tensor = x, condition: Tensor | None = condition) -> Tensor:
            times = torch.tensor(timestep, device=x.device).expand(len(x))
            return diffusion.predict(x, times, condition).pred.to(x.dtype)

        pred = predict(step)
        if shift is not None:
            with torch.no_grad():
                width = math.ceil(diffusion.num_timesteps / 100)  # the difference is far above the rounding
                other = step - width if step >= width else min(step + width, diffusion.num_timesteps - 1)
                slope = (predict(other) - pred) / (other - step) if other != step else torch.zeros_like(pred)
            pred = pred + shift[k] * slope
        u, w, A, B, C = rows[k].unbind()
        before, x_start = x_start, u * x + w * pred
        if bounds is not None:
            x_start = x_start.clamp(*bounds)
        x = A * x + B * x_start
        if before is not None:
            x = x + C * before
    return x


@torch.no_grad()
def _distance(diffusion: ReverseProcess, table: StepTable, x_T: Tensor, target: Tensor) -> float:
    """The mean squared error of a table's samples."""
    rows = table.rows[:, :5].to(x_T)
    errors = [
        (_steps(diffusion, x, table.t.tolist(), rows) - y).double().square().sum()
        for x, y in zip(x_T.split(BATCH), target.split(BATCH), strict=True)
    ]
    return float(sum(errors)) / target.numel()


def _taught(diffusion: ReverseProcess, n: int, seed: int, stream: int, bar: tqdm) -> tuple[Tensor, Tensor]:
    """n noises x_T, and the teacher's samples from them in the range of the network."""
    shape = (n, diffusion.channels, *diffusion.image_size)
    x_T = gaussian(shape, seed=seed, stream=stream, device=diffusion.device, dtype=diffusion.betas.dtype)
    table = samplers.dpmpp_2m(diffusion.schedule, diffusion.objective, min(TEACHER_STEPS, diffusion.num_timesteps))
    targets = []
    for x in x_T.split(BATCH):
        targets.append(diffusion.normalize(diffusion.sample(len(x), sampler=table, noise=x, seed=seed)))
        bar.update(len(x))
    return x_T, torch.cat(targets)


def _candidates(diffusion: ReverseProcess, steps: int) -> Iterator[list[int]]:
    """Lists of timesteps to begin with.

    They are even in a power of the angle of x_t = cos(angle) x_0 + sin(angle) eps, whatever the schedule. Some begin
    with T - 1, as solvers do. Others take x_T for the x_t of a smaller timestep, since x_T says nothing of x_0.
    """
    schedule = diffusion.schedule
    angles = torch.atan2(schedule.sqrt_one_minus_alphas_cumprod, schedule.sqrt_alphas_cumprod) / (math.pi / 2)
    for first, last, power, from_the_end in itertools.product(
        (0.96, 0.92, 0.88), (0.02, 0.06, 0.12), (1.0, 1.5), (False, True)
    ):
        falling = torch.linspace(1, 0, max(steps - from_the_end, 1), dtype=torch.float64) ** power
        t = (angles - (last + (first - last) * falling)[:, None]).abs().argmin(1).tolist()
        if from_the_end:
            t = [len(schedule) - 1, *t]
        if len(t) == steps and all(after < before for before, after in itertools.pairwise(t)):
            yield t


def _batches(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches, without end, in a new order each time through."""
    while True:
        yield from torch.randperm(n, generator=generator).split(BATCH)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Identifies the weights of a network: SHA-256 over their names, in alphabetical order, dtypes, shapes and values.

    Args:
        weights: by name, such as a state dict.

    Returns:
        64 hexadecimal digits, which do not depend on the device or on strides.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
