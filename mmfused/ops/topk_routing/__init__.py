"""Top-k routing: the experts of each token, the routing weights and the losses.

The module ``TopKMoE`` in :mod:`mmfused.ops.grouped_mlp` combines the router with the experts.
"""

from .arguments import Balance, RoutingOptions, Score
from .functional import topk_routing, topk_routing_from_input, update_selection_bias
from .order import Routing, routing_from_indices
from .reference import topk_routing_reference

__all__ = [
    "Balance",
    "Routing",
    "RoutingOptions",
    "Score",
    "routing_from_indices",
    "topk_routing",
    "topk_routing_from_input",
    "topk_routing_reference",
    "update_selection_bias",
]
