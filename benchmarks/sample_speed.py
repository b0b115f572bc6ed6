"""Times a step of a sampling run, network included, beside the packages that this one replaces.

Every contender takes ancestral steps of a run of 1000 steps. The weights are random, and the same for ddpm_fast and
diffusers; before anything is timed, their predictions are asserted to agree.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from itertools import chain, count

import torch
import torch._inductor.config as inductor
from speed.kernels import kernels_of_ours
from speed.measuring import Contender, measure
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
from speed.report import publish
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import GaussianDiffusion, UNet


def diffusion_of(network: UNet, **arguments: object) -> GaussianDiffusion:
    return GaussianDiffusion(
        network, image_size=network.image_size, objective="pred_noise", beta_schedule="linear", **arguments
    )


def steps_of(run: Callable[[], Iterator[object]]) -> Callable[[], object]:
    """A function that takes the next step of a run at each call, and begins a new run after the last step."""
    steps = chain.from_iterable(run() for _ in count())
    return lambda: next(steps)


def our_steps(network: UNet, x: Tensor, backend: str | None = None) -> Callable[[], object]:
    diffusion = diffusion_of(network).to(x.device)

    def run() -> Iterator[object]:
        states = diffusion.sample_progressive(len(x), sampler="ddpm", noise=x, seed=0)
        next(states)  # x_T, the state before the first step
        yield from states

    step = steps_of(run)

    def within() -> None:
        with ddpm_fast.backend(backend) if backend else nullcontext():
            step()

    return within


def their_steps(network: nn.Module, x: Tensor) -> Callable[[], object]:
    """As in diffusers' DDPMPipeline."""
    scheduler = diffusers_scheduler(x.device.type)

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
    """The network's prediction of eps in a sampling run.

    A single step from t to the end, without clipping, gives the prediction of x_0, from which eps follows.
    """
    diffusion = diffusion_of(network, clip_denoised=False, auto_normalize=False).to(x.device)
    x_0 = diffusion.sample(len(x), sampler="ddpm", steps=[t], noise=x)
    return diffusion.predict_noise_from_start(x, torch.full((len(x),), t, device=x.device), x_0)


@torch.no_grad()
def check(ours: dict[torch.dtype, UNet], theirs: dict[torch.dtype, nn.Module], optimized: nn.Module, x: Tensor) -> None:
    """Asserts that our networks, and their optimised one, predict the same as theirs."""
    t = T // 2
    with without_tf32(x.device.type):
        exact = theirs[torch.float32](x, t).sample
        error = (predicted(ours[torch.float32], x, t) - exact).abs().max() / exact.abs().max()
        # 60 layers of sums of up to 9 * 512 products, with independent roundings: 2^-24 sqrt(60 * 9 * 512) = 3.1e-5.
        assert error < 3e-5, f"fp32: {error:.1e} of the largest output apart"
    if torch.bfloat16 in ours:
        dtype = torch.bfloat16
        predictions = (predicted(ours[dtype], x, t), optimized(x, t).sample, theirs[dtype](x.to(dtype), t).sample)
        *errors, their_error = ((found.float() - exact).norm() / exact.norm() for found in predictions)
        for error in errors:
            assert error < 1.5 * their_error, f"bf16: {error:.1e} from fp32, diffusers {their_error:.1e}"


def flops_of(network: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), flop_counter() as counter:
        network(x[:1], torch.zeros(1, dtype=torch.int64, device=x.device))
    return counter.get_total_flops() * len(x)


def main() -> None:
    args = options(__doc__)
    inductor.freezing = True  # packs weights once, as sampling here does
    ours, diffusers, lucidrains, missing = networks(args.preset, args.device)
    all_dtypes = dtypes(args.device)
    lowest = all_dtypes[-1]
    network = ours.eval()
    ours = {dtype: deepcopy(network).to(dtype) for dtype in all_dtypes}
    x = torch.randn(args.batch, network.channels, network.image_size, network.image_size).to(args.device)
    flops = flops_of(network, x)

    contenders = [Contender(OURS, dtype, "", our_steps(ours[dtype], x), flops) for dtype in all_dtypes]
    reference = our_steps(ours[lowest], x, backend="reference")
    contenders.append(Contender(OURS, lowest, "reference", reference, flops))
    if diffusers is not None:
        theirs = {torch.float32: diffusers.eval()}
        states = {torch.float32: x}
        for dtype in all_dtypes[1:]:
            theirs[dtype] = in_channels_last(theirs[torch.float32], dtype)
            states[dtype] = x.to(dtype, memory_format=torch.channels_last)
        optimized = ddpm_fast.optimize(deepcopy(theirs[torch.float32]), lowest)
        check(ours, theirs, optimized, x)
        flops = flops_of(theirs[torch.float32], x)
        for dtype in all_dtypes:
            how = "" if dtype == torch.float32 else "channels-last"
            step = their_steps(theirs[dtype], states[dtype])
            contenders.append(Contender(DIFFUSERS, dtype, how, step, flops, peer=True))
        contenders.append(Contender(DIFFUSERS, lowest, "optimize", their_steps(optimized, x), flops))
        for dtype in all_dtypes if args.compile else ():
            for how, faster in compiled(theirs[dtype], args.device).items():
                step = their_steps(faster, states[dtype])
                contenders.append(Contender(DIFFUSERS, dtype, how, step, flops, compiled=True))
    if lucidrains is not None:
        step = lucidrains_steps(lucidrains.eval(), x)
        contenders.append(Contender(LUCIDRAINS, torch.float32, "", step, flops_of(lucidrains.model, x)))

    measured = measure(contenders, all_dtypes, args)
    for row in measured["contenders"]:
        row["run_s"] = row["median_s"] * T
        row["images_per_s"] = args.batch / row["run_s"]
    columns = {
        f"s for {T} steps": lambda row: f"{row['run_s']:.4g}",
        "images/s": lambda row: f"{row['images_per_s']:.3g}",
    }
    publish("A sampling step", measured, missing, columns, args)
    if args.profile:
        print(kernels_of_ours(contenders, args.device))


if __name__ == "__main__":
    main()
