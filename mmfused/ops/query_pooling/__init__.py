"""Query pooling: a few learned queries summarise many tokens."""

from .functional import query_pooling
from .modules import QTransform, QueryPooling
from .probabilities import pooling_weights
from .reference import query_pooling_reference

__all__ = [
    "QTransform",
    "QueryPooling",
    "pooling_weights",
    "query_pooling",
    "query_pooling_reference",
]
