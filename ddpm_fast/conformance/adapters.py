"""Classes with diffusers' scheduler interface, and plain functions, as samplers that the kit can run."""

__all__ = ["Claim", "FunctionSampler", "SchedulerSampler", "claim_of"]

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import choice, options
from ..samplers import SAMPLERS
from ..schedules import NoiseSchedule
from ..variances import LEARNED_VARIANCES
from .gaussian import Network
from .measure import CannotCheck

PREDICTIONS = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}
INTERFACE = ("set_timesteps", "step")


@dataclass(frozen=True)
class Claim:
    """A published algorithm: a name in `samplers.SAMPLERS`, and its options.

    Raises:
        ValueError: an unknown name or option, or a variance that the network predicts.
    """

    sampler: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        function = SAMPLERS[choice("claim", self.sampler, SAMPLERS)]
        options(f"sampler {self.sampler!r}", function, self.options, skip=3)
        if str(self.options.get("variance", "")) in LEARNED_VARIANCES:
            raise ValueError("the kit's network predicts no variance; claim 'posterior' or 'beta'")

    def __str__(self) -> str:
        options = ", ".join(f"{key} = {value}" for key, value in self.options.items())
        return f"{self.sampler}({options})" if options else self.sampler


class SchedulerSampler:
    """A class with diffusers' scheduler interface.

    Every run makes a new instance. `trained_betas` are those of the schedule, if the class takes them and the options
    name no schedule of its own; `clip_sample` is off unless the options say otherwise, since clipping is not affine.

    Args:
        cls: `cls(num_train_timesteps=T, ...)` has `set_timesteps(K)`, `timesteps` and `step(prediction, t, x)`, which
            returns a tuple that begins with the next x, or an object with `prev_sample`; and if it likes,
            `scale_model_input(x, t)`, `init_noise_sigma`, `add_noise(x_0, noise, t)`, `alphas_cumprod` and `betas`.
        schedule: of the forward process.
        options: arguments of the class.
        step_options: arguments of `step`, such as eta.

    Raises:
        CannotCheck: the class lacks part of the interface, or does not take an option.
    """

    def __init__(
        self,
        cls: type,
        schedule: NoiseSchedule,
        options: Mapping[str, Any] | None = None,
        step_options: Mapping[str, Any] | None = None,
    ) -> None:
        missing = [name for name in INTERFACE if not callable(getattr(cls, name, None))]
        if missing:
            raise CannotCheck(f"{cls.__name__} has no {' and no '.join(missing)}, which a scheduler needs")
        self.cls, self.given = cls, dict(options or {})
        unknown = [name for name in self.given if not self.takes(name)]
        if unknown:
            raise CannotCheck(f"{cls.__name__} has no argument {unknown[0]!r}; it takes {', '.join(_arguments(cls))}")
        self.step_options = dict(step_options or {})
        self._step_takes = inspect.signature(cls.step).parameters
        self.takes_generator = "generator" in self._step_takes
        self.schedule = schedule
        own = {"beta_schedule", "beta_start", "beta_end", "trained_betas"} & set(self.given)
        self.takes_betas = self.takes("trained_betas") and not own
        defaults: dict[str, Any] = {"num_train_timesteps": len(schedule)}
        if self.takes_betas:
            defaults["trained_betas"] = schedule.betas.tolist()
        if self.takes("clip_sample"):
            defaults["clip_sample"] = False
        self.options = {key: value for key, value in defaults.items() if self.takes(key)} | self.given
        instance = self.make()
        if not self.takes_betas:
            self.schedule = _schedule_of(instance)
        self.objective = PREDICTIONS.get(self.said("prediction_type", "epsilon"), "pred_noise")

    def takes(self, name: str) -> bool:
        """Whether the class has an argument of this name."""
        return name in _arguments(self.cls)

    def said(self, name: str, default: Any = None) -> Any:
        """The value of an argument of the class: as given, or its default."""
        if name in self.options:
            return self.options[name]
        parameter = _arguments(self.cls).get(name)
        return default if parameter is None or parameter.default is parameter.empty else parameter.default

    def changed(self, schedule: NoiseSchedule | None = None, **options: Any) -> "SchedulerSampler":
        """The same class with other options, or on another schedule."""
        return SchedulerSampler(self.cls, schedule or self.schedule, self.given | options, self.step_options)

    def make(self) -> Any:
        """A new instance."""
        return self.cls(**self.options)

    def table(self) -> Tensor | None:
        """`alphas_cumprod` of an instance, in the dtype it has there; None if there is none of the right shape."""
        table = getattr(self.make(), "alphas_cumprod", None)
        if table is None:
            return None
        table = torch.as_tensor(table)
        return table if table.shape == self.schedule.betas.shape else None

    def step(self, scheduler: Any, prediction: Tensor, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        options = dict(self.step_options)
        if self.takes_generator:
            options["generator"] = generator
        output = scheduler.step(prediction, t, x, **options)
        return output[0] if isinstance(output, tuple) else output.prev_sample

    def run(self, network: Network, x_T: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        scheduler = self.make()
        scheduler.set_timesteps(steps)
        x = x_T * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = self.step(scheduler, network(scaled, t), t, x, generator)
        return x


class FunctionSampler:
    """A function f(denoiser, x_T, abar, steps, generator) -> x_0.

    Args:
        function: is given `denoiser(x, t)`, which returns E[x_0 | x_t = x] in the shape of x for one timestep t of
            0 ... T - 1 (a number or a tensor of equal numbers); x_T, (N, D, 1, 1); abar, (T,), float64, falling; the
            number of steps, an int; and a torch.Generator, from which all noise is to be drawn.
        schedule: of the forward process.
    """

    objective = "pred_x0"

    def __init__(self, function: Callable[..., Tensor], schedule: NoiseSchedule) -> None:
        self.function, self.schedule = function, schedule

    def changed(self, schedule: NoiseSchedule) -> "FunctionSampler":
        """The same function on another schedule."""
        return FunctionSampler(self.function, schedule)

    def run(self, network: Network, x_T: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        return self.function(network, x_T, self.schedule.alphas_cumprod, steps, generator)


def _arguments(cls: type) -> Mapping[str, inspect.Parameter]:
    """The arguments of a class by their names; those of its bases too, while **kwargs pass them on."""
    arguments: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        arguments = {p.name: p for p in named} | arguments
        if len(named) == len(parameters) or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
            break
    return arguments


def claim_of(sampler: SchedulerSampler | FunctionSampler) -> Claim | None:
    """The published algorithm that a class says it is, by its name and its options; None if this is not clear.

    The names and options are diffusers': DDPM with its `variance_type`, DDIM with the eta of `step`, DPM-Solver++ of
    first order, and of second order by its midpoint form.
    """
    if isinstance(sampler, FunctionSampler):
        return None
    name, said = sampler.cls.__name__.lower(), sampler.said
    if "inverse" in name:
        return None
    if name.startswith("ddpm"):
        variances = {"fixed_small": "posterior", "fixed_large": "beta"}
        variance = variances.get(str(said("variance_type", "fixed_small")).removesuffix("_log"))
        return Claim("ddpm", {"variance": variance}) if variance else None
    if name.startswith("ddim"):
        parameter = sampler._step_takes.get("eta")
        default = 0.0 if parameter is None or parameter.default is parameter.empty else parameter.default
        return Claim("ddim", {"eta": float(sampler.step_options.get("eta", default))})
    if name.startswith("dpmsolvermultistep"):
        noisy = {"dpmsolver++": False, "sde-dpmsolver++": True}.get(said("algorithm_type", "dpmsolver++"))
        order = said("solver_order", 2)
        if noisy is None or said("final_sigmas_type", "zero") != "zero":
            return None
        if order == 1:
            return Claim("ddim", {"eta": float(noisy)})
        if order == 2 and said("solver_type", "midpoint") == "midpoint":
            return Claim("dpmpp_2m_sde" if noisy else "dpmpp_2m")
    return None


def _schedule_of(scheduler: Any) -> NoiseSchedule:
    """The schedule of an instance, from its betas, or else from its table."""
    betas = getattr(scheduler, "betas", None)
    if betas is not None:
        return NoiseSchedule(torch.as_tensor(betas), name=f"betas of {type(scheduler).__name__}")
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        raise CannotCheck(
            f"{type(scheduler).__name__} takes no trained_betas and has neither betas nor alphas_cumprod: its noise "
            f"levels are unknown"
        )
    abar = torch.as_tensor(abar, dtype=torch.float64)
    return NoiseSchedule(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]), name="alphas_cumprod")
