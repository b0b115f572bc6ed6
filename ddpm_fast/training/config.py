"""The configuration of a run: one JSON file, validated before training starts."""

__all__ = ["ConfigError", "RunConfig", "build_diffusion", "build_network", "check", "expanded", "load"]

import json
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from .. import loss_weights, parameterization, samplers, schedules, variances
from ..diffusion import LOSS_TYPES, GaussianDiffusion
from ..nn.unet import UNet
from ..timestep_sampling import TIMESTEP_SAMPLERS

LARGEST = 1 << 20  # bytes of a config


class ConfigError(ValueError):
    """The config cannot be used. The message has one line for each invalid key."""


def _name_in(registry: Collection[str]) -> AfterValidator:
    """Validates that a string is a name in `registry`, which is read at validation: names added later are valid."""

    def check(name: str) -> str:
        if name not in registry:
            raise PydanticCustomError("name", "one of {names}", {"names": ", ".join(registry)})
        return name

    return AfterValidator(check)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


AnyPath = Annotated[Path, Field(strict=False)]  # in Python, a string as well


class DigitsData(_Section):
    """The 1,797 scanned digits that scikit-learn ships: 8 x 8, one channel."""

    name: Literal["digits"]
    flip: bool = False


class IdxData(_Section):
    """The images in one IDX file, the format of MNIST and Fashion-MNIST, optionally gzipped."""

    name: Literal["idx"]
    path: AnyPath
    flip: bool = False


class Cifar10Data(_Section):
    """CIFAR-10 through torchvision, downloaded to `path` unless it is there already."""

    name: Literal["cifar10"]
    path: AnyPath = Path("data")
    flip: bool = True


class CelebAData(_Section):
    """CelebA through torchvision, downloaded to `path` unless it is there already; cropped to a square."""

    name: Literal["celeba"]
    path: AnyPath = Path("data")
    image_size: int = Field(gt=0)
    flip: bool = True


class FolderData(_Section):
    """All images in a folder and its subfolders, resized and cropped to a square."""

    name: Literal["folder"]
    path: AnyPath
    image_size: int = Field(gt=0)
    channels: Literal[1, 3] = 3
    flip: bool = False


DataConfig = Annotated[
    Union[DigitsData, IdxData, Cifar10Data, CelebAData, FolderData],  # noqa: UP007
    Field(discriminator="name"),
]


Size = Annotated[int, Field(gt=0, le=1 << 16)]
Sizes = Annotated[tuple[Size, ...], Field(max_length=16)]  # one for each level, each of which halves an image


class ModelConfig(_Section):
    """The arguments of `UNet`. With `preset`, they override those of the preset."""

    preset: str | None = None
    image_size: Size | None = None
    channels: Size | None = None
    dim: Size | None = None
    dim_mults: Sizes | None = None
    num_res_blocks: int | None = Field(None, gt=0, le=100)
    attention_resolutions: Sizes | None = None
    num_heads: Size | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    norm_groups: int | None = Field(None, gt=0)
    norm_eps: float | None = Field(None, gt=0)
    gradient_checkpointing: bool | None = None


class DiffusionConfig(_Section):
    """The arguments of `GaussianDiffusion`. The defaults are those of Ho et al. (2020), not of the class.

    Names are validated against the registries of the package, so that objectives, schedules, variances, loss weights,
    samplers and spacings that another package has registered can be used in a config.
    """

    timesteps: int = Field(1000, gt=0, le=100_000)
    sampling_timesteps: int | None = Field(None, gt=0)
    sampler: Annotated[str, _name_in(samplers.SAMPLERS)] | None = None
    spacing: Annotated[str, _name_in(samplers.SPACINGS)] | None = None
    objective: Annotated[str, _name_in(parameterization.OBJECTIVES)] = "pred_noise"
    beta_schedule: Annotated[str, _name_in(schedules.SCHEDULES)] = "linear"
    schedule_fn_kwargs: dict[str, float] = {}
    zero_terminal_snr: bool = False
    variance: Annotated[str, _name_in(variances.NAMES)] = "posterior"
    clip_denoised: bool | tuple[float, float] = True
    loss_type: Annotated[str, _name_in(LOSS_TYPES)] | None = None
    loss_weight: Annotated[str, _name_in(loss_weights.LOSS_WEIGHTS)] = "l_simple"
    min_snr_gamma: float = Field(5.0, gt=0)
    p2_gamma: float = Field(1.0, ge=0)
    p2_k: float = Field(1.0, gt=0)
    ddim_sampling_eta: float = Field(0.0, ge=0)


def _decays(value: Any) -> float | tuple[float, ...]:
    """A decay, or several that are different."""
    several = isinstance(value, list | tuple)
    decays = list(value) if several else [value]
    numbers = all(isinstance(d, int | float) and not isinstance(d, bool) and 0 <= d < 1 for d in decays)
    if not (numbers and 0 < len(set(decays)) == len(decays)):
        needed = "a number of at least 0 and below 1, or a list of different ones, the first of which is the default"
        raise PydanticCustomError("decays", needed)
    return tuple(map(float, decays)) if several else float(value)


class TrainingConfig(_Section):
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0)
    warmup: int = Field(0, ge=0, description="number of steps over which the learning rate rises from 0")
    cosine_decay: bool = Field(False, description="decay the learning rate to 0 at the last step")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float | None = Field(1.0, gt=0, description="upper bound of the gradient's norm")
    ema_decay: Annotated[float | tuple[float, ...], BeforeValidator(_decays)] = 0.9999
    ema_snapshot_every: int | None = Field(
        None, gt=0, description="steps between snapshots of averages, for post-hoc EMA of any length; null: none"
    )
    timestep_sampling: Annotated[str, _name_in(TIMESTEP_SAMPLERS)] = Field(
        "uniform", description="how timesteps are drawn; loss_second_moment: those with large losses more often"
    )
    max_skipped: int = Field(
        10, gt=0, description="the training stops after so many steps in a row whose loss or gradient is not finite"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the network's computation; weights are fp32; auto: bf16 where the device computes in it"
    )
    save_every: int = Field(5000, gt=0)
    sample_every: int = Field(5000, gt=0)
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="processes that decode image files; null: chosen by the number of cores; 0: none",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="where the loss, the samples and more are sent to while the training goes on"
    )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of all averages; the first is the default."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)


class RunConfig(_Section):
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` replaced by the home folder.

    Raises:
        ConfigError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no home folder for the `~` of this path") from None


def load(path: str | Path) -> RunConfig:
    """Reads a config from a JSON file, or a config that ships with the package by its name, such as `digits`.

    Raises:
        ConfigError: the file does not exist or is not JSON, or, with one line each, keys that are unknown, missing
            or have a value that is not allowed.
    """
    path = expanded(path)
    shipped = {Path(f.name).stem: f for f in (files("ddpm_fast") / "configs").iterdir()}
    if not path.is_file() and str(path) not in shipped:
        raise ConfigError(f"{path}: no such file, and none of the shipped configs: {', '.join(sorted(shipped))}")
    with (path if path.is_file() else shipped[str(path)]).open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: a config has at most {LARGEST:,} bytes")
    try:
        # Given bytes, json.loads finds the encoding: UTF-8, with a byte order mark or without, UTF-16 or UTF-32.
        values = json.loads(content, object_pairs_hook=_with_distinct_keys, parse_constant=_refuse_constant)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    return check(values, path)


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. A key that is given twice is an error: one of the values would be ignored."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"the key {max(keys, key=keys.count)!r} is given twice in one section")
    return values


def _refuse_constant(literal: str) -> NoReturn:
    raise ConfigError(f"{literal} is not JSON, and no key takes it; needed: a finite number")


def check(values: Any, source: str | Path = "config") -> RunConfig:
    """Validates decoded JSON.

    Args:
        source: named at the beginning of each line of an error.

    Raises:
        ConfigError: with one line each, keys that are unknown, missing or have a value that is not allowed.
    """
    try:
        # Validated as JSON again: strict mode then takes a list for a tuple and a string for a path.
        return RunConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(values, e) for e in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _explain(values: Any, error: dict) -> str:
    """One line of an error message: the key, what was given, and what is allowed."""
    if error["type"] == "json_invalid":  # such as a lone surrogate in a string
        return f"the file: {error['msg']}"
    tags = {get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(DataConfig)[0])}
    path = [part for part in error["loc"] if not (error["loc"][0] == "data" and part in tags)]
    key = ".".join(map(str, path)) or "the file"
    given = f"given {error['input']!r}"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key, {given}; allowed here: {', '.join(_allowed(values, path[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"].startswith("union_tag"):
        return f"{key}.name: given {values['data'].get('name')!r}; allowed: {', '.join(sorted(tags))}"
    return f"{key}: {given}; needed: {error['msg'][0].lower()}{error['msg'][1:]}"


def _allowed(values: Any, path: list) -> list[str]:
    """The keys that the section at `path` may have."""
    section: Any = RunConfig
    for part in path:
        section = section.model_fields[part].annotation
        if part == "data":
            name = values["data"]["name"]
            kinds = get_args(section)
            section = next(k for k in kinds if name in get_args(k.model_fields["name"].annotation))
    return list(section.model_fields)


def build_network(config: RunConfig) -> UNet:
    """A `UNet` with new, random weights.

    Raises:
        ConfigError: the values are valid each, but not together.
    """
    arguments = config.model.model_dump(exclude_none=True)
    preset = arguments.pop("preset", None)
    if config.diffusion.variance in variances.LEARNED_VARIANCES:
        arguments["learned_variance"] = True
    try:
        return UNet.preset(preset, **arguments) if preset else UNet(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: more numbers than memory can hold
        raise ConfigError(f"model: {error}") from None


def build_diffusion(config: RunConfig) -> GaussianDiffusion:
    """A `GaussianDiffusion` around a `UNet` with new, random weights.

    Raises:
        ConfigError: the values are valid each, but not together.
    """
    model = build_network(config)
    try:
        return GaussianDiffusion(model, image_size=model.image_size, **config.diffusion.model_dump())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"diffusion: {error}") from None
