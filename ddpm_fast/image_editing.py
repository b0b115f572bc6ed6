r"""Sampling that begins with given images: between two of them, their noise, and what a mask leaves out of them.

`ReverseProcess.sample` with `init` is the fourth: noised images, denoised again.
"""

__all__ = ["ImageEditing"]

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import checks
from .denoiser import ModelArguments
from .noise import INPAINTING, SECOND_IMAGE, NoiseSource
from .process import Seed, drawing_from
from .reverse_process import ReverseProcess
from .samplers import StepTable, ddim_inversion


class ImageEditing(ReverseProcess):
    """A reverse process that takes images; its arguments are those of `ReverseProcess`."""

    @torch.no_grad()
    def interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None = None,
        lam: float = 0.5,
        *,
        seed: Seed = None,
        sample_offset: int = 0,
        model_kwargs: ModelArguments | None = None,
    ) -> Tensor:
        """Images between two. Ho et al. (2020), sec. 4.3: mixed at x_t, then denoised from there.

        Args:
            x1, x2: (N, C, ...), in [-1, 1].
            t: the timestep at which they are mixed, in [0, T); None for T - 1.
            lam: 0 gives x1, 1 gives x2.

        Returns:
            The shape of x1, in [-1, 1].
        """
        t = checks.integer("t", self.num_timesteps - 1 if t is None else t, 0, self.num_timesteps)
        checks.floating("x1", x1)
        checks.shape("x2", x2, x1.shape, "x1")
        lam = checks.finite("lam", lam)
        source = self.noise_source(x1, seed, sample_offset)
        times = torch.full((x1.shape[0],), t, device=x1.device)
        x1_t = self.q_sample(x1, times, source.draw(0, x1.shape))
        x2_t = self.q_sample(x2, times, source.draw(SECOND_IMAGE, x2.shape))
        table, start_step = self.step_table("ddpm", self.num_timesteps), self.num_timesteps - 1 - t
        run = self._start(
            (1 - lam) * x1_t + lam * x2_t, table, source, start_step=start_step, model_kwargs=model_kwargs
        )
        with drawing_from(source):
            for k in range(start_step, len(table)):
                run.step(k)
        return run.x.clone()  # the run may go on to use its memory for another

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        steps: int | Sequence[int] | None = None,
        spacing: str | None = None,
        model_kwargs: ModelArguments | None = None,
    ) -> Tensor:
        """x_T from which DDIM without noise samples the images again. Song et al. (2021), sec. 4.3 and 5.4.

        `sample(noise=encode(images), sampler="ddim", eta=0.0)` with the same steps, spacing and model_kwargs is near to
        the images, the nearer the more steps there are: see `samplers.ddim_inversion`.

        Args:
            images: (N, C, *image_size), in the range of `sample`, or uint8.
            steps, spacing: of DDIM, as in `sample`.
            model_kwargs: further arguments of the network.

        Returns:
            The shape of images, float32, in the range of the network plus noise.
        """
        self._checked(images)
        x = self._given(images)
        visited = self.step_table("ddim", steps, 0.0, spacing).t
        table = ddim_inversion(self.schedule, self.objective, visited)
        run = self._start(x, table, NoiseSource("philox", seed=0, device=self.device), model_kwargs=model_kwargs)
        for k in range(len(table)):
            run.step(k)
        return run.x.clone()  # the run may go on to use its memory for another

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        *,
        sampler: str | StepTable | None = None,
        steps: int | Sequence[int] | None = None,
        jump: int = 10,
        resample: int = 10,
        seed: Seed = None,
        sample_offset: int = 0,
        model_kwargs: ModelArguments | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Fills in what is unknown of images, by a network that was not trained for it. RePaint: Lugmayr et al. (2022).

        Algorithm 1: after each step, the known pixels are those of the images with the noise of the timestep. To bring
        the others into harmony with them, the run goes `jump` timesteps up again, by noise, and down, `resample` times
        in all, after every `jump` timesteps. The network is therefore called about `resample` times as often as there
        are steps; the paper takes 250 of them.

        Args:
            images: (N, C, *image_size), in the range of `sample`, or uint8. Unknown pixels may have any allowed value.
            mask: bool, True where a pixel is known; of a shape that broadcasts to that of images, such as
                (N, 1, *image_size).
            sampler: as in `sample`, of those that need no earlier x0_hat, which are ddpm and ddim; None for ddpm.
            steps: as in `sample`.
            jump: how many of the visited timesteps a jump goes up (the paper's jump length), at least 1.
            resample: how often each stretch of `jump` timesteps is denoised, at least 1: 1 never goes up.
            seed, sample_offset: as in `sample`. The noise of known pixels and jumps has streams of its own.
            model_kwargs: further arguments of the network.
            progress: show a bar.

        Returns:
            The shape of images, float32, in the range of `sample`: known pixels as they were given.

        Raises:
            ValueError: images or a mask of another shape or dtype, or a sampler that needs an earlier x0_hat.
        """
        shape = self._checked(images)
        images = images.to(self.device)
        mask = _mask_for(images, mask)
        table = self.step_table("ddpm" if sampler is None else sampler, steps)
        if table.C.any():
            raise ValueError(
                f"inpaint jumps between timesteps, where no earlier x0_hat is of use: it takes ddpm, ddim or a "
                f"StepTable with C = 0; got {sampler!r}"
            )
        last = len(table) - 1
        path = _path(len(table), checks.integer("jump", jump, 1), checks.integer("resample", resample, 1))
        taken = [last - here for here, there in pairwise(path) if there < here]  # the rows in the order of the path
        columns = {name: column for name, column in vars(table).items() if column is not None}
        table_of_path = StepTable(**{name: column[taken] for name, column in columns.items()})
        source = self.noise_source(self.betas, seed, sample_offset)
        run = self._start(source.draw(0, shape), table_of_path, source, model_kwargs=model_kwargs)
        x_start, steps_taken = self._given(images), 0
        for i, (here, there) in enumerate(tqdm(list(pairwise(path)), "inpainting", disable=not progress, unit="step")):
            if there < here:
                with drawing_from(source):
                    run.step(steps_taken)
                steps_taken += 1
                if there >= 0:
                    t = torch.full((len(x_start),), int(table.t[last - there]), device=self.device)
                    known = self.q_sample(x_start, t, source.draw(INPAINTING + i, shape))
                    run.put(torch.where(mask, known, run.x))
            else:
                kept = self.schedule.alphas_cumprod[table.t[[last - there, last - here]]]
                alpha = (kept[0] / kept[1]).item()  # q(x_there | x_here) = N(sqrt(alpha) x_here, (1 - alpha) I)
                run.put(alpha**0.5 * run.x + (1 - alpha) ** 0.5 * source.draw(INPAINTING + i, shape))
        given = images / 255 if images.dtype == torch.uint8 else images.to(run.x.dtype)
        return torch.where(mask, given, self._result(run.x))


def _mask_for(images: Tensor, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a bool tensor, True where a pixel is known; got {given}")
    try:
        return mask.to(images.device).expand(images.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to the shape of images, {tuple(images.shape)}; got {tuple(mask.shape)}"
        ) from None


def _path(steps: int, jump: int, resample: int) -> list[int]:
    """How many of the K timesteps lie below the one visited, along the way: from K - 1 to 0, and -1 for x_0.

    Lugmayr et al. (2022), appendix: from every multiple of `jump` it goes up `jump` timesteps, `resample` - 1 times.
    """
    jumps_left = dict.fromkeys(range(0, steps - jump, jump), resample - 1)
    path = [steps - 1]
    while path[-1] >= 0:
        path.append(path[-1] - 1)
        if jumps_left.get(path[-1], 0):
            jumps_left[path[-1]] -= 1
            path.append(path[-1] + jump)
    return path
