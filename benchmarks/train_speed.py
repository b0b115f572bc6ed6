"""A training step, from uint8 images to averaged weights, beside the packages that this one replaces.

Forward, backward, fused AdamW and EMA, with random weights, the same for ddpm_fast and diffusers; that both have the
same gradients is asserted first, weight by weight.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import speed
import torch
import torch.nn.functional as F
from diffusers_weights import renamed
from speed import DIFFUSERS, LUCIDRAINS, OURS, SHORT, Contender, T
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddpm_fast
from ddpm_fast import GaussianDiffusion, UNet
from ddpm_fast.app.estimate import Kept

Loss = Callable[..., Tensor]  # of images, and of timesteps and noise unless it draws them


class Trainer:
    """A module with its optimizer and its average."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=2e-4, fused=True)
        self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        # The first step makes the moments, and the first update copies: both done here, so that all steps are alike.
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        self._update()

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.module)


def autocast(dtype: torch.dtype, device: str) -> AbstractContextManager:
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def our_loss(diffusion: GaussianDiffusion, dtype: torch.dtype) -> Loss:
    def loss(images: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        with autocast(dtype, images.device.type):
            return diffusion(images, noise, times=t)

    return loss


def their_loss(network: nn.Module, dtype: torch.dtype, layout: torch.memory_format, device: str) -> Loss:
    """As in the training examples of diffusers."""
    scheduler = speed.diffusers_scheduler(device)

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
    """FLOPs, and the bytes that are kept from forward to backward, of an image."""

    def kept(n: int) -> int:
        with Kept() as memory:
            value = loss(images[:1].repeat(n, 1, 1, 1))
        return memory.bytes if value.requires_grad else 0

    with speed.flop_counter() as counter:
        loss(images[:1]).backward()
    module.zero_grad()
    return counter.get_total_flops(), kept(2) - kept(1)  # without what is kept once: weights in lower precision


def gradients(module: nn.Module, loss: Loss, **given: Tensor) -> dict[str, Tensor]:
    """Those of all weights, which are left without."""
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

    with speed.without_tf32(device.type):
        found = {d: renamed(gradients(networks[d], loss, **given), network) for d, loss in theirs.items()}
        exact = found[torch.float32]
        for dtype, loss in ours.items():
            # Sums in another order in float32; in bfloat16, roundings as good as theirs.
            bound = 1e-4 if dtype == torch.float32 else 1.5 * max(apart(found[dtype]).values())
            for name, error in apart(gradients(network, loss, **given)).items():
                assert error < bound, f"{SHORT[dtype]}: the gradient of {name} is {error:.1e} apart, beyond {bound:.1e}"


def main() -> None:
    args = speed.options(__doc__)
    networks = speed.networks(args.preset, args.device)
    dtypes = speed.dtypes(args.device)
    size, channels = networks.ours.image_size, networks.ours.channels
    images = torch.randint(256, (args.batch, channels, size, size), dtype=torch.uint8).to(args.device)
    contenders = []

    def contend(family: str, dtype: torch.dtype, how: str, trainer: Trainer, loss: Loss, **more: object) -> None:
        def step() -> None:
            trainer.step(loss(images))

        flops, kept = more.pop("counted", None) or count(trainer.module, loss, images)
        more = {"peer": family == DIFFUSERS and not more.get("compiled", False)} | more
        found = {"bytes_for_backward": kept}
        contenders.append(Contender(family, dtype, how, step, flops * args.batch, extra=found, **more))

    diffusion = GaussianDiffusion(
        networks.ours, image_size=size, objective="pred_noise", beta_schedule="linear"
    ).to(args.device)  # fmt: skip
    our_losses = {dtype: our_loss(diffusion, dtype) for dtype in dtypes}
    theirs = {}
    if networks.diffusers is not None:
        theirs = {dtypes[0]: networks.diffusers} | {d: speed.in_channels_last(networks.diffusers) for d in dtypes[1:]}
        layouts = dict(zip(dtypes, (torch.contiguous_format, torch.channels_last), strict=False))
        their_losses = {d: their_loss(network, d, layouts[d], args.device) for d, network in theirs.items()}
        check(networks.ours, our_losses, theirs, their_losses, images)

    trainer = Trainer(diffusion)  # of all of ours: they differ in arithmetic, not in what they hold
    for dtype, loss in our_losses.items():
        contend(OURS, dtype, "", trainer, loss)

    def by_reference(images: Tensor) -> Tensor:
        with ddpm_fast.backend("reference"):
            return our_losses[dtypes[-1]](images)

    contend(OURS, dtypes[-1], "reference", trainer, by_reference)
    for dtype, network in theirs.items():
        trainer = Trainer(network)
        contend(DIFFUSERS, dtype, "" if dtype == torch.float32 else "channels-last", trainer, their_losses[dtype])
        if args.compile:
            eager = contenders[-1]
            counted = eager.flops // args.batch, None  # what it keeps for backward is not known beforehand
            loss = their_loss(speed.compiled(network, args.device), dtype, layouts[dtype], args.device)
            contend(DIFFUSERS, dtype, "compiled", trainer, loss, compiled=True, counted=counted)
    if networks.lucidrains is not None:
        lucidrains = networks.lucidrains
        contend(LUCIDRAINS, dtypes[0], "", Trainer(lucidrains), lambda images: lucidrains(images.float() / 255))

    report = speed.measure(contenders, networks.missing, args)
    kept_by_peers = {c.dtype: c.extra["bytes_for_backward"] for c in contenders if c.peer}
    for row, c in zip(report["contenders"], contenders, strict=True):
        peer, kept = kept_by_peers.get(c.dtype), row["bytes_for_backward"]
        row["images_per_s"] = args.batch / row["median_s"]
        row["bytes_of_same_dtype"] = kept / peer if kept and peer and c.family != LUCIDRAINS else None
    columns = {
        "images/s": lambda row: f"{row['images_per_s']:.3g}",
        "kept MiB/image": lambda row: speed.mebibytes(row["bytes_for_backward"]),
        "of same dtype": lambda row: speed.times(row["bytes_of_same_dtype"]),
    }
    speed.publish("A training step", report, columns, args)


if __name__ == "__main__":
    main()
