"""Whether a transform of torch.func or forward-mode differentiation is active.

The registered operators have a gradient for autograd's reverse mode alone. Inside a transform (`grad`, `vjp`, `jvp`,
`vmap` and what is made of them) and inside `forward_ad.dual_level` the ops are therefore computed by the reference,
which PyTorch can transform. Both questions are asked on every call; together they cost about 0.2 us.
"""

__all__ = ["by_reference_backward", "inside_vmap", "transformed"]

import torch
from torch.autograd import forward_ad

_BATCHED = torch._C._dispatch_key_parse("Batched")
_level = torch._C._functorch.maybe_current_level


def transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is active.

    In code that torch.compile traces the answer is no: a compiler sees the registered operator.
    """
    return (_level() is not None or forward_ad._current_level >= 0) and not torch.compiler.is_compiling()


def inside_vmap() -> bool:
    """Whether one of the active transforms is a vmap."""
    if _level() is None:
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack or ())


def by_reference_backward(grad: torch.Tensor) -> bool:
    """Whether a registered gradient is to be computed by the reference, so that it can be differentiated or mapped.

    That is so where gradients are recorded (create_graph=True), inside a transform, and for the batched gradients of
    `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its own.
    """
    return torch.is_grad_enabled() or transformed() or torch._C._dispatch_keys(grad).has(_BATCHED)
