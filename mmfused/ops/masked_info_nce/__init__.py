"""Masked InfoNCE: the loss functions, the reference and the module."""

from .functional import loss_over_ranks, masked_info_nce, scaled_info_nce
from .modules import MaskedInfoNCE
from .reference import masked_info_nce_reference

__all__ = [
    "MaskedInfoNCE",
    "loss_over_ranks",
    "masked_info_nce",
    "masked_info_nce_reference",
    "scaled_info_nce",
]
