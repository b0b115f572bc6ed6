"""The inner loops of diffusion, which know nothing of diffusion models but rows of coefficients."""

__all__ = ["LOSS_TYPES", "group_norm_silu", "q_sample", "reverse_step", "weighted_loss"]

from .q_sample import q_sample
from .reference import LOSS_TYPES, group_norm_silu, reverse_step, weighted_loss
