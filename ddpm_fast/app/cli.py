"""The command line.

ddpm-fast demo | train | watch | sample | reproduce | fit-sampler | evaluate | info | check | estimate
"""

__all__ = ["main"]

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import info, samplers, schedules

if TYPE_CHECKING:
    from ..training.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.command is info.main:
        return info.main()
    if options.command is check:  # like info, it needs no more than PyTorch
        return check(options)
    try:
        from ..training import checkpoint, config, data, pictures, run
    except ModuleNotFoundError as error:
        sys.exit(f'ddpm-fast {options.name} needs {error.name}: pip install "ddpm_fast[train]"')
    expected = (config.ConfigError, data.DataError, checkpoint.CheckpointError, pictures.PictureError)
    try:
        return options.command(options)
    except (*expected, run.RunError, OSError) as error:
        sys.exit(f"ddpm-fast {options.name}: {error}")
    except RuntimeError as error:
        # PyTorch raises this in the middle of any step, from a signal handler, when a process that loads images dies.
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(f"ddpm-fast {options.name}: a process that loads images has failed: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\nddpm-fast {options.name}: {str(interrupt) or 'stopped'}", file=sys.stderr)
        # The exit status with which shells report a program that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM.
        sys.exit(128 + getattr(interrupt, "number", signal.SIGINT))


def demo(options: argparse.Namespace) -> None:
    from ..training.config import expanded
    from . import demo

    started = time.perf_counter()
    folder = _unused(expanded(options.out))
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
    folder = _folder_of_run(config.expanded(options.config), chosen) if options.out is None else options.out
    folder = config.expanded(folder)
    print(f"{'continuing the run in' if options.resume else 'training into'} {folder}")
    run = trainer.train(chosen, folder, resume=options.resume)
    if pictures_are_due(run):
        write_pictures(run, seed=chosen.seed)
    print(f"\nloss {run.metrics['loss']:.4f}, {run.metrics['images_per_second']:.1f} images/s; see {folder}")


def watch(options: argparse.Namespace) -> None:
    from ..training.config import expanded
    from ..training.plots import save_course
    from .watched import read

    folder = expanded(options.run)
    if options.png is not None:
        course = read(folder)
        title = f"{folder}: step {course.step:,} of {course.steps:,}\n{course.facts}\n{course.state}"
        save_course(course.points, course.by_timestep, course.preview, title, expanded(options.png))
        return print(options.png)
    try:
        from . import watch
    except ModuleNotFoundError as error:
        sys.exit(f'ddpm-fast watch needs {error.name}: pip install "ddpm_fast[watch]"')
    return watch.watch(folder)


def sample(options: argparse.Namespace) -> None:
    from ..training.config import expanded
    from ..training.run import load_run
    from .generate import write_samples

    run = load_run(expanded(options.run), ema=options.ema)
    chosen = {name: getattr(options, name) for name in ("n", "seed", "sampler", "steps", "spacing", "precision")}
    try:
        written = write_samples(run, expanded(options.out), **chosen)
    except ValueError as error:
        sys.exit(f"ddpm-fast sample: {error}")
    if os.environ.get("RANK", "0") == "0":  # of several processes that a launcher started, the first one prints
        print(written)


def reproduce(options: argparse.Namespace) -> None:
    from ..training.config import expanded
    from ..training.pictures import save_picture
    from .reproduce import reproduce

    if options.out is not None and (len(options.images) > 1 or options.out.suffix.lower() != ".png"):
        sys.exit("ddpm-fast reproduce: --out is NAME.png for the one picture that is given")
    try:
        found = reproduce([expanded(path) for path in options.images], expanded(options.run))
    except ValueError as error:
        sys.exit(f"ddpm-fast reproduce: {error}")
    print("\n".join(map(str, found)))
    if options.out is not None and found[0].again is not None:
        save_picture(found[0].again, expanded(options.out), found[0].receipt)
    equal = sum(each.differences == 0 for each in found)
    if len(found) > 1:
        print(f"{equal} of {len(found)} pictures are equal")
    if equal < len(found):
        sys.exit(1)


def fit_sampler(options: argparse.Namespace) -> None:
    from ..fitting import fit_sampler
    from ..training.config import expanded
    from ..training.precision import autocast, chosen
    from ..training.run import load_run

    run = load_run(expanded(options.run), ema=options.ema)
    device = run.diffusion.device
    try:
        with autocast(device, chosen(options.precision, device)):
            table = fit_sampler(run.diffusion, options.steps, n=options.n, seed=options.seed, progress=True)
        path = run.diffusion.fitted.save(table)
    except ValueError as error:
        sys.exit(f"ddpm-fast fit-sampler: {error}")
    print(f"distance to the teacher's samples, on held-out noise: {table.start_distance:.4g} before the fit")
    print(f"{table.distance:.4g} after it; {path}, for ddpm-fast sample --sampler fitted --steps {len(table)}")


def evaluate(options: argparse.Namespace) -> None:
    from ..training.config import expanded
    from ..training.run import load_run
    from .evaluate import evaluate

    of_samples = ("n", "sampler", "steps", "spacing", "features", "inception_weights")
    chosen = {name: getattr(options, name) for name in (*of_samples, "real", "seed", "precision", "bound_images")}
    if options.n is None:
        del chosen["n"]
    if options.real is False and any(map(chosen.get, of_samples)):
        sys.exit(
            f"ddpm-fast evaluate: {', '.join(of_samples)} are for samples, which are compared with real images: "
            "add --real or --real DATA; the bound has --bound-images and --bound-steps"
        )
    run = load_run(expanded(options.run), ema=options.ema)
    try:
        report = evaluate(run, bound_steps=options.bound_steps or None, **chosen)
    except ValueError as error:
        sys.exit(f"ddpm-fast evaluate: {error}")
    if report is not None:
        print(f"\n{report}\nsee {run.folder / 'report.png'}")


def estimate(options: argparse.Namespace) -> None:
    from ..training import config
    from .estimate import estimate

    print(estimate(config.load(options.config)))


def check(options: argparse.Namespace) -> None:
    from ..conformance import CannotCheck
    from .check import run

    chosen = {name: getattr(options, name) for name in ("steps", "schedule", "timesteps", "claim", "precision")}
    chosen |= {"settings": options.set, "step_settings": options.set_step, "json_file": options.json}
    try:
        report = run(options.sampler, **chosen)
    except (CannotCheck, OSError) as error:
        sys.exit(f"ddpm-fast check: {error}")
    print(report.markdown())
    if not report.passed:
        sys.exit(1)


def _folder_of_run(path: Path, chosen: "RunConfig") -> Path:
    """runs/NAME for the config NAME or NAME.json. For the config.json that a run has written, the folder of that run.

    Raises:
        ConfigError: the name cannot be that of a folder.
    """
    from ..training import config, data

    if path.name == "config.json" and path.is_file():
        has_all_keys = json.loads(path.read_bytes()) == chosen.model_dump(mode="json")  # only a run writes all
        if has_all_keys or data.is_run(os.listdir(path.parent)):
            return path.parent
    if not path.stem.strip("."):
        raise config.ConfigError(f"{path}: a folder cannot have the name {path.stem!r}; choose a folder with --out")
    return Path("runs", path.stem)


def _unused(folder: Path) -> Path:
    """The folder, or if it exists, the same name with a number: the demo never overwrites an earlier run."""
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

    def run_argument(to: argparse.ArgumentParser) -> None:
        to.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or one of its checkpoints")
        to.add_argument(
            "--ema",
            default="default",
            metavar="NAME",
            help="which average of the weights: one of training.ema_decay of the run's config, such as 0.9999 "
            "(default: the first); sigma_rel=0.08 or another relative width, if the run has kept snapshots for "
            "post-hoc EMA; none for the weights themselves",
        )

    def precision_argument(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--precision",
            choices=("auto", "fp32", "bf16", "fp16"),
            default="auto",
            help="that the network is computed in (default: auto, which is bf16 where the device computes in it)",
        )

    def sampling_arguments(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--sampler",
            choices=(*samplers.SAMPLERS, "fitted"),
            help="default: diffusion.sampler of the run's config; if that is null, ddpm for all steps, and for fewer, "
            "dpmpp_2m with --steps and ddim without",
        )
        to.add_argument("--steps", type=int, help="default: diffusion.sampling_timesteps of the run's config")
        to.add_argument(
            "--spacing",
            choices=tuple(samplers.SPACINGS),
            help="of the timesteps; default: diffusion.spacing of the run's config; if that is null, the sampler's own",
        )

    p = command(demo, "demo", "Train on scanned digits and sample, in three minutes on a laptop's CPU.")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")

    p = command(train, "train", "Train a model as described by a config.")
    config_argument(p)
    p.add_argument(
        "--out",
        type=Path,
        help="folder to write (default: runs/NAME for NAME.json; for the config.json of a run, the folder of the run)",
    )
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in the folder")

    p = command(watch, "watch", "Show the loss, the speed and the samples of a run in the terminal while it goes on.")
    p.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    p.add_argument("--png", metavar="FILE", type=Path, help="draw the run into this file, once, instead")

    p = command(sample, "sample", "Sample images from a trained model.")
    run_argument(p)
    p.add_argument("-n", type=int, default=64, help="number of images (default: %(default)s)")
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image i of a seed does not depend on how many are sampled (default: 0)",
    )
    sampling_arguments(p)
    precision_argument(p)
    p.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="NAME.png for a grid (default: %(default)s), else a folder for one PNG file per image; PNG files have a "
        "receipt for ddpm-fast reproduce, other formats have none",
    )

    p = command(
        reproduce,
        "reproduce",
        "Make pictures again, as their receipts say, and compare; exit status 1 if one differs.",
    )
    p.add_argument("images", metavar="IMAGE.png", type=Path, nargs="+", help="PNG files of samples")
    p.add_argument(
        "--run", metavar="RUN", type=Path, required=True, help="folder of the run, or one of its checkpoints"
    )
    p.add_argument("--out", metavar="AGAIN.png", type=Path, help="write the picture that was made again to this file")

    p = command(fit_sampler, "fit-sampler", "Fit a sampler of few steps to a trained model.")
    run_argument(p)
    p.add_argument("--steps", type=int, required=True, help="of the sampler")
    p.add_argument("-n", type=int, default=1024, help="number of noises that it is fitted on (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the noises (default: 0)")
    precision_argument(p)

    p = command(
        evaluate,
        "evaluate",
        "How good a trained model is: the variational bound of real images in bits/dim, and with --real the FID, KID, "
        "precision and recall of its samples.",
    )
    run_argument(p)
    p.add_argument(
        "--real",
        metavar="DATA",
        nargs="?",
        const=True,
        default=False,
        help="real images to compare with: a folder of images, an IDX file, or without DATA those of the training",
    )
    p.add_argument("-n", type=int, help="number of samples; 0 for the bound alone (default: 50000 with --real)")
    p.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    sampling_arguments(p)
    precision_argument(p)
    p.add_argument(
        "--bound-images",
        metavar="N",
        type=int,
        default=1000,
        help="number of real images whose bound is computed; 0 for no bound (default: %(default)s)",
    )
    p.add_argument(
        "--bound-steps",
        metavar="K",
        type=int,
        default=100,
        help="timesteps that are evaluated for each of them; 0 for all (default: %(default)s)",
    )
    network = p.add_mutually_exclusive_group()
    network.add_argument(
        "--inception-weights",
        metavar="FILE",
        type=Path,
        help="torch-fidelity's weights of Inception v3 (default: where it has them, downloaded if they are not there)",
    )
    network.add_argument(
        "--features",
        metavar="FILE",
        type=Path,
        help="a TorchScript file, which is code that is run, with another network for the features: uint8 images, "
        "(N, 3, H, W), to features, (N, D)",
    )

    command(info.main, "info", "Versions, devices and backends, and why a backend is missing.")

    p = command(
        check, "check", "Check a sampler or scheduler against the exact Gaussian case. The class is imported and run."
    )
    p.add_argument("sampler", metavar="MODULE:NAME", help="a class, such as diffusers:DDIMScheduler, or a function")
    p.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100], help="numbers of steps (default: 10 30 100)")
    p.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="an argument of the class; may be repeated"
    )
    p.add_argument(
        "--set-step", metavar="KEY=VALUE", action="append", default=[], help="an argument of its step, such as eta=1.0"
    )
    p.add_argument(
        "--claim",
        metavar="SAMPLER[,KEY=VALUE]",
        help="the algorithm that it should be, such as ddim,eta=1.0 (default: what diffusers' names and options say)",
    )
    p.add_argument("--schedule", default="linear", choices=tuple(schedules.SCHEDULES), help="default: %(default)s")
    p.add_argument("--timesteps", type=int, default=1000, help="T of the schedule (default: %(default)s)")
    p.add_argument(
        "--precision",
        choices=("float32", "float64"),
        help="that its coefficients are computed in (default: that of the class's table, float64 for a function)",
    )
    p.add_argument("--json", metavar="FILE", type=Path, help="write the report to this file as well")

    p = command(
        estimate,
        "estimate",
        "Measure steps: the time, memory and disk of a run, the largest batch, and what other settings would change.",
    )
    config_argument(p)
    return parser
