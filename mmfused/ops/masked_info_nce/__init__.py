"""Masked InfoNCE: the function, its reference and Module, and what other packages build on."""

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
