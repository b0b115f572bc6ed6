"""The inner loops of diffusion models. Of a model the ops take rows of coefficients alone."""

__all__ = [
    "BACKENDS",
    "LOSS_TYPES",
    "ReverseStep",
    "add_group_norm_silu",
    "backend",
    "channels_last_format",
    "fold_in",
    "group_norm_silu",
    "normal",
    "q_sample",
    "reverse_step",
    "vlb_terms",
    "weighted_loss",
]

from .add_group_norm_silu import add_group_norm_silu
from .dispatch import BACKENDS, backend
from .group_norm_silu import group_norm_silu
from .layout import channels_last_format
from .noise import fold_in, normal
from .q_sample import q_sample
from .reference import LOSS_TYPES
from .reverse_step import ReverseStep, reverse_step
from .vlb_terms import vlb_terms
from .weighted_loss import weighted_loss
