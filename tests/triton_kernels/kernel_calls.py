"""Calls of the public ops for the tests of Triton's kernels, with the bytes that each must move."""

import functools

import torch

from ddpm_fast import ops

F32, BF16 = torch.float32, torch.bfloat16
N = 4  # samples
TYPES = {"float32": (F32, F32), "float32-bfloat16": (F32, BF16), "bfloat16": (BF16, BF16)}  # of the state, of pred
LAYOUTS = {"channels-last": torch.channels_last, "planar": torch.contiguous_format}


def images(*shape, dtype=F32, layout=torch.channels_last):
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def make_keys(*shape):
    return torch.randint(-(2**63), 2**63 - 1, (*shape, 2))


def elementwise(wide, narrow, channels=3, size=32, layout=torch.channels_last, n=N):
    """Name -> (a call, bytes that it must read, bytes that it must write), for images with noise from keys."""
    make = functools.partial(images, n, channels, size, size, layout=layout)
    x, pred, x_prev, v = make(dtype=wide), make(dtype=narrow), make(dtype=wide), make(dtype=narrow)
    keys, t, rows = make_keys(n), torch.arange(n), torch.rand(n, 8)
    leaf, x_0, x_t = pred.clone().requires_grad_(), x.float().clone(), x.float().clone()
    full = {"variance": v, "x_start_prev": x_prev, "return_x_start": True, "return_model_input": True}
    model_input = pred.nbytes if wide != narrow else 0
    return {
        "q_sample": (lambda: ops.q_sample(x, t, rows[:, :2], keys=keys), x.nbytes, x.nbytes),
        "weighted_loss": (lambda: ops.weighted_loss(leaf, t, rows[:, :3], keys=keys), pred.nbytes, pred.nbytes),
        "reverse_step": (
            lambda: ops.reverse_step(x, pred, t, rows[:, :6], keys=keys, clip=(-1.0, 1.0)),
            x.nbytes + pred.nbytes,
            x.nbytes,
        ),
        "reverse_step, all there is": (
            lambda: ops.reverse_step(x, pred, t, rows, keys=keys, clip=(-1.0, 1.0), **full),
            2 * (x.nbytes + pred.nbytes),
            2 * x.nbytes + model_input,
        ),
        "vlb_terms": (
            lambda: ops.vlb_terms(x_0, x_t, pred, t, rows[:, :6], clip=(-1.0, 1.0)),
            x_0.nbytes + x_t.nbytes + pred.nbytes,
            0,
        ),
    }


def group_norm(dtype, layout, shape=(2, 128, 32, 32)):
    x, grad = images(*shape, dtype=dtype, layout=layout).requires_grad_(), images(*shape, dtype=dtype, layout=layout)
    weight, bias = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)

    def forward():
        return ops.group_norm_silu(x, weight, bias, 32)

    def backward():
        return torch.autograd.grad(forward(), (x, weight, bias), grad)

    return forward, backward, x
