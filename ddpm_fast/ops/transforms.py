"""Whether a transform of torch.func or forward-mode differentiation is active.

The registered operators have a gradient for autograd's reverse mode alone. Inside a transform (`grad`, `vjp`, `jvp`,
`vmap` and what is made of them) and inside `forward_ad.dual_level` the ops are therefore computed by the reference,
which PyTorch can transform. Both questions are asked on every call; together they cost about 0.2 us.
"""

__all__ = ["inside_vmap", "transformed"]

import torch
from torch.autograd import forward_ad

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
