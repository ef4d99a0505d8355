"""Masked InfoNCE. ``function.py``: the maths, the reference; ``autograd.py``: the gradient;
``composed.py``: the sweep on torch; ``distributed.py``: what ranks exchange."""

from .functional import masked_info_nce, masked_info_nce_reference
from .modules import MaskedInfoNCE

__all__ = ["MaskedInfoNCE", "masked_info_nce", "masked_info_nce_reference"]
