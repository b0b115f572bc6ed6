"""The ops as Triton kernels, for NVIDIA's and AMD's GPUs. Imported when one is called, and not before.

Each op is a function with the arguments of the op of its name, which come checked and dense (see ../backends.py).
A timestep that is not in the table gives NaN: a kernel here has no way to fail.
"""

from .add_group_norm_silu import add_group_norm_silu, add_group_norm_silu_backward, recompute_group_norm_silu
from .group_norm_silu import group_norm_silu, group_norm_silu_backward
from .q_sample import q_sample
from .random import fold_in, normal
from .reverse_step import reverse_step
from .vlb_terms import vlb_terms
from .weighted_loss import weighted_loss

__all__ = [
    "add_group_norm_silu",
    "add_group_norm_silu_backward",
    "fold_in",
    "group_norm_silu",
    "group_norm_silu_backward",
    "normal",
    "q_sample",
    "recompute_group_norm_silu",
    "reverse_step",
    "vlb_terms",
    "weighted_loss",
]
