"""Times a training step, from uint8 images to averaged weights, beside the packages that this one replaces.

A step is forward, backward, fused AdamW and EMA. The weights are random, and the same for ddpm_fast and diffusers;
before anything is timed, the gradients of all weights are asserted to agree. On a GPU, ddpm_fast's step is timed launch
by launch and as a CUDA graph, as `ddpm-fast train` takes it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from diffusers_weights import renamed
from speed.kernels import kernels_of_ours
from speed.measuring import SHORT, Contender, measure
from speed.networks import (
    DIFFUSERS,
    LUCIDRAINS,
    OURS,
    T,
    compiled,
    diffusers_scheduler,
    flop_counter,
    in_channels_last,
    networks,
)
from speed.options import dtypes, options, without_tf32
from speed.report import mebibytes, publish, times
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_fast
from ddpm_fast import GaussianDiffusion, UNet
from ddpm_fast.app.memory import SavedActivations
from ddpm_fast.training.averages import update_average
from ddpm_fast.training.graphed_step import GraphedStep

Loss = Callable[..., Tensor]  # of images, and of timesteps and noise unless it draws them


class Trainer:
    """A module with its optimizer and its average."""

    def __init__(self, module: nn.Module, lr: float | Tensor = 2e-4) -> None:
        self.module = module
        how = {"fused": True, "capturable": isinstance(lr, Tensor)}
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, **how)
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        # The first step allocates the moments, and the first update copies: done here, so that timed steps are alike.
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        self._update()

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_average()

    def update_average(self) -> None:
        self.average.update_parameters(self.module)


class OurTrainer(Trainer):
    """As ddpm_fast trains."""

    def update_average(self) -> None:
        update_average(self.average.module, self.module, 0.9999)

    def graphed(self, loss: Loss, images: Tensor) -> Callable[[], None]:
        """A step as a CUDA graph."""
        step = GraphedStep(loss, self.optimizer)

        def take() -> None:
            step(images)
            self.update_average()

        return take


def autocast(dtype: torch.dtype, device: str) -> AbstractContextManager:
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def our_loss(diffusion: GaussianDiffusion, dtype: torch.dtype) -> Loss:
    def loss(images: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        with autocast(dtype, images.device.type):
            return diffusion(images, noise, times=t, seed=0)  # otherwise the host draws a seed and waits to send it

    return loss


def their_loss(network: nn.Module, dtype: torch.dtype, layout: torch.memory_format, device: str) -> Loss:
    """As in the training examples of diffusers."""
    scheduler = diffusers_scheduler(device)

    def loss(images: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        x = (images.float() / 127.5 - 1).contiguous(memory_format=layout)
        t = torch.randint(T, (len(x),), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        x_t = scheduler.add_noise(x, noise, t)
        with autocast(dtype, x.device.type):
            pred = network(x_t, t).sample
        return F.mse_loss(pred.float(), noise)

    return loss


def count(module: nn.Module, loss: Loss, images: Tensor) -> tuple[int, int]:
    """The FLOPs of an image, and the bytes that autograd saves for it from forward to backward."""

    def kept(n: int) -> int:
        with SavedActivations() as memory:
            value = loss(images[:1].repeat(n, 1, 1, 1))
        return memory.bytes if value.requires_grad else 0

    with flop_counter() as counter:
        loss(images[:1]).backward()
    module.zero_grad()
    return counter.get_total_flops(), kept(2) - kept(1)  # without what is saved once, as weights in lower precision


def gradients(module: nn.Module, loss: Loss, **given: Tensor) -> dict[str, Tensor]:
    """The gradients of all weights, in float64; `.grad` is cleared."""
    loss(**given).backward()
    found = {name: p.grad.double() for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def check(
    network: UNet,
    ours: dict[torch.dtype, Loss],
    networks: dict[torch.dtype, nn.Module],
    theirs: dict[torch.dtype, Loss],
    images: Tensor,
) -> None:
    """Asserts that the gradients of every weight are those of diffusers, for the same images, timesteps and noise."""
    device = images.device
    given = {
        "images": images,
        "t": torch.linspace(T // 10, T - 1, len(images), device=device).long(),
        "noise": torch.randn(images.shape).to(device),
    }

    def apart(found: dict[str, Tensor]) -> dict[str, float]:
        return {name: ((found[name] - grad).norm() / grad.norm()).item() for name, grad in exact.items()}

    with without_tf32(device.type):
        found = {d: renamed(gradients(networks[d], loss, **given), network) for d, loss in theirs.items()}
        exact = found[torch.float32]
        for dtype, loss in ours.items():
            # Sums in another order in float32; in bfloat16, roundings as good as theirs.
            bound = 1e-4 if dtype == torch.float32 else 1.5 * max(apart(found[dtype]).values())
            for name, error in apart(gradients(network, loss, **given)).items():
                assert error < bound, f"{SHORT[dtype]}: the gradient of {name} is {error:.1e} apart, beyond {bound:.1e}"


def main() -> None:
    args = options(__doc__)
    ours, diffusers, lucidrains, missing = networks(args.preset, args.device)
    all_dtypes = dtypes(args.device)
    size, channels = ours.image_size, ours.channels
    images = torch.randint(256, (args.batch, channels, size, size), dtype=torch.uint8).to(args.device)
    contenders = []

    def contend(family: str, dtype: torch.dtype, how: str, trainer: Trainer, loss: Loss, **more: object) -> None:
        def by_launches() -> None:
            trainer.step(loss(images))

        step = more.pop("step", by_launches)
        flops, kept = more.pop("counted", None) or count(trainer.module, loss, images)
        more = {"peer": family == DIFFUSERS and not more.get("compiled", False)} | more
        found = {"bytes_for_backward": kept}
        contenders.append(Contender(family, dtype, how, step, flops * args.batch, extra=found, **more))

    diffusion = GaussianDiffusion(
        ours, image_size=size, objective="pred_noise", beta_schedule="linear"
    ).to(args.device)  # fmt: skip
    our_losses = {dtype: our_loss(diffusion, dtype) for dtype in all_dtypes}
    theirs = {}
    if diffusers is not None:
        theirs = {torch.float32: diffusers} | {dtype: in_channels_last(diffusers) for dtype in all_dtypes[1:]}
        layouts = dict(zip(all_dtypes, (torch.contiguous_format, torch.channels_last), strict=False))
        their_losses = {d: their_loss(network, d, layouts[d], args.device) for d, network in theirs.items()}
        check(ours, our_losses, theirs, their_losses, images)

    on_gpu = args.device == "cuda"
    # One for all of ours: they differ in arithmetic, not in weights.
    trainer = OurTrainer(diffusion, torch.full((), 2e-4, device=args.device) if on_gpu else 2e-4)
    for dtype, loss in our_losses.items():
        contend(OURS, dtype, "", trainer, loss)
        if on_gpu:
            contend(OURS, dtype, "graph", trainer, loss, step=trainer.graphed(loss, images), compiled=True)

    def by_reference(images: Tensor) -> Tensor:
        with ddpm_fast.backend("reference"):
            return our_losses[all_dtypes[-1]](images)

    contend(OURS, all_dtypes[-1], "reference", trainer, by_reference)
    for dtype, network in theirs.items():
        trainer = Trainer(network)
        contend(DIFFUSERS, dtype, "" if dtype == torch.float32 else "channels-last", trainer, their_losses[dtype])
        if args.compile:
            eager = contenders[-1]
            counted = eager.flops // args.batch, None  # what a compiled network saves for backward is not measured
            for how, faster in compiled(network, args.device).items():
                loss = their_loss(faster, dtype, layouts[dtype], args.device)
                contend(DIFFUSERS, dtype, how, trainer, loss, compiled=True, counted=counted)
    if lucidrains is not None:
        contend(LUCIDRAINS, torch.float32, "", Trainer(lucidrains), lambda images: lucidrains(images.float() / 255))

    measured = measure(contenders, all_dtypes, args)
    kept_by_peers = {c.dtype: c.extra["bytes_for_backward"] for c in contenders if c.peer}
    for row, c in zip(measured["contenders"], contenders, strict=True):
        peer, kept = kept_by_peers.get(c.dtype), row["bytes_for_backward"]
        row["images_per_s"] = args.batch / row["median_s"]
        row["bytes_of_same_dtype"] = kept / peer if kept and peer and c.family != LUCIDRAINS else None
    columns = {
        "images/s": lambda row: f"{row['images_per_s']:.3g}",
        "saved MiB/image": lambda row: mebibytes(row["bytes_for_backward"]),
        "of same dtype": lambda row: times(row["bytes_of_same_dtype"]),
    }
    publish("A training step", measured, missing, columns, args)
    if args.profile:
        print(kernels_of_ours(contenders, args.device))


if __name__ == "__main__":
    main()
