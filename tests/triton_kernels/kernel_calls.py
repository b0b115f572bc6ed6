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


# (shape of the sum, channels of skip): those of the U-Net of Ho et al., and one that is too large for one program
SLABS = {
    "128 x 32 x 32": ((1, 128, 32, 32), 0),
    "256 x 16 x 16": ((1, 256, 16, 16), 0),
    "256 x 8 x 8": ((1, 256, 8, 8), 0),
    "256 x 4 x 4": ((1, 256, 4, 4), 0),
    "256 + 128 x 32 x 32": ((1, 384, 32, 32), 128),
}
LARGE = {"32 + 32 x 48 x 48": ((1, 64, 48, 48), 32)}


def add_group_norm(dtype, shape, of_skip):
    """(forward, backward, the bytes of the sum): of all that the op adds, with a scale and a shift."""
    n, c, *size = shape
    channels = c - of_skip

    def leaf(*shape, dtype=dtype):
        x = images(*shape, dtype=dtype) if len(shape) == 4 else torch.randn(shape).to(dtype)
        return x.requires_grad_()

    x, residual = leaf(n, channels, *size), leaf(n, channels, *size)
    skip = leaf(n, of_skip, *size) if of_skip else None
    parameters = [leaf(c, dtype=F32), leaf(c, dtype=F32)]
    more = {
        "scale": leaf(n, c),
        "shift": leaf(n, c),
        "input_bias": leaf(channels, dtype=F32),
        "residual": residual,
        "skip": skip,
    }
    grads = images(*shape, dtype=dtype), images(*shape, dtype=dtype)
    leaves = [y for y in (x, *parameters, *more.values()) if y is not None]

    def forward():
        return ops.add_group_norm_silu(x, *parameters, 32, **more)

    def backward():
        return torch.autograd.grad(forward(), leaves, grads)

    return forward, backward, grads[0].nbytes


def recomputed_group_norm(dtype, shape):
    """A call that recomputes the output of a norm of x + input_bias."""
    n, c = shape[:2]
    x, input_bias = images(*shape, dtype=dtype), torch.randn(n, c).to(dtype)
    mean, rstd, weight, bias = torch.zeros(n, 32), torch.ones(n, 32), torch.randn(c), torch.randn(c)
    given = (x, input_bias, mean, rstd, weight, bias, 32, True)
    return lambda: torch.ops.ddpm_fast_triton.recompute_group_norm_silu(*given), x.nbytes
