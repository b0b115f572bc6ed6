"""Schedulers with diffusers' interface that are right, by this project's tables, and copies with one fault each."""

import dataclasses

import torch

from ddpm_fast import samplers
from ddpm_fast.schedules import NoiseSchedule

OBJECTIVES = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}


class TableScheduler:
    """A sampler of this project as a scheduler, in float64."""

    sampler = "ddim"

    def __init__(
        self, num_train_timesteps=1000, trained_betas=None, prediction_type="epsilon", timestep_spacing="trailing"
    ):
        self.schedule = NoiseSchedule(trained_betas)
        assert len(self.schedule) == num_train_timesteps
        self.alphas_cumprod = self.schedule.alphas_cumprod
        self.prediction_type = prediction_type
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(self, steps):
        self.timesteps = self.spacing(steps)
        self.table = self.rows(
            samplers.make(
                self.sampler,
                self.schedule,
                OBJECTIVES[self.prediction_type],
                self.timesteps,
            )
        )
        self.k, self.previous = 0, 0.0

    def spacing(self, steps):
        T = len(self.schedule)
        return torch.arange(T, 0, -T / steps, dtype=torch.float64).round().long() - 1

    def rows(self, table):
        return table

    def noise(self, x, generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def step(self, prediction, t, x, generator=None):
        assert self.timesteps[self.k] == t
        row = {name: getattr(self.table, name)[self.k].item() for name in ("u", "w", "A", "B", "C", "sigma")}
        x_start = row["u"] * x + row["w"] * prediction
        following = row["A"] * x + row["B"] * x_start + row["C"] * self.previous
        if row["sigma"]:
            following = following + row["sigma"] * self.noise(x, generator)
        self.k, self.previous = self.k + 1, x_start
        return (following,)

    def add_noise(self, x_start, noise, t):
        a, s = (table[t].view(-1, 1, 1, 1) for table in self.factors(x_start.dtype))
        return a * x_start + s * noise

    def factors(self, dtype):
        return self.schedule.sqrt_alphas_cumprod.to(dtype), self.schedule.sqrt_one_minus_alphas_cumprod.to(dtype)


class DDPM(TableScheduler):
    sampler = "ddpm"


class DDIM(TableScheduler):
    pass


class DPMSolverMultistep(TableScheduler):
    sampler = "dpmpp_2m"


class DPMSolverMultistepSDE(TableScheduler):
    sampler = "dpmpp_2m_sde"

    def __init__(self, *args, algorithm_type="sde-dpmsolver++", **options):
        super().__init__(*args, **options)


def _replaced(table, **columns):
    return dataclasses.replace(table, **columns)


class WrongVariance(DDPM):
    """sigma^2 is beta, although the class does not say so."""

    def rows(self, table):
        large = samplers.make("ddpm", self.schedule, "pred_noise", self.timesteps, variance="beta")
        return _replaced(table, sigma=large.sigma)


class StepLeftOut(DDIM):
    """The third step returns x as it is."""

    def rows(self, table):
        A, B = table.A.clone(), table.B.clone()
        A[2], B[2] = 1, 0
        return _replaced(table, A=A, B=B)


class WrongSpacing(DDIM):
    """Leading, where it says trailing."""

    def spacing(self, steps):
        return torch.arange(steps).flip(0) * (len(self.schedule) // steps)


class NoiseInTheLastStep(DDPM):
    """sigma^2 of the last step is beta."""

    def rows(self, table):
        sigma = table.sigma.clone()
        sigma[-1] = self.schedule.betas[0].sqrt()
        return _replaced(table, sigma=sigma)


class HalfTable(DDIM):
    """The table is stored in float16, in which abar of the first timesteps is 1."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.alphas_cumprod = self.alphas_cumprod.half()


class FirstOrder(DPMSolverMultistep):
    """Never extrapolates, so that it is DDIM."""

    def rows(self, table):
        return _replaced(table, B=table.B + table.C, C=torch.zeros_like(table.C))


class ExtrapolatesTooFar(DPMSolverMultistep):
    """1 / r in place of 1 / 2r."""

    def rows(self, table):
        return _replaced(table, B=table.B - table.C, C=2 * table.C)


class WrongV(DDIM):
    """x_0 from v with the sign of eps."""

    def rows(self, table):
        return _replaced(table, w=-table.w) if self.prediction_type == "v_prediction" else table


class EndsAtTheFirstTimestep(DDIM):
    """Like set_alpha_to_one=False: the last step goes to abar_0."""

    def rows(self, table):
        a, s = self.schedule.sqrt_alphas_cumprod, self.schedule.sqrt_one_minus_alphas_cumprod
        A, B, t = table.A.clone(), table.B.clone(), table.t[-1]
        A[-1], B[-1] = s[0] / s[t], a[0] - s[0] / s[t] * a[t]
        return _replaced(table, A=A, B=B)


class IgnoresTheList(DDIM):
    """The next timestep is t - T // K, whatever the list says."""

    def rows(self, table):
        a, s = self.schedule.sqrt_alphas_cumprod, self.schedule.sqrt_one_minus_alphas_cumprod
        following = table.t - len(self.schedule) // len(table)
        inside = following >= 0
        a_next = torch.where(inside, a[following], 1.0)
        s_next = torch.where(inside, s[following], 0.0)
        A = s_next / s[table.t]
        return _replaced(table, A=A, B=a_next - A * a[table.t])


class HalfAddNoise(DDIM):
    """1 - abar is computed in the dtype of the images."""

    def factors(self, dtype):
        abar = self.alphas_cumprod.to(dtype)
        return abar.sqrt(), (1 - abar).sqrt()


class LosesNoise(DDPM):
    """sigma^2 is rounded to the dtype of the images as a part of 1."""

    def noise(self, x, generator):
        sigma = self.table.sigma[self.k]
        rounded = 1 - (1 - sigma**2).to(x.dtype)
        return rounded.sqrt() / sigma * super().noise(x, generator)


class IgnoresTheGenerator(DDPM):
    def noise(self, x, generator):
        return super().noise(x, None)


class Clips(DDIM):
    def step(self, prediction, t, x, generator=None):
        return (super().step(prediction, t, x, generator)[0].clamp(-1, 1),)


class NotANumber(DDIM):
    """With all T timesteps, the last step is 0 / 0."""

    def step(self, prediction, t, x, generator=None):
        (following,) = super().step(prediction, t, x, generator)
        return (following * float("nan") if t == 0 else following,)
