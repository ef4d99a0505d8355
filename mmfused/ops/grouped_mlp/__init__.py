"""Experts of a mixture: matrix products grouped by expert, over tokens sorted by a Routing.

``TopKMoE`` is the whole layer: the router of :mod:`mmfused.ops.topk_routing` and the experts.
"""

from .checks import Activation
from .functional import grouped_linear, grouped_mlp
from .modules import TopKMoE
from .reference import grouped_linear_reference, grouped_mlp_reference

__all__ = [
    "Activation",
    "TopKMoE",
    "grouped_linear",
    "grouped_linear_reference",
    "grouped_mlp",
    "grouped_mlp_reference",
]
