"""Query pooling. ``function.py``: the maths, the reference, the composed path, the kernels under
autograd, the public function.
"""

from .functional import query_pooling, query_pooling_reference
from .modules import QTransform, QueryPooling

__all__ = ["QTransform", "QueryPooling", "query_pooling", "query_pooling_reference"]
