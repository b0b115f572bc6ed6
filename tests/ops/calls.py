"""A call of every public op, on float32, half-precision or float64 data."""

import torch
from harness import data, make_keys, make_t, schedule, vlb_rows

from ddpm_fast import ops

SHAPE = (3, 4, 6, 5)


def arguments(op: str, dtype=torch.float32, layout="channels last", device="cpu") -> tuple[tuple, dict]:
    """(args, kwargs) of a public op, with gradients to be had where an op has any."""
    n, c = SHAPE[:2]

    def tensor(i, shape=SHAPE, dtype=dtype):
        return data(shape, torch.float32, layout, i).to(device, dtype)

    t, keys = make_t(n).to(device), make_keys(n).to(device)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {k: schedule(k).to(device, exact) for k in (2, 3, 6, 8)}
    wide = torch.promote_types(dtype, torch.float32)
    x_start = (tensor(0, dtype=wide) * 0.3).clamp(-0.9, 0.9)
    calls = {
        "q_sample": ((tensor(0), t, rows[2]), {"keys": keys}),
        "weighted_loss": ((tensor(0), t, rows[3]), {"x_start": tensor(1), "keys": keys}),
        "reverse_step": (
            (tensor(0, dtype=wide), tensor(1), t, rows[8]),
            {"keys": keys, "x_start_prev": tensor(2, dtype=wide), "variance": tensor(3), "return_x_start": True},
        ),
        "vlb_terms": (
            (x_start, x_start + 0.05 * tensor(1, dtype=wide), 0.1 * tensor(2), t, vlb_rows(True).to(device, exact)),
            {"variance": tensor(3)},
        ),
        "group_norm_silu": (
            (tensor(0), tensor(1, (c,)), tensor(2, (c,)), 2),
            {"scale": tensor(3, (n, c)), "shift": tensor(4, (n, c))},
        ),
        "add_group_norm_silu": (
            (tensor(0), tensor(1, (c + 2,)), tensor(2, (c + 2,)), 2),
            {
                "scale": tensor(3, (n, c + 2)),
                "shift": tensor(4, (n, c + 2)),
                "input_bias": tensor(5, (n, c)),
                "residual": tensor(6),
                "skip": tensor(7, (n, 2, *SHAPE[2:])),
            },
        ),
    }
    return calls[op]


OPS = ("q_sample", "weighted_loss", "reverse_step", "vlb_terms", "group_norm_silu", "add_group_norm_silu")
# What each op can be differentiated by, in the order of `leaves`.
DIFFERENTIABLE = {
    "q_sample": (0,),
    "weighted_loss": (0,),
    "reverse_step": (0, 1, "x_start_prev", "variance"),
    "vlb_terms": (1, 2, "variance"),
    "group_norm_silu": (0, 1, 2, "scale", "shift"),
    "add_group_norm_silu": (0, 1, 2, "scale", "shift", "input_bias", "residual", "skip"),
}


def call(op: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """The op's differentiable result, or the sum of both."""
    result = getattr(ops, op)(*args, **kwargs)
    if isinstance(result, tuple) and not isinstance(result, ops.ReverseStep):
        return result[0] + 0.5 * result[1]
    return result.x if isinstance(result, ops.ReverseStep) else result


def split(op: str, args: tuple, kwargs: dict):
    """(leaves, a function of them): the op as a function of what it can be differentiated by."""
    places = DIFFERENTIABLE[op]
    leaves = [(args[p] if isinstance(p, int) else kwargs[p]).detach().clone().requires_grad_() for p in places]

    def function(*leaves):
        new_args, new_kwargs = list(args), dict(kwargs)
        for place, leaf in zip(places, leaves, strict=True):
            if isinstance(place, int):
                new_args[place] = leaf
            else:
                new_kwargs[place] = leaf
        return call(op, tuple(new_args), new_kwargs)

    return leaves, function
