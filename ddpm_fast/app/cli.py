"""The command line: ddpm-fast demo | train | sample | info | estimate."""

__all__ = ["main"]

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .. import info
from ..samplers import SAMPLERS


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.command is info.main:
        return info.main()
    try:
        from ..training import checkpoint, config, data, trainer
    except ModuleNotFoundError as error:
        sys.exit(f'ddpm-fast {options.name} needs {error.name}: pip install "ddpm_fast[train]"')
    try:
        return options.command(options)
    except (config.ConfigError, data.DataError, checkpoint.CheckpointError, trainer.RunError, OSError) as error:
        sys.exit(f"ddpm-fast {options.name}: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\nddpm-fast {options.name}: {str(interrupt) or 'stopped'}", file=sys.stderr)
        sys.exit(128 + getattr(interrupt, "number", signal.SIGINT))  # as shells report a program that a signal ended


def demo(options: argparse.Namespace) -> None:
    from . import demo

    started = time.perf_counter()
    folder = _unused(options.out)
    metrics = demo.run(folder).metrics
    share, counts = metrics["recognised_share"], metrics["recognised_digits"]
    print(f"\nloss {metrics['loss']:.4f}, {metrics['images_per_second']:.0f} images/s in training")
    print(f"{share:.0%} of {demo.JUDGED} samples are recognised as a digit with probability over {demo.CONFIDENT}:")
    print(", ".join(f"{n} x {digit}" for digit, n in enumerate(counts)))
    print(f"{time.perf_counter() - started:.0f} s in all; see samples.png and more in {folder}")


def train(options: argparse.Namespace) -> None:
    from ..training import config, trainer
    from ..training.run import pictures_are_due, write_pictures

    chosen = config.load(options.config)
    folder = options.out or Path("runs", Path(options.config).stem)
    run = trainer.train(chosen, folder, resume=options.resume)
    if pictures_are_due(run):
        write_pictures(run, seed=chosen.seed)
    print(f"\nloss {run.metrics['loss']:.4f}, {run.metrics['images_per_second']:.1f} images/s; see {folder}")


def sample(options: argparse.Namespace) -> None:
    from ..training import trainer
    from .generate import write_samples

    run = trainer.load_run(options.run)
    chosen = {name: getattr(options, name) for name in ("n", "seed", "sampler", "steps")}
    try:
        written = write_samples(run, options.out, **chosen)
    except ValueError as error:
        sys.exit(f"ddpm-fast sample: {error}")
    if os.environ.get("RANK", "0") == "0":  # of the processes that a launcher started, one speaks
        print(written)


def estimate(options: argparse.Namespace) -> None:
    from ..training import config
    from .estimate import estimate

    print(estimate(config.load(options.config)))


def _unused(folder: Path) -> Path:
    """The folder, or one numbered after it: a demo is run again and again, and no run is overwritten."""
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ddpm-fast", description="Denoising diffusion models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")

    def command(function, name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    def config_argument(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "config", metavar="CONFIG.json", help="a JSON file, or the name of a shipped one, such as digits"
        )

    p = command(demo, "demo", "Train on scanned digits and sample, in three minutes on a laptop's CPU.")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")

    p = command(train, "train", "Train a model as a config says.")
    config_argument(p)
    p.add_argument("--out", type=Path, help="folder to write (default: runs/ and the config's name)")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")

    p = command(sample, "sample", "Sample images from a trained model.")
    p.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or one of its checkpoints")
    p.add_argument("-n", type=int, default=64, help="how many (default: %(default)s)")
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image i of a seed is the same however many there are (default: 0)",
    )
    p.add_argument("--sampler", choices=SAMPLERS, help="default: ddpm for all steps; for fewer, dpmpp_2m with --steps")
    p.add_argument("--steps", type=int, help="default: as the run's config says, with ddpm, or ddim if fewer than all")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="NAME.png for a grid (default: %(default)s), else a folder with one PNG an image",
    )

    command(info.main, "info", "Versions, devices and backends, and why one is missing.")

    p = command(estimate, "estimate", "Seconds and memory of a training step, measured over a few.")
    config_argument(p)
    return parser
