"""Arguments for every op in its strict form, the float64 truth, and how far from it float32 may end.

A bound is derived, not guessed: EPS for each rounding of a term, half a unit in the last place of the output's dtype,
and NOISE for each standard normal. Sums add at most CHAIN numbers one after the other, by design of every backend.
"""

import zlib

import torch
from torch import Tensor

from ddpm_fast.ops import backend, reference
from ddpm_fast.ops import noise as keyed_noise
from ddpm_fast.ops.reference import LOSS_TYPES

EPS = 2.0**-24
CHAIN = 1024
# float32's Box-Muller, at most 6.8: 2 pi v rounded in [4, 8), and four roundings of the result
NOISE = 6.8 * (2.0**-22 + 4 * EPS)
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Relative error of 1 / (1 + e^-z) on the CPU where the result is bfloat16, which keeps 2^-8 of it: AVX-512's reciprocal
# (2^-14, as documented) and a cubic for 2^f on [0, 1) (minimax, 7.5e-5 of 2^f, and so at most that of 1 + 2^t).
SIGMOID = {torch.float32: 0.0, torch.bfloat16: 2.0**-14 + 7.5e-5, torch.float16: 0.0}
T = 20

Shape = tuple[int, ...]


def generator(*data) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(data).encode()))


def schedule(columns: int) -> Tensor:
    """Rows of the sizes that rows have, (T, columns)."""
    alphas_cumprod = (1 - torch.linspace(1e-3, 0.3, T, dtype=torch.float64)).cumprod(0)
    a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return {
        2: torch.stack([a, s], 1),
        3: torch.stack([-s, a, 0.5 + a], 1),
        6: torch.stack([1 / a, -s / a, s, 0.5 + a, -0.1 * a, s * (torch.arange(T) > 0)], 1),
        8: torch.stack([1 / a, -s / a, s, 0.5 + a, -0.1 * a, s * (torch.arange(T) > 0), -4 * a - 1, -a], 1),
    }[columns].float()


def vlb_rows(learned: bool) -> Tensor:
    """(u, w, c0, cx, log q, log p[, log lower, log upper]), sigma at t = 0 being about a level of 8 bits."""
    steps = torch.arange(T, dtype=torch.float64)
    a = (1 - (steps + 1) / (T + 1)).sqrt()
    s = (1 - a**2).sqrt()
    log_q = -8 + 0.3 * steps
    columns = [1 / a, -s / a, 0.9 * a, 0.3 * s, log_q, log_q + 0.2]
    return torch.stack([*columns, log_q - 0.1, log_q + 0.5] if learned else columns, 1).float()


def data(shape: Shape, dtype: torch.dtype, layout: str, *seed) -> Tensor:
    if dtype == torch.uint8:
        x = torch.randint(256, shape, generator=generator(shape, *seed), dtype=torch.uint8)
    else:
        x = torch.randn(shape, generator=generator(shape, *seed)).to(dtype)
    if layout == "channels last" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    return x


def make_keys(*shape: int) -> Tensor:
    """Keys of all bits, offsets near the wrap of 32 bits among them."""
    keys = torch.randint(-(2**63), 2**63 - 1, (*shape, 2), generator=generator(shape))
    keys[..., :1, 1] = 2**32 - 2
    return keys


def make_t(n: int) -> Tensor:
    t = torch.randint(T, (n,), generator=generator(n))
    t[:1] = 0
    return t


def targets(x: Tensor, pred: Tensor, x_start: bool = False, model_input: bool = False) -> tuple[Tensor | None, ...]:
    """(x_next, x_start, model_input) for a step to write to, full of NaN; None for what is not wanted."""

    def target(like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)

    return target(x), target(x) if x_start else None, target(pred) if model_input else None


class Case:
    """One call of an op, by its strict arguments."""

    def __init__(self, op: str, arguments: tuple) -> None:
        self.op, self.arguments = op, arguments

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(short, self.arguments))})"

    def truth(self) -> list[tuple[Tensor, Tensor]]:
        """Each result in float64, and how far from it float32 may end; noise from keys is float32 noise, widened."""
        return TRUTHS[self.op](*self.arguments)


def short(value) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    strides = "" if value.is_contiguous() else f" strides {value.stride()}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{strides}"


def wide(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x


def noise_of(noise: Tensor | None, keys: Tensor | None, shape: Shape) -> tuple[Tensor | None, float]:
    """The noise in float64, and its error."""
    if noise is not None:
        return wide(noise), 0.0
    if keys is None:
        return None, 0.0
    with backend("reference"):
        return keyed_noise.noise_of(keys, shape).double(), NOISE


def pixels(x: Tensor) -> Tensor:
    return x.double() * (2 / 255) - 1 if x.dtype == torch.uint8 else x.double()


def columns(rows: Tensor, index: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    picked = rows.double()[index.expand(len(x))]
    return picked.view(len(x), rows.shape[1], *[1] * (x.ndim - 1)).unbind(1)


def rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A value of a given error, stored in a dtype."""
    return value, error + HALF_ULP[dtype] * (value.abs() + error) + TINY[dtype]


def q_sample_truth(x_start, noise, keys, t, rows, dtype):
    eps, noise_error = noise_of(noise, keys, x_start.shape)
    a, s = columns(rows, t, x_start)
    x = pixels(x_start)
    error = 4 * EPS * ((a * x).abs() + (s * eps).abs() + a) + s.abs() * noise_error
    return [rounded(a * x + s * eps, error, dtype)]


def weighted_loss_truth(pred, x_start, noise, keys, t, rows, upstream, loss_type, scale, with_grad):
    eps, noise_error = noise_of(noise, keys, pred.shape)
    p, q, weight = columns(rows, t, pred)
    x = torch.zeros_like(pred, dtype=torch.float64) if x_start is None else pixels(x_start)
    p = p * (x_start is not None)
    eps = torch.zeros_like(x) if eps is None else eps
    difference = pred.double() - (p * x + q * eps)
    error = 5 * EPS * (pred.double().abs() + (p * x).abs() + p.abs() + (q * eps).abs()) + q.abs() * noise_error
    kind = LOSS_TYPES[loss_type]
    size = max(pred[:1].numel(), 1)
    value = {
        "l2": difference.square(),
        "l1": difference.abs(),
        "huber": torch.where(difference.abs() <= 1, difference.square() / 2, difference.abs() - 0.5),
    }[kind]
    slope = {"l2": 2 * difference, "l1": difference.sign(), "huber": difference.clamp(-1, 1)}[kind]
    steepness = {"l2": 2 * difference.abs() + error, "l1": 1.0, "huber": 1.0}[kind]
    factor = scale * weight.flatten() / size
    loss = factor * reference.by_sample(value).sum(1)
    loss_error = factor * reference.by_sample(error * steepness + (CHAIN + 4) * EPS * value).sum(1)
    results = [rounded(loss, loss_error, torch.float32)]
    if with_grad:
        change = {"l2": 2 * error, "l1": 2.0 * (difference.abs() <= error), "huber": error}[kind]
        if upstream is not None:
            factor = factor * upstream.double()
        factor = factor.view(-1, *[1] * (pred.ndim - 1))
        error = factor.abs() * (change + 5 * EPS * slope.abs())
        results.append(rounded(factor * slope, error, pred.dtype))
    return results


def reverse_step_truth(
    x, pred, noise, keys, x_prev, variance, bounds, step, rows, low, high, _, x_start_out, model_input
):
    if keys is not None:
        keys = keys[0] if len(keys) == 1 else keys[step.expand(len(x)), torch.arange(len(x))]
    eps, noise_error = noise_of(noise, keys, x.shape)
    u, w, A, B, C, sigma, *logs = columns(rows, step, x)
    state, prediction = x.double(), pred.double()
    x_start = u * state + w * prediction
    x_error = 4 * EPS * ((u * state).abs() + (w * prediction).abs())
    if bounds is not None:
        low, high = bounds.double().view(len(x), 2, *[1] * (x.ndim - 1)).unbind(1)
    else:
        low, high = (torch.tensor(b, dtype=torch.float64) for b in (low, high))
    x_start = torch.minimum(torch.maximum(x_start, low), high)
    x_next, error = A * state + B * x_start, B.abs() * x_error
    size = (A * state).abs() + (B * x_start).abs()
    if x_prev is not None:
        x_next, size = x_next + C * x_prev.double(), size + (C * x_prev.double()).abs()
    if eps is not None:
        sigma_error = EPS
        if variance is not None:
            exponent = 0.5 * (logs[0] + (variance.double() + 1) / 2 * (logs[1] - logs[0]))
            sigma = torch.where(sigma > 0, exponent.exp(), 0)
            sigma_error = 8 * EPS * (1 + logs[0].abs() + logs[1].abs())
        x_next, size = x_next + sigma * eps, size + (sigma * eps).abs()
        error = error + sigma * (noise_error + sigma_error * eps.abs())
    error = error + 6 * EPS * size
    results = [rounded(x_next, error, x.dtype)]
    if x_start_out is not None:
        results.append(rounded(x_start, x_error, x.dtype))
    if model_input is not None:
        results.append(rounded(x_next, error, pred.dtype))
    return results


def vlb_terms_truth(x_start, x_t, pred, variance, t, rows, low, high):
    arguments = [wide(x) for x in (x_start, x_t, pred, variance)]
    if x_start.dtype == torch.uint8:
        arguments[0] = pixels(x_start)
    truth = reference.vlb_terms(*arguments, t, rows.double(), low, high)
    u, w, c0, cx, _, log_p, *logs = columns(rows, t, x_t)
    log_p = logs[0] if logs else log_p
    x, state, prediction = arguments[0].abs(), arguments[1].abs(), arguments[2].abs()
    # The difference of the means, in units of the deviation, and what its rounding does to a square or to a mass of at
    # least about a twentieth of its erfcs.
    deviation = (-0.5 * log_p).exp()
    size = deviation * (c0.abs() * (x + u.abs() * state + w.abs() * prediction) + cx.abs() * state)
    slack = 8 * EPS * size * (size + 1) + 64 * EPS * (1 + log_p.abs())
    error = reference.by_sample(slack).sum(1) + (CHAIN + 8) * EPS * truth.abs()
    return [(truth, error)]


def group_norm_truth(x, weight, bias, scale, shift, groups, eps, silu):
    _, mean, rstd = reference.group_norm_silu(*(wide(v) for v in (x, weight, bias, scale, shift)), groups, eps, silu)
    # The mean has a rounding of its own and that of a sum of deviations, and so has the variance. A group of equal
    # values, whose variance is 0, has rstd = eps^-1/2 exactly.
    spread = 1 / rstd
    count = x[0].numel() // groups
    chain = min(count, CHAIN)
    mean_error = EPS * mean.abs() + chain * EPS * spread
    rstd_error = (chain + 4) * 2 * EPS * rstd + 2 * rstd * (rstd * mean_error) ** 2
    y = _normalised(x, mean, rstd, weight, bias, scale, shift, groups, silu, mean_error, rstd_error)
    return [y, (mean, mean_error + TINY[torch.float32]), (rstd, rstd_error)]


def _normalised(x, mean, rstd, weight, bias, scale, shift, groups, silu, mean_error, rstd_error):
    """The output of statistics with these errors."""
    y = reference.normalise(*(wide(v) for v in (x, mean, rstd, weight, bias, scale, shift)), groups, silu)
    n, c = x.shape[:2]
    shape = (n, c, *[1] * (x.ndim - 2))
    mean, rstd, mean_error, rstd_error = (
        m.double().repeat_interleave(c // groups, 1).view(shape) for m in (mean, rstd, mean_error, rstd_error)
    )
    x_hat = (x.double() - mean) * rstd
    gain = weight.double().view(1, c, *shape[2:]).abs().expand(shape)
    offset = bias.double().view(1, c, *shape[2:]).abs().expand(shape)
    if scale is not None:
        gain, offset = (v * (1 + scale.double().view(shape).abs()) for v in (gain, offset))
        offset = offset + shift.double().view(shape).abs()
    error = gain * (rstd * mean_error + (x_hat / rstd).abs() * rstd_error + 4 * EPS * x_hat.abs())
    error = 1.1 * (error + 4 * EPS * offset) + (8 * EPS + SIGMOID[x.dtype] * silu) * y.abs()
    return rounded(y, error, x.dtype)


def group_norm_backward_truth(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu):
    (of_x, error, _), *results = _group_norm_gradients(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu)
    return [rounded(of_x, error, x.dtype), *results]


def _group_norm_gradients(grad, x, mean, rstd, weight, bias, scale, shift, groups, silu, grad_x=None):
    """Compared at given statistics; errors in units of the sums of what is added up.

    Of x: its gradient, the error before it is rounded, and the size of the terms that it consists of.
    """
    inputs = [wide(v) for v in (grad, x, mean, rstd, weight, bias, scale, shift)]
    grads = reference.group_norm_silu_backward(*inputs, groups, silu, wide(grad_x))
    n, c = x.shape[:2]
    axes = tuple(range(2, x.ndim))
    shape = (n, c, *[1] * (x.ndim - 2))
    mean_c, rstd_c = (m.double().repeat_interleave(c // groups, 1).view(shape) for m in (mean, rstd))
    x_hat = ((x.double() - mean_c) * rstd_c).abs()
    gain = weight.double().abs().view(1, c, *shape[2:]).expand(shape)
    offset = bias.double().abs().view(1, c, *shape[2:]).expand(shape)
    if scale is not None:
        factor = 1 + scale.double().view(shape).abs()
        gain, offset = gain * factor, offset * factor + shift.double().abs().view(shape)
    # SiLU's slope is at most 1.1 and changes by at most half of what its argument changes by.
    # In s (1 + z (1 - s)), a relative error of s and 1 - s is one of the slope, and of |z| s (1 - s), which is < 0.23.
    slack = 8 * EPS * (1 + (x_hat * gain + offset)) + 1.4 * SIGMOID[x.dtype] * silu
    g, dg = 1.1 * grad.double().abs(), slack * grad.double().abs()
    chain = (min(x[0, 0].numel(), CHAIN) + 8) * EPS
    sums = [(dg + chain * g).sum(axes), ((dg + (chain + 4 * EPS) * g) * x_hat).sum(axes)]  # errors of sum g, sum g x
    sizes = [g.sum(axes), (g * x_hat).sum(axes)]
    by_group = (n, groups, c // groups)
    count = x[0].numel() // groups
    gain_nc = gain.flatten(1)[:, :: max(gain[0, 0].numel(), 1)]
    means = [
        ((gain_nc * (e + CHAIN * EPS * m)).view(by_group).sum(2) / count).repeat_interleave(c // groups, 1).view(shape)
        for e, m in zip(sums, sizes, strict=True)
    ]
    total = [(gain_nc * m).view(by_group).sum(2).repeat_interleave(c // groups, 1).view(shape) / count for m in sizes]
    x_error = rstd_c * (gain * dg + means[0] + x_hat * means[1] + 8 * EPS * (gain * g + total[0] + x_hat * total[1]))
    size = rstd_c * (gain * g + total[0] + x_hat * total[1])
    if grad_x is not None:
        size = size + grad_x.double().abs()
        x_error = x_error + EPS * size
    results = [(grads[0], x_error, size)]
    factor = 1 if scale is None else 1 + scale.double().abs()
    for value, e, m in ((grads[1], sums[1], sizes[1]), (grads[2], sums[0], sizes[0])):
        error = ((e + (n + 4) * EPS * m) * factor).sum(0)
        results.append(rounded(value, error, weight.dtype))
    if scale is not None:
        gamma, beta = weight.double().abs(), bias.double().abs()
        error = gamma * (sums[1] + 4 * EPS * sizes[1]) + beta * (sums[0] + 4 * EPS * sizes[0])
        results.append(rounded(grads[3], error, scale.dtype))
        results.append(rounded(grads[4], sums[0], shift.dtype))
    return results


def add_group_norm_truth(x, input_bias, residual, skip, weight, bias, scale, shift, groups, eps, silu, keep):
    """The sum has the bits of the reference everywhere, so that its norm can be compared with the norm of that."""
    h = reference.add_inputs(x, input_bias, residual, skip)
    y, *statistics = group_norm_truth(h, weight, bias, scale, shift, groups, eps, silu)
    return [y, (h if keep else x.new_empty(0), torch.zeros(())), *statistics]


def recompute_group_norm_truth(x, input_bias, mean, rstd, weight, bias, groups, silu):
    h, exact = reference.add_inputs(x, input_bias, None, None), torch.zeros_like(mean)
    return [_normalised(h, mean, rstd, weight, bias, None, None, groups, silu, exact, exact)]


def add_group_norm_backward_truth(
    grad, grad_sum, x, input_bias, mean, rstd, weight, bias, scale, shift, groups, silu, kept, channels
):
    h = x if kept else reference.add_inputs(x, input_bias, None, None)
    (of_h, error, size), *results = _group_norm_gradients(
        grad, h, mean, rstd, weight, bias, scale, shift, groups, silu, grad_sum
    )
    parts = [rounded(of_h[:, part], error[:, part], x.dtype) for part in (slice(channels), slice(channels, None))]
    of_bias = (x.new_empty(0), torch.zeros(()))
    if input_bias is not None:  # added up before the gradient of x is rounded
        axes = [d for d in range(x.ndim) if d != 1 and (d > 0 or input_bias.ndim == 1)]
        chain = min(x[0, 0].numel(), CHAIN) + len(x) + 8
        value, errors = of_h[:, :channels], error[:, :channels] + chain * EPS * size[:, :channels]
        if axes:
            value, errors = value.sum(axes), errors.sum(axes)
        of_bias = rounded(value, errors, input_bias.dtype)
    return [*parts, of_bias, *results]


def normal_truth(keys, size):
    return [(reference.normal(keys, size).double(), torch.tensor(NOISE))]


def fold_in_truth(keys, numbers):
    return [(reference.fold_in(keys, numbers), torch.tensor(0))]


TRUTHS = {
    "fold_in": fold_in_truth,
    "normal": normal_truth,
    "q_sample": q_sample_truth,
    "weighted_loss": weighted_loss_truth,
    "reverse_step": reverse_step_truth,
    "vlb_terms": vlb_terms_truth,
    "group_norm_silu": group_norm_truth,
    "group_norm_silu_backward": group_norm_backward_truth,
    "add_group_norm_silu": add_group_norm_truth,
    "add_group_norm_silu_backward": add_group_norm_backward_truth,
    "recompute_group_norm_silu": recompute_group_norm_truth,
}


def assert_true(case: Case, results) -> None:
    """Every result lies within its bound of the float64 truth."""
    results = [results] if isinstance(results, Tensor) else list(results)
    expected = case.truth()
    results = [result for result in results if result.numel()]  # empty: not asked for
    expected = [(value, bound) for value, bound in expected if value.numel()]
    assert len(results) == len(expected)
    for i, (result, (value, bound)) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == value.shape
        distance = (result.double() - value.double()).abs()
        excess = (distance - bound).max()
        assert excess <= 0, f"result {i} of {case.op} is off by {distance.max():.3g}, {excess:.3g} more than it may be"
