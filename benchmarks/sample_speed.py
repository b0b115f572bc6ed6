"""A step of a sampling run, network and all, beside the packages that this one replaces.

All take ancestral steps of a run of 1000 with random weights, the same for ddpm_fast and diffusers; that both predict
the same is asserted first.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from itertools import chain, count

import speed
import torch
import torch._inductor.config as inductor
from speed import DIFFUSERS, LUCIDRAINS, OURS, Contender, T
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import GaussianDiffusion, UNet


def diffusion_of(network: UNet, **arguments: object) -> GaussianDiffusion:
    return GaussianDiffusion(
        network, image_size=network.image_size, objective="pred_noise", beta_schedule="linear", **arguments
    )


def steps_of(run: Callable[[], Iterator[object]]) -> Callable[[], object]:
    """One step a call, and another run where one ends."""
    steps = chain.from_iterable(run() for _ in count())
    return lambda: next(steps)


def our_steps(network: UNet, x: Tensor, backend: str | None = None) -> Callable[[], object]:
    diffusion = diffusion_of(network).to(x.device)

    def run() -> Iterator[object]:
        states = diffusion._reverse(x, diffusion.step_table("ddpm"), diffusion._source(x, 0, 0))
        next(states)  # the state before the first step
        yield from states

    step = steps_of(run)

    def within() -> None:
        with ddpm_fast.backend(backend) if backend else nullcontext():
            step()

    return within


def their_steps(network: nn.Module, x: Tensor) -> Callable[[], object]:
    """As in diffusers' DDPMPipeline."""
    scheduler = speed.diffusers_scheduler(x.device.type)

    def run() -> Iterator[object]:
        state = x
        for t in scheduler.timesteps:
            with torch.no_grad():
                state = scheduler.step(network(state, t).sample, t, state).prev_sample
            yield

    return steps_of(run)


def lucidrains_steps(diffusion: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> Iterator[object]:
        state = x
        for t in reversed(range(T)):
            state, _ = diffusion.p_sample(state, t)
            yield

    return steps_of(run)


def predicted(network: UNet, x: Tensor, t: int) -> Tensor:
    """What the network says in a sampling run: a step to the end, without clipping, goes to x_0, and eps follows."""
    diffusion = diffusion_of(network, clip_denoised=False, auto_normalize=False).to(x.device)
    x_0 = diffusion.sample(len(x), sampler="ddpm", steps=[t], noise=x)
    return diffusion.predict_noise_from_start(x, torch.full((len(x),), t, device=x.device), x_0)


@torch.no_grad()
def check(ours: dict[torch.dtype, UNet], theirs: dict[torch.dtype, nn.Module], optimized: nn.Module, x: Tensor) -> None:
    """Asserts that ours, and their optimised network, predict what theirs do."""
    t = T // 2
    with speed.without_tf32(x.device.type):
        exact = theirs[torch.float32](x, t).sample
        error = (predicted(ours[torch.float32], x, t) - exact).abs().max() / exact.abs().max()
        # 60 layers of sums of up to 9 * 512 products, were all roundings independent: 2^-24 sqrt(60 * 9 * 512).
        assert error < 3e-5, f"fp32: {error:.1e} of the largest output apart"
    if torch.bfloat16 in ours:
        dtype = torch.bfloat16
        predictions = (predicted(ours[dtype], x, t), optimized(x, t).sample, theirs[dtype](x.to(dtype), t).sample)
        *errors, their_error = ((found.float() - exact).norm() / exact.norm() for found in predictions)
        for error in errors:
            assert error < 1.5 * their_error, f"bf16: {error:.1e} from fp32, diffusers {their_error:.1e}"


def flops_of(network: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), speed.flop_counter() as counter:
        network(x[:1], torch.zeros(1, dtype=torch.int64, device=x.device))
    return counter.get_total_flops() * len(x)


def main() -> None:
    args = speed.options(__doc__)
    inductor.freezing = True  # weights packed once, as sampling here does
    networks = speed.networks(args.preset, args.device)
    dtypes = speed.dtypes(args.device)
    network = networks.ours.eval()
    ours = {dtype: deepcopy(network).to(dtype) for dtype in dtypes}
    x = torch.randn(args.batch, network.channels, network.image_size, network.image_size).to(args.device)
    flops = flops_of(network, x)

    contenders = [Contender(OURS, dtype, "", our_steps(ours[dtype], x), flops) for dtype in dtypes]
    reference = our_steps(ours[dtypes[-1]], x, backend="reference")
    contenders.append(Contender(OURS, dtypes[-1], "reference", reference, flops))
    if networks.diffusers is not None:
        theirs = {torch.float32: networks.diffusers.eval()}
        states = {torch.float32: x}
        for dtype in dtypes[1:]:
            theirs[dtype] = speed.in_channels_last(theirs[torch.float32], dtype)
            states[dtype] = x.to(dtype, memory_format=torch.channels_last)
        optimized = ddpm_fast.optimize(deepcopy(theirs[torch.float32]), dtypes[-1])
        check(ours, theirs, optimized, x)
        flops = flops_of(theirs[torch.float32], x)
        for dtype in dtypes:
            how = "" if dtype == torch.float32 else "channels-last"
            step = their_steps(theirs[dtype], states[dtype])
            contenders.append(Contender(DIFFUSERS, dtype, how, step, flops, peer=True))
        contenders.append(Contender(DIFFUSERS, dtypes[-1], "optimize", their_steps(optimized, x), flops))
        for dtype in dtypes if args.compile else ():
            step = their_steps(speed.compiled(theirs[dtype], args.device), states[dtype])
            contenders.append(Contender(DIFFUSERS, dtype, "compiled", step, flops, compiled=True))
    if networks.lucidrains is not None:
        diffusion = networks.lucidrains.eval()
        step = lucidrains_steps(diffusion, x)
        contenders.append(Contender(LUCIDRAINS, torch.float32, "", step, flops_of(diffusion.model, x)))

    report = speed.measure(contenders, networks.missing, args)
    for row in report["contenders"]:
        row["run_s"] = row["median_s"] * T
        row["images_per_s"] = args.batch / row["run_s"]
    columns = {
        f"s for {T} steps": lambda row: f"{row['run_s']:.4g}",
        "images/s": lambda row: f"{row['images_per_s']:.3g}",
    }
    speed.publish("A sampling step", report, columns, args)


if __name__ == "__main__":
    main()
