"""Experts of a mixture: products grouped by expert over tokens in the order of a Routing, without
padding.
"""

from .functional import grouped_linear, grouped_linear_reference, grouped_mlp, grouped_mlp_reference
from .modules import TopKMoE

__all__ = [
    "TopKMoE",
    "grouped_linear",
    "grouped_linear_reference",
    "grouped_mlp",
    "grouped_mlp_reference",
]
