"""Fused Triton and CUDA kernels for training multimodal retrieval and classification models.

Four operators, each with a function, an ``nn.Module`` and a reference in plain PyTorch:

* query pooling: ``query_pooling``, ``QueryPooling``, ``QTransform``, ``pooling_weights``
* gated cross-attention: ``gated_cross_attention``, ``GatedCrossAttention``,
  ``BidirectionalGatedCrossAttention``, ``TokenGate``
* top-k routing and experts: ``topk_routing``, ``grouped_mlp``, ``grouped_linear``, ``TopKMoE``
* masked InfoNCE: ``masked_info_nce``, ``MaskedInfoNCE``

``fuse(model)`` makes modules of other libraries use these operators, in place. ``backend`` and
``set_backend`` choose between the reference, an optimized implementation in plain PyTorch, and the
kernels. ``mmfused.models`` has five published architectures, and ``mmfused.losses`` small loss
terms.
"""

from pathlib import Path

# In a wheel, kernels/ and benchmarks/ are inside this folder. In a checkout they are next to it, so
# the root of the checkout is added to the path of this package. mmfused/kernels is a symbolic link
# for editors and type checkers. kernels/ has no __init__.py, because it would shadow Hugging Face's
# package "kernels".
if not (Path(__file__).parent / "benchmarks").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from . import losses
from .fuse import FuseReport, fuse, register_experts, unfuse
from .library import backend, set_backend
from .ops.gated_cross_attention import (
    BidirectionalGatedCrossAttention,
    CrossAttentionWeights,
    GatedCrossAttention,
    TokenGate,
    bidirectional_gated_cross_attention,
    bidirectional_gated_cross_attention_reference,
    gated_cross_attention,
    gated_cross_attention_reference,
    pack_passes,
)
from .ops.grouped_mlp import (
    TopKMoE,
    grouped_linear,
    grouped_linear_reference,
    grouped_mlp,
    grouped_mlp_reference,
)
from .ops.masked_info_nce import MaskedInfoNCE, masked_info_nce, masked_info_nce_reference
from .ops.query_pooling import (
    QTransform,
    QueryPooling,
    pooling_weights,
    query_pooling,
    query_pooling_reference,
)
from .ops.topk_routing import (
    Routing,
    routing_from_indices,
    topk_routing,
    topk_routing_from_input,
    topk_routing_reference,
    update_selection_bias,
)
from .warmup import WarmupReport, warmup

__version__ = "0.2.0"

__all__ = [
    "BidirectionalGatedCrossAttention",
    "CrossAttentionWeights",
    "FuseReport",
    "GatedCrossAttention",
    "MaskedInfoNCE",
    "QTransform",
    "QueryPooling",
    "Routing",
    "TokenGate",
    "TopKMoE",
    "WarmupReport",
    "__version__",
    "backend",
    "bidirectional_gated_cross_attention",
    "bidirectional_gated_cross_attention_reference",
    "fuse",
    "gated_cross_attention",
    "gated_cross_attention_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "grouped_mlp",
    "grouped_mlp_reference",
    "losses",
    "masked_info_nce",
    "masked_info_nce_reference",
    "pack_passes",
    "pooling_weights",
    "query_pooling",
    "query_pooling_reference",
    "register_experts",
    "routing_from_indices",
    "set_backend",
    "topk_routing",
    "topk_routing_from_input",
    "topk_routing_reference",
    "unfuse",
    "update_selection_bias",
    "warmup",
]
