"""A run as one JSON file, checked before anything starts."""

__all__ = ["ConfigError", "RunConfig", "build_diffusion", "load"]

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..diffusion import GaussianDiffusion
from ..nn.unet import UNet


class ConfigError(ValueError):
    """What is wrong with a config, a line for each key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DigitsData(_Section):
    """The 1,797 scanned digits that scikit-learn ships: 8 x 8, one channel."""

    name: Literal["digits"]
    flip: bool = False


class IdxData(_Section):
    """Images in one IDX file, as MNIST and Fashion-MNIST ship them, gzipped or not."""

    name: Literal["idx"]
    path: Path
    flip: bool = False


class Cifar10Data(_Section):
    """CIFAR-10 through torchvision, downloaded to `path` where it is not there."""

    name: Literal["cifar10"]
    path: Path = Path("data")
    flip: bool = True


class CelebAData(_Section):
    """CelebA through torchvision, downloaded to `path` where it is not there; cropped to a square."""

    name: Literal["celeba"]
    path: Path = Path("data")
    image_size: int = Field(gt=0)
    flip: bool = True


class FolderData(_Section):
    """All images below a folder, resized and cropped to a square."""

    name: Literal["folder"]
    path: Path
    image_size: int = Field(gt=0)
    channels: Literal[1, 3] = 3
    flip: bool = False


DataConfig = Annotated[
    Union[DigitsData, IdxData, Cifar10Data, CelebAData, FolderData],  # noqa: UP007
    Field(discriminator="name"),
]


class ModelConfig(_Section):
    """The arguments of `UNet`, over those of a preset."""

    preset: str | None = None
    image_size: int | None = Field(None, gt=0)
    channels: int | None = Field(None, gt=0)
    dim: int | None = Field(None, gt=0)
    dim_mults: tuple[int, ...] | None = None
    num_res_blocks: int | None = Field(None, gt=0)
    attention_resolutions: tuple[int, ...] | None = None
    num_heads: int | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)
    norm_groups: int | None = Field(None, gt=0)
    norm_eps: float | None = Field(None, gt=0)
    gradient_checkpointing: bool | None = None


class DiffusionConfig(_Section):
    """The arguments of `GaussianDiffusion`. The defaults are those of Ho et al. (2020), not of the class."""

    timesteps: int = Field(1000, gt=0)
    sampling_timesteps: int | None = Field(None, gt=0)
    objective: Literal["pred_noise", "pred_x0", "pred_v", "pred_mean"] = "pred_noise"
    beta_schedule: str = "linear"
    schedule_fn_kwargs: dict[str, float] = {}
    variance: Literal["posterior", "beta"] = "posterior"
    clip_denoised: bool | tuple[float, float] = True
    loss_type: Literal["l2", "l1", "huber"] = "l2"
    loss_weight: Literal["simple", "snr", "min_snr", "vlb"] = "snr"
    min_snr_gamma: float = Field(5.0, gt=0)
    ddim_sampling_eta: float = Field(0.0, ge=0)


class TrainingConfig(_Section):
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    lr: float = Field(gt=0)
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    cosine_decay: bool = Field(False, description="let the learning rate fall to 0 at the last step")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float | None = Field(1.0, gt=0, description="bound of the gradient's norm")
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the network's arithmetic; weights stay fp32")
    save_every: int = Field(5000, gt=0)
    sample_every: int = Field(5000, gt=0)


class RunConfig(_Section):
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig


def load(path: str | Path) -> RunConfig:
    """Reads a config: a file, or the name of one that is shipped, such as `digits`.

    Raises:
        ConfigError: no such file, no JSON, or, a line each: an unknown key, a missing one, a value not allowed.
    """
    path = Path(path)
    shipped = {Path(f.name).stem: f for f in (files("ddpm_fast") / "configs").iterdir()}
    if not path.is_file() and str(path) not in shipped:
        raise ConfigError(f"{path}: no such file, and none of the shipped configs: {', '.join(sorted(shipped))}")
    try:
        text = (path if path.is_file() else shipped[str(path)]).read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_once)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    return check(values, path)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ: the later of two would win in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"the key {max(keys, key=keys.count)!r} is given twice in one section")
    return values


def check(values: Any, source: str | Path = "config") -> RunConfig:
    """Makes a `RunConfig` of decoded JSON."""
    try:
        return RunConfig.model_validate_json(json.dumps(values))  # strict, but a list is JSON's tuple
    except ValidationError as error:
        lines = [_explain(values, e) for e in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _explain(values: Any, error: dict) -> str:
    """One line: the key, what was given, what is allowed."""
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
    """The keys of the section at a path."""
    section: Any = RunConfig
    for part in path:
        section = section.model_fields[part].annotation
        if part == "data":
            name = values["data"]["name"]
            kinds = get_args(section)
            section = next(k for k in kinds if name in get_args(k.model_fields["name"].annotation))
    return list(section.model_fields)


def build_diffusion(config: RunConfig) -> GaussianDiffusion:
    """The network and the diffusion around it, with fresh weights.

    Raises:
        ConfigError: arguments that do not fit one another.
    """
    arguments = config.model.model_dump(exclude_none=True)
    preset = arguments.pop("preset", None)
    try:
        model = UNet.preset(preset, **arguments) if preset else UNet(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None
    try:
        return GaussianDiffusion(model, image_size=model.image_size, **config.diffusion.model_dump())
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from None
