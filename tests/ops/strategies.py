"""Every combination that an op may be called with, for hypothesis to try."""

import math

import torch
from harness import Case, T, data, make_keys, make_t, schedule, targets, vlb_rows
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITE = (-math.inf, math.inf)


def sizes(draw, most: int) -> tuple[tuple[int, ...], str]:
    """A shape (N, ...) of about so many elements at most, and a layout."""
    kind = draw(st.sampled_from(["image", "image", "aligned image", "vector", "sequence", "empty"]))
    n = draw(st.integers(1, 4))
    if kind == "empty":
        return draw(st.sampled_from([(0, 3, 4, 4), (2, 0, 4), (2, 3, 0, 5)])), "contiguous"
    if kind == "vector":
        if draw(st.integers(0, 5)) == 0:
            return (n,), "contiguous"
        return (n, draw(st.integers(1, max(most // n, 1)))), "contiguous"
    if kind == "sequence":
        return (n, draw(st.integers(1, 5)), draw(st.integers(1, max(most // (5 * n), 1)))), "contiguous"
    channels = draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    side = math.isqrt(max(most // (n * channels), 1))
    layout = draw(st.sampled_from(["contiguous", "channels last"]))
    if kind == "aligned image":
        return (n, channels, max(side // 8, 1) * 8, 16), layout
    return (n, channels, draw(st.integers(1, side)), draw(st.integers(1, side))), layout


def noise_arguments(draw, shape, dtype, layout, kinds):
    kind = draw(st.sampled_from(kinds))
    return (
        data(shape, dtype, layout, "noise") if kind == "noise" else None,
        make_keys(shape[0]) if kind == "keys" else None,
    )


@st.composite
def q_sample(draw, most):
    shape, layout = sizes(draw, most)
    dtype = draw(st.sampled_from(DTYPES))
    given = draw(st.sampled_from([dtype, torch.float32, torch.uint8]))
    floating = torch.float32 if given == torch.uint8 else given
    noise, keys = noise_arguments(draw, shape, floating, layout, ["noise", "keys"])
    return Case("q_sample", (data(shape, given, layout, 0), noise, keys, make_t(shape[0]), schedule(2), dtype))


@st.composite
def weighted_loss(draw, most):
    shape, layout = sizes(draw, most)
    dtype = draw(st.sampled_from(DTYPES))
    inner = draw(st.sampled_from([dtype, torch.float32]))
    given = draw(st.sampled_from([None, inner, torch.uint8]))
    inner = torch.float32 if given == torch.uint8 else inner
    noise, keys = noise_arguments(draw, shape, inner, layout, ["noise", "keys", "none"] if given else ["noise", "keys"])
    x_start = None if given is None else data(shape, given, layout, 1)
    pred = data(shape, dtype, layout, 0)
    kind, scale = draw(st.integers(0, 2)), draw(st.sampled_from([1.0, 0.3]))
    upstream = data(shape[:1], torch.float32, layout, 4) if draw(st.booleans()) else None
    table = (make_t(shape[0]), schedule(3), upstream)
    return Case("weighted_loss", (pred, x_start, noise, keys, *table, kind, scale, draw(st.booleans())))


@st.composite
def reverse_step(draw, most):
    shape, layout = sizes(draw, most)
    pred_dtype = draw(st.sampled_from(DTYPES))
    dtype = draw(st.sampled_from([torch.float32, pred_dtype]))
    n = shape[0]
    noise, keys = noise_arguments(draw, shape, dtype, layout, ["noise", "keys", "none"])
    if keys is not None:
        keys = make_keys(draw(st.sampled_from([1, T])), n)
    step = make_t(n) if draw(st.booleans()) else torch.tensor(draw(st.integers(0, T - 1)))
    x_prev = data(shape, dtype, layout, 2) if draw(st.booleans()) else None
    variance = data(shape, pred_dtype, layout, 3) if draw(st.booleans()) else None
    bounds = None
    low, high = draw(st.sampled_from([(-1.0, 1.0), INFINITE]))
    if draw(st.integers(0, 3)) == 0:
        bounds = torch.stack([-torch.arange(1.0, n + 1), torch.arange(1.0, n + 1) / 2], dim=1).reshape(n, 2)
    emit = pred_dtype != dtype and draw(st.booleans())
    x, pred = data(shape, dtype, layout, 0), data(shape, pred_dtype, layout, 1)
    rows = schedule(6 if variance is None else 8)
    out = targets(x, pred, draw(st.booleans()), emit)
    return Case("reverse_step", (x, pred, noise, keys, x_prev, variance, bounds, step, rows, low, high, *out))


@st.composite
def vlb_terms(draw, most):
    shape, layout = sizes(draw, most)
    dtype = draw(st.sampled_from(DTYPES))
    rows = vlb_rows(learned := draw(st.booleans()))
    t = make_t(shape[0])
    levels = data(shape, torch.uint8, layout, 0)
    pixels = levels.float() * (2 / 255) - 1
    x_t = pixels + 0.05 * data(shape, torch.float32, layout, 1)
    pred = (0.1 * data(shape, torch.float32, layout, 2)).to(dtype)
    variance = data(shape, dtype, layout, 3).clamp(-1, 1) if learned else None
    low, high = draw(st.sampled_from([(-1.0, 1.0), INFINITE]))
    return Case("vlb_terms", (levels if draw(st.booleans()) else pixels, x_t, pred, variance, t, rows, low, high))


@st.composite
def normalisation(draw, most):
    """(x, weight, bias, scale, shift, groups) of a group norm."""
    n, per_group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    c = groups * per_group
    side = max(math.isqrt(max(most // (n * c), 1)), 2)
    kind = draw(st.sampled_from(["odd", "odd", "aligned", "sequence", "vector"]))
    if kind == "vector" and per_group == 1:
        kind = "sequence"
    shape = {
        "vector": (n, c),
        "odd": (n, c, draw(st.integers(1, side)), draw(st.integers(2, side))),
        "aligned": (n, c, 8, 8),
    }.get(kind)
    shape = shape or (n, c, 6)
    layout = draw(st.sampled_from(["contiguous", "channels last"]))
    dtype = draw(st.sampled_from(DTYPES))
    mean = draw(st.sampled_from([0.0, 3.0]))
    x = data(shape, dtype, layout, 0) + mean
    inner = draw(st.sampled_from([dtype, torch.float32]))
    weight, bias = data((c,), inner, layout, 1), data((c,), inner, layout, 2)
    scale = shift = None
    if draw(st.booleans()):
        scale, shift = data((n, c), dtype, layout, 3), data((n, c), dtype, layout, 4)
    return x, weight, bias, scale, shift, groups


@st.composite
def group_norm_silu(draw, most):
    return Case("group_norm_silu", (*draw(normalisation(most)), 1e-5, draw(st.booleans())))


@st.composite
def group_norm_silu_backward(draw, most):
    from ddpm_fast.ops import reference

    x, weight, bias, scale, shift, groups = draw(normalisation(most))
    _, mean, rstd = reference.group_norm_silu(x, weight, bias, scale, shift, groups, 1e-5, True)
    layout = "contiguous" if x.is_contiguous() else "channels last"
    grad = data(tuple(x.shape), x.dtype, layout, 5)
    return Case(
        "group_norm_silu_backward",
        (grad, x, mean, rstd, weight, bias, scale, shift, groups, draw(st.booleans())),
    )


def normalisation_of_images(most):
    """As `normalisation`, of channels-last images."""
    return normalisation(most).filter(lambda drawn: drawn[0].ndim == 4).map(_channels_last)


@st.composite
def additions(draw, most):
    """(x, input_bias, residual, skip, weight, bias, scale, shift, groups) of a norm of channels-last images."""
    x, weight, bias, scale, shift, groups = draw(normalisation_of_images(most))
    c = x.shape[1]
    unit = draw(st.sampled_from([1, 8]))
    of_skip = draw(st.integers(0, (c - 1) // unit)) * unit
    channels = c - of_skip
    x, skip = x[:, :channels], x[:, channels:] if of_skip else None
    x, skip = (y if y is None else y.contiguous(memory_format=torch.channels_last) for y in (x, skip))
    residual = data(tuple(x.shape), x.dtype, "channels last", 6) if draw(st.booleans()) else None
    return x, draw(input_biases(x)), residual, skip, weight, bias, scale, shift, groups


@st.composite
def input_biases(draw, x):
    n, channels = x.shape[:2]
    dtype = draw(st.sampled_from([x.dtype, torch.float32]))
    return draw(
        st.sampled_from(
            [
                None,
                data((channels,), dtype, "contiguous", 7),
                data((n, channels), dtype, "contiguous", 8),
                data((n, channels + 8), dtype, "contiguous", 9)[:, 8:],
            ]
        )
    )


def _channels_last(drawn):
    x, *others = drawn
    return x.contiguous(memory_format=torch.channels_last), *others


@st.composite
def add_group_norm_silu(draw, most):
    x, input_bias, residual, skip, *others = draw(additions(most))
    keep = residual is not None or skip is not None or draw(st.booleans())
    how = (1e-5, draw(st.booleans()), keep)
    return Case("add_group_norm_silu", (x, input_bias, residual, skip, *others, *how))


@st.composite
def add_group_norm_silu_backward(draw, most):
    from ddpm_fast.ops import reference

    x, input_bias, _, skip, weight, bias, scale, shift, groups = draw(additions(most))
    channels = x.shape[1]
    kept = skip is not None or input_bias is None or draw(st.booleans())
    h = reference.add_inputs(x, input_bias, None, skip).contiguous(memory_format=torch.channels_last)
    _, mean, rstd = reference.group_norm_silu(h, weight, bias, scale, shift, groups, 1e-5, True)
    grad = data(tuple(h.shape), x.dtype, "channels last", 5)
    grad_sum = data(tuple(h.shape), x.dtype, "channels last", 10) if kept and draw(st.booleans()) else None
    given = (grad, grad_sum, h if kept else x, input_bias, mean, rstd, weight, bias, scale, shift)
    return Case("add_group_norm_silu_backward", (*given, groups, draw(st.booleans()), kept, channels))


@st.composite
def recompute_group_norm_silu(draw, most):
    from ddpm_fast.ops import reference

    x, weight, bias, _, _, groups = draw(normalisation_of_images(most))
    input_bias = draw(input_biases(x))
    h = reference.add_inputs(x, input_bias, None, None)
    _, mean, rstd = reference.group_norm_silu(h, weight, bias, None, None, groups, 1e-5, True)
    given = (x, input_bias, mean, rstd, weight, bias, groups, draw(st.booleans()))
    return Case("recompute_group_norm_silu", given)


@st.composite
def normal(draw, most):
    return Case("normal", (make_keys(draw(st.integers(1, 4))), draw(st.integers(0, max(most // 4, 1)))))


@st.composite
def fold_in(draw, most):
    n = draw(st.integers(1, 50))
    numbers = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(n))
    return Case("fold_in", (make_keys(n), numbers))


STRATEGIES = {
    f.__name__: f
    for f in (
        fold_in,
        normal,
        q_sample,
        weighted_loss,
        reverse_step,
        vlb_terms,
        group_norm_silu,
        group_norm_silu_backward,
        add_group_norm_silu,
        add_group_norm_silu_backward,
        recompute_group_norm_silu,
    )
}
