"""What a run will take: its time, its memory and its disk, and what other settings would change.

All times are measured over a few steps, and scaled; the memory is a sum over the tensors of a step.
"""

__all__ = ["Estimate", "Variant", "duration", "estimate"]

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..training import averages, checkpoint
from ..training.config import RunConfig, build_diffusion
from ..training.precision import chosen
from ..training.report import PREVIEW_STEPS
from ..training.run import ROWS, pick_device
from ..training.snapshots import TRACKED
from .memory import free_memory
from .step_cost import StepCost, in_processes, measure, sampling_time

# The share of the free memory that the tensors of a run may take. On a CPU, a process with the network for CIFAR-10
# grew by up to 2.2 times as much as its tensors: oneDNN needs memory of its own, and malloc keeps what is freed.
ROOM, ROOM_ON_CPU = 0.9, 0.4
CLEARLY = 1.05  # times as fast, to be recommended: repeated measurements differ by some percent
LINK = 20e9  # bytes a second between GPUs, of PCIe 4.0 with 16 lanes; NVLink has ten times as many
PREVIEW, SAMPLES = 16, 64  # images in a preview, and in samples.png


@dataclass(frozen=True)
class Variant:
    """A config, or the config with one change.

    Attributes:
        name: the change, for the user.
        step: seconds of a training step.
        memory: bytes of a step, of all processes on one device together.
        of_an_image: bytes by which one image more raises it.
        largest: the largest batch that fits into the free memory; None if that is not known.
    """

    name: str
    step: float
    memory: int
    of_an_image: int
    largest: int | None


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        config: of the run.
        device: that is measured, with the precision.
        parameters: how many the network has.
        timed: images in the batches that were timed.
        pictures: seconds for previews and pictures.
        checkpoint: bytes of one.
        snapshots: bytes of all that post-hoc EMA keeps.
        pictures_size: bytes of these, approximately.
        free_memory, free_disk: bytes; None where that is not known.
        variants: the config itself, and others.
        note: what was assumed of more processes.
    """

    config: RunConfig
    device: str
    parameters: int
    timed: int
    pictures: float
    checkpoint: int
    snapshots: int
    pictures_size: int
    free_memory: int | None
    free_disk: int
    variants: list[Variant]
    note: str

    def __str__(self) -> str:
        c, own = self.config.training, self.variants[0]
        scaled = "" if self.timed == c.batch_size else f", scaled from batches of {self.timed}"
        disk = (checkpoint.KEEP + 1) * self.checkpoint + self.snapshots + self.pictures_size
        free = "" if self.free_memory is None else f", {_size(self.free_memory)} of memory free"
        saved = f"{checkpoint.KEEP} checkpoints of {_size(self.checkpoint)}, and one more while it is saved"
        snapshots = f"{_size(self.snapshots)} of snapshots for post-hoc EMA, " if self.snapshots else ""
        too_little = ", which is too little" if disk > self.free_disk else ""
        lines = {
            "network": f"{self.parameters:,} parameters",
            "device": f"{self.device}{free}",
            "step": f"{own.step:.3g} s for {c.batch_size} images{scaled}",
            "run": f"{duration(own.step * c.steps)} for {c.steps:,} steps, {duration(self.pictures)} for pictures",
            "memory": f"{_size(own.memory)} of tensors, {_size(own.of_an_image)} for each image; a process takes more",
            "disk": f"{_size(disk)}: {saved}, {snapshots}and {_size(self.pictures_size)} of pictures; "
            f"{_size(self.free_disk)} are free here{too_little}",
        }
        told = [f"{name:<9} {value}" for name, value in lines.items()]
        return "\n".join([*told, "", *self._table(), self.note, "", self.recommendation()])

    def _table(self) -> list[str]:
        c = self.config.training
        rows = [("", "s/step", "images/s", "memory/image", "largest batch", "whole run")]
        for v in self.variants:
            largest = "not known" if v.largest is None else f"{v.largest:,}"
            of_run = duration(v.step * c.steps)
            speed = f"{c.batch_size / v.step:.3g}"
            rows.append((v.name, f"{v.step:.3g}", speed, _size(v.of_an_image), largest, of_run))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]

    def recommendation(self) -> str:
        """Which of the variants to take, and why."""
        own, batch = self.variants[0], self.config.training.batch_size
        fitting = [v for v in self.variants if v.largest is None or v.largest >= batch]
        if not fitting:
            largest = max(self.variants, key=lambda v: v.largest)
            if not largest.largest:
                return "recommended: a smaller network: not even one image fits into the free memory"
            return (
                f"recommended: {largest.name} with a training.batch_size of at most {largest.largest:,}: "
                f"{batch:,} images do not fit into the free memory"
            )
        best = min(fitting, key=lambda v: v.step)
        if own not in fitting:
            return f"recommended: {best.name}: as configured, {batch:,} images do not fit into the free memory"
        if own.step < CLEARLY * best.step:
            return "recommended: the config as it is; nothing in this table is clearly faster"
        return f"recommended: {best.name}, {own.step / best.step:.2g} times as fast"


def estimate(config: RunConfig) -> Estimate:
    """Measures training steps on random images of the config's size, with the config and with one change each.

    The changes are the other precision, gradient checkpointing, and more processes: on the CPU two of them, which
    divide its threads and are measured; on GPUs, of which one is measured, as many as there are and at least two, by a
    model in which they divide the images and then exchange the gradients.

    Raises:
        ConfigError: the values of the config are valid each, but not together.
    """
    device, batch = pick_device(), config.training.batch_size
    free, precision = free_memory(device), chosen(config.training.precision, device)
    room = None if free is None else free * (ROOM_ON_CPU if device.type == "cpu" else ROOM)
    diffusion = build_diffusion(config)
    own = measure(config, device)
    variants = [_variant(f"as configured ({precision})", own, batch, room)]
    for name, other in _changes(config, precision):
        variants.append(_variant(name, measure(other, device), batch, room))
    several, note = _several(config, device, own, room)
    threads = f", {_threads(torch.get_num_threads())}" if device.type == "cpu" else ""
    calls = len(diffusion.step_table()) * (SAMPLES + ROWS)
    previews = (config.training.steps - 1) // config.training.sample_every
    calls += previews * PREVIEW * min(PREVIEW_STEPS, diffusion.num_timesteps)
    trained = sum(p.nbytes for p in diffusion.parameters())
    every = config.training.ema_snapshot_every
    snapshots = config.training.steps // every if every else 0
    pixels = diffusion.channels * diffusion.image_size[0] * diffusion.image_size[1]
    return Estimate(
        config=config,
        device=f"{device}{threads}, {precision}",
        parameters=sum(p.numel() for p in diffusion.model.parameters()),
        timed=own.images,
        pictures=calls * sampling_time(config, device, own.image),
        checkpoint=(1 + averages.count(config.training)) * own.weights + 2 * trained,
        snapshots=snapshots * len(TRACKED) * own.weights // 2,
        pictures_size=pixels * (previews * PREVIEW + SAMPLES + 11 * ROWS),  # PNG hardly compresses noise
        free_memory=free,
        free_disk=shutil.disk_usage(Path.cwd()).free,
        variants=variants + several,
        note=note,
    )


def _changes(config: RunConfig, precision: str) -> list[tuple[str, RunConfig]]:
    """The config with another precision, and with or without gradient checkpointing, each with the key in a config."""
    other = "fp32" if precision != "fp32" else "bf16"
    now = bool(config.model.gradient_checkpointing)
    changes = {"training": {"precision": other}, "model": {"gradient_checkpointing": not now}}
    return [
        (
            f"{section}.{key} = {str(value).lower()}",
            config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})}),
        )
        for section, change in changes.items()
        for key, value in change.items()
    ]


def _variant(name: str, cost: StepCost, batch: int, room: float | None, processes: int = 1) -> Variant:
    """A variant on one device, whose memory its processes share."""
    own = -(-batch // processes)  # images of a process
    largest = None if room is None else processes * cost.memory.largest(room / processes)
    memory = processes * cost.memory.bytes(own)
    return Variant(name, cost.seconds(batch), memory, cost.memory.of_an_image(own), largest)


def _several(config: RunConfig, device: torch.device, own: StepCost, room: float | None) -> tuple[list[Variant], str]:
    """The variant with several processes, if there can be any, and what was assumed."""
    batch = config.training.batch_size
    if batch < 2:
        return [], "more processes: one image cannot be divided among them"
    if device.type == "cpu":
        threads = torch.get_num_threads() // 2
        if not threads:
            return (
                [],
                "more processes: one thread cannot be divided among them (OMP_NUM_THREADS sets how many there are)",
            )
        name = f"2 processes, {_threads(threads)} each"
        found = _variant(name, in_processes(config, 2, own), batch, room, processes=2)
        return [found], "processes: they divide the threads and the images, and add up their gradients"
    count = max(2, torch.accelerator.device_count())
    exchange = 2 * (count - 1) / count * own.weights / LINK  # a ring: each sends and receives all but its own part
    share = -(-batch // count)
    largest = None if room is None else count * own.memory.largest(room)
    step = own.update + own.image * share + exchange
    found = Variant(f"{count} devices", step, own.memory.bytes(share), own.memory.of_an_image(share), largest)
    how = f"they divide the images, and add up their gradients at {LINK / 1e9:.0f} GB/s"
    return [found], f"devices: computed, not measured: {how}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _size(size: float) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}" if size < 1000 * bytes_ else f"{size / bytes_:,.0f} {unit}"
    return f"{size / 2**10:.3g} KiB"


def duration(seconds: float) -> str:
    """Seconds in words, in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"
