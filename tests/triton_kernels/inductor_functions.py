"""What TorchInductor is given to compile: the references, as functions of tensors alone."""

from ddpm_fast.ops import reference
from ddpm_fast.ops.noise import noise_of


def q_sample(x_start, keys, t, rows):
    return reference.q_sample(x_start, noise_of(keys, x_start.shape), t, rows, x_start.dtype)


def weighted_loss(pred, keys, t, rows):
    arguments = (pred, None, noise_of(keys, pred.shape), t, rows, "l2")
    return reference.weighted_loss(*arguments), reference.weighted_loss_gradient(*arguments).to(pred.dtype)


def reverse_step(x, pred, keys, step, rows):
    noise = noise_of(keys, x.shape)
    return reference.reverse_step(x, pred, noise, None, None, None, step, rows, -1.0, 1.0)[0]


def vlb_terms(x_start, x_t, pred, t, rows):
    return reference.vlb_terms(x_start, x_t, pred, None, t, rows, -1.0, 1.0)


def group_norm_silu(x, weight, bias):
    return reference.group_norm_silu(x, weight, bias, None, None, 32, 1e-5, True)


def group_norm_silu_backward(grad, x, mean, rstd, weight, bias):
    grads = reference.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, None, None, 32, True)
    return grads[:3]


def add_group_norm_silu(x, input_bias, residual, skip, weight, bias):
    h = reference.add_inputs(x, input_bias, residual, skip)
    return reference.group_norm_silu(h, weight, bias, None, None, 32, 1e-5, True)[0], h
