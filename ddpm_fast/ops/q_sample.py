"""The forward process, x_t = a_t x_0 + s_t eps with a_t = sqrt(abar_t) and s_t = sqrt(1 - abar_t)."""

import torch
from torch import Tensor

from . import native, reference  # noqa: F401  (native registers the compiled kernels)

__all__ = ["q_sample"]

torch.library.define(
    "ddpm_fast::q_sample",
    "(Tensor x_start, Tensor noise, Tensor t, Tensor rows) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def q_sample(x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """Draws x_t from q(x_t | x_0), given its noise: a_t x_0 + s_t eps (Ho et al. 2020, eq. 4).

    Args:
        x_start: x_0, of any range; (N, ...) float32, bfloat16, float16 or float64.
        noise: eps ~ N(0, 1), of the shape and dtype of x_start.
        t: a timestep for each sample, in [0, T); (N,) int64.
        rows: the schedule as rows (a_t, s_t); (T, 2) float32, or float64 for float64 data.

    Returns:
        x_t, with the shape, dtype and strides of x_start. It is computed in float32 (float64 for float64
        data) and rounded once, to the same bits on every device. Gradients flow to x_start and noise.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit, or if a t on the CPU is not in [0, T). A GPU
            finds such a t only after the call has returned: a device-side assertion fails.
    """
    return torch.ops.ddpm_fast.q_sample(x_start, noise, t, rows)


def _check(x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor) -> None:
    def describe(tensor: Tensor) -> str:
        return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}"

    torch._check(
        x_start.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and x_start.dim() >= 1
        and noise.shape == x_start.shape
        and noise.dtype == x_start.dtype
        and t.shape == x_start.shape[:1]
        and t.dtype == torch.int64
        and rows.dim() == 2
        and rows.shape[1] == 2
        and rows.dtype in (torch.float32, torch.float64)
        and x_start.device == noise.device == t.device == rows.device,
        lambda: (
            "q_sample needs x_start (N, ...) floating, noise of the same shape and dtype, t (N,) int64 and "
            f"rows (T, 2) float32, on one device; got x_start {describe(x_start)}, noise {describe(noise)}, "
            f"t {describe(t)}, rows {describe(rows)}"
        ),
    )


def _reference(x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    _check(x_start, noise, t, rows)
    if t.device.type == "cpu":
        outside = ((t < 0) | (t >= len(rows))).nonzero().flatten().tolist()
        if outside:
            raise RuntimeError(
                f"q_sample: t[{outside[0]}] is {t[outside[0]]}, but rows has T = {len(rows)} timesteps, counted from 0"
            )
    return reference.q_sample(x_start, noise, t, rows)


torch.library.impl("ddpm_fast::q_sample", "default", _reference)


@torch.library.register_fake("ddpm_fast::q_sample")
def _fake(x_start: Tensor, noise: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    _check(x_start, noise, t, rows)
    return torch.empty_like(x_start)


def _setup_context(ctx, inputs, output) -> None:
    _, _, t, rows = inputs
    ctx.save_for_backward(t, rows)


def _backward(ctx, grad: Tensor):
    t, rows = ctx.saved_tensors
    a, s = rows[t].reshape(-1, 2, *[1] * (grad.dim() - 1)).unbind(1)  # (N, 1, ...) each
    needs_x_start, needs_noise, *_ = ctx.needs_input_grad
    return (
        (a * grad).to(grad.dtype) if needs_x_start else None,
        (s * grad).to(grad.dtype) if needs_noise else None,
        None,
        None,
    )


torch.library.register_autograd("ddpm_fast::q_sample", _backward, setup_context=_setup_context)
