"""Top-k routing: which experts a token goes to, with what weights, and how evenly."""

from .functional import (
    Routing,
    topk_routing,
    topk_routing_from_input,
    topk_routing_reference,
    update_selection_bias,
)
from .order import routing_from_indices

__all__ = [
    "Routing",
    "routing_from_indices",
    "topk_routing",
    "topk_routing_from_input",
    "topk_routing_reference",
    "update_selection_bias",
]
