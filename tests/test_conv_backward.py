"""The backward pass of convolutions of small images, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.nn import conv_backward
from ddpm_fast.nn.packed_weights import Conv2d

# N, C, H, W, out, window, stride, padding
SHAPES = [
    (8, 16, 4, 4, 24, 3, 1, 1),
    (2, 16, 8, 8, 8, 3, 1, 1),
    (1, 5, 7, 3, 6, (2, 3), (1, 2), (1, 0)),
    (3, 16, 9, 9, 16, 3, 2, 0),
    (4, 32, 8, 8, 16, 1, 1, 0),
    (2, 3, 1, 1, 4, 1, 1, 0),
]


def case(n, c, h, w, out, window, stride, padding, dtype):
    conv = Conv2d(c, out, window, stride, padding).to(dtype)
    x = torch.randn(n, c, h, w).to(dtype, memory_format=torch.channels_last).requires_grad_()
    return conv, x


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_weights_and_biases_are_rounded_once(shape):
    conv, x = case(*shape, torch.bfloat16)
    assert conv_backward.serves(conv, x)
    y = conv(x)
    grad = torch.randn(y.shape).to(y)
    found = torch.autograd.grad(y, (x, conv.weight, conv.bias), grad)

    exact = [a.detach().double().requires_grad_() for a in (x, conv.weight, conv.bias)]
    wanted = torch.autograd.grad(F.conv2d(*exact, conv.stride, conv.padding), exact, grad.double())
    # Sums in float32, of at most so many terms, and one rounding to bfloat16.
    terms = grad[:, 0].numel(), grad[:, 0].numel()
    size = [a.detach().double().abs() for a in (x, conv.weight, conv.bias)]
    sizes = torch.autograd.grad(
        F.conv2d(*(s.requires_grad_() for s in size), conv.stride, conv.padding), size, grad.double().abs()
    )
    for a, b, s, n in zip(found[1:], wanted[1:], sizes[1:], terms, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.double() - b).abs() <= b.abs() * 2**-8 + s * n * 2**-23).all()
    # The gradient of x is PyTorch's own, which rounds more often where the processor has no bfloat16.
    pytorch = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    assert torch.equal(found[0], torch.autograd.grad(pytorch, x, grad)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_and_their_gradients_are_those_of_finite_differences(shape):
    conv, x = case(*shape[:4], min(shape[4], 4), *shape[5:], torch.float64)
    x = x[:2, :, :3, :3].detach().requires_grad_() if shape[2] > 7 else x
    x = x[:2].detach().requires_grad_()

    def function(x, weight, bias):
        return conv_backward._Conv2d.apply(x, weight, bias, conv.stride, conv.padding)

    assert torch.autograd.gradcheck(function, (x, conv.weight, conv.bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, conv.weight, conv.bias), fast_mode=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_have_the_strides_of_the_weights(layout, autocast):
    """As autograd.grad gives them, before an accumulation copies them into the layout of the parameter."""
    conv, x = case(2, 16, 8, 8, 24, 3, 1, 1, torch.float32 if autocast else torch.bfloat16)
    conv.to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert conv_backward.serves(conv, x)
        loss = conv(x).sum()
    of_x, of_weight = torch.autograd.grad(loss, (x, conv.weight))
    assert of_x.dtype == of_weight.dtype == x.dtype
    assert of_weight.stride() == conv.weight.stride()
    assert conv.weight.is_contiguous(memory_format=layout)


def test_torch_func_sees_through():
    conv, x = case(3, 4, 4, 4, 8, 3, 1, 1, torch.bfloat16)
    assert conv_backward.serves(conv, x)
    weights = {name: p.detach() for name, p in conv.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(conv, weights, (x,)).float().square().sum()

    loss({name: p.requires_grad_() for name, p in weights.items()}, x).backward()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x[:, None])
    for name, p in weights.items():
        assert torch.equal(torch.func.grad(loss)(weights, x)[name], p.grad)
        error = each[name].float().sum(0) - p.grad.float()  # three roundings to bfloat16 and one
        assert (error.abs() <= 2**-8 * (each[name].float().abs().sum(0) + p.grad.float().abs())).all()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"image": (1, 16, 16, 16)},
        {"arguments": {"groups": 2}},
        {"arguments": {"dilation": 2}},
        {"arguments": {"padding_mode": "circular"}},
        {"arguments": {"padding": "same"}},
    ],
)
def test_everything_else_is_left_to_pytorch(change):
    conv = Conv2d(16, 16, 3, **({"padding": 1} | change.get("arguments", {}))).to(change.get("dtype", torch.bfloat16))
    x = torch.randn(change.get("image", (1, 16, 4, 4))).to(conv.weight)
    assert not conv_backward.serves(conv, x)
    conv(x).sum().backward()
    with torch.no_grad():
        assert not conv_backward.serves(conv, x)


def test_dtypes_are_those_of_pytorch():
    conv, x = case(2, 4, 4, 4, 4, 3, 1, 1, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.float64
    with pytest.raises(RuntimeError, match="should be the same"):
        conv.float()(x.to(torch.bfloat16))
