"""Tensors for the tests of the CUDA kernels."""

import torch

N = 4  # samples
F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8


def make_keys(*shape):
    return torch.randint(-(2**63), 2**63 - 1, (*shape, 2))


def images(*shape, layout=torch.channels_last, dtype=F32):
    return torch.randn(shape).contiguous(memory_format=layout).to(dtype)


def unaligned(x):
    """The same values and strides, from an address that is not a multiple of 16."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.as_strided(x.shape, x.stride()).copy_(x)
