"""Contrastive losses of open_clip and sentence-transformers on :func:`mmfused.masked_info_nce`.

The loss of B queries and C candidates is computed in one sweep: a pass over the logits in blocks,
so that the B x C matrix of logits is never in memory.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..children import dense
from ..library import autocast_dtype
from ..losses import unit_rows
from ..ops.masked_info_nce import scaled_info_nce
from .base import KINDS, LEFT, Swap, own_class, path_of

_TEXT = "sentence_transformers"
_LOSSES = f"{_TEXT}.sentence_transformer.losses"
_SIMILARITY = f"{_TEXT}.util.similarity"
SIMILARITIES = ("cos_sim", "dot_score")
_WRAPPER = f"{_LOSSES}.matryoshka.CachedLossDecorator"
_OTHER_SCALE = "the original scales gradients differently; use MaskedInfoNCE(gather='global')."


def _are_embeddings(*tensors: Tensor) -> bool:
    """Return whether all are non-empty floating tensors (rows, dim) of one dtype and device."""
    first = tensors[0]
    alike = all((x.dtype, x.device) == (first.dtype, first.device) for x in tensors)
    rows = all(x.dim() == 2 and x.is_floating_point() and x.numel() > 0 for x in tensors)
    return dense(*tensors) and alike and rows


def _is_one_number(scale: float | Tensor, x: Tensor) -> bool:
    if not isinstance(scale, Tensor):
        return isinstance(scale, int | float)
    usable_device = scale.device == x.device or (scale.dim() == 0 and scale.device.type == "cpu")
    real = dense(scale) and not scale.is_complex()
    return real and usable_device and scale.numel() == 1 and scale.dim() <= 2


# ---- open_clip ----------------------------------------------------------------------------------


class _ClipLoss(Swap):
    family = "losses"
    required = ("world_size", "local_loss", "gather_with_grad", "get_logits")
    description = (
        "computes both directions in one sweep; a call with unequal batches or with logit_bias "
        "runs the original forward"
    )
    benefit = (
        "no B x B matrix of logits, forward or backward, and by count 8 B^2 D FLOPs instead of 12, "
        "as both directions share their products; no benefit with small batches, where the matrix "
        "is cheap"
    )

    @staticmethod
    def why_not(module: Any) -> str | None:
        if module.world_size > 1:
            return f"world_size is {module.world_size}: {_OTHER_SCALE}"
        return None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        fits = _ClipLoss.why_not(self) is None and logit_bias is None
        fits = fits and _are_embeddings(image_features, text_features)
        fits = fits and image_features.shape == text_features.shape
        fits = fits and _is_one_number(logit_scale, image_features)
        dtype = _clip_dtype(image_features, logit_scale) if fits else None
        if dtype is None:
            return super().forward(
                image_features, text_features, logit_scale, logit_bias, output_dict
            )
        loss = scaled_info_nce(image_features, text_features, logit_scale, symmetric=True).to(dtype)
        return {"contrastive_loss": loss} if output_dict else loss


def _clip_dtype(features: Tensor, scale: float | Tensor) -> torch.dtype | None:
    """Return the dtype of ClipLoss's result, or None if ClipLoss raises for these dtypes.

    Without autocast, the dtype is that of (scale * features) @ features.T. Autocast computes the
    cross-entropy in float32.
    """
    scaled = features.dtype
    if isinstance(scale, Tensor) and scale.dim() > 0:
        scaled = torch.promote_types(features.dtype, scale.dtype)
    autocast = autocast_dtype(features.device.type) is not None
    if scaled != features.dtype and (not autocast or torch.float64 in (scaled, features.dtype)):
        return None
    return torch.float32 if autocast and scaled != torch.float64 else scaled


# ---- sentence-transformers ----------------------------------------------------------------------


def _similarity_name(function: object) -> str | None:
    """Return the name of ``function`` if it is one of SIMILARITIES, else None.

    The module is read from the globals, because a wrapper may copy the ``__module__`` of the
    function that it wraps.
    """
    if type(function) is not FunctionType:
        return None
    name, module = function.__name__, function.__globals__.get("__name__")
    return name if module == _SIMILARITY and name in SIMILARITIES else None


def _name_of(function: object) -> str:
    if type(function) is not FunctionType:
        return f"a {path_of(type(function))}"
    path = path_of(function)
    same_path = path in [f"{_SIMILARITY}.{name}" for name in SIMILARITIES]
    return f"another function with the name {path}" if same_path else path


def _not_in_one_sweep(module: Any) -> str | None:
    directions, mode = module.directions, module.partition_mode
    if not isinstance(directions, tuple | list | set | frozenset):
        return f"directions is a {type(directions).__name__}: the sweep takes a tuple."
    both = set(directions) == {"query_to_doc", "doc_to_query"} and mode == "per_direction"
    if set(directions) != {"query_to_doc"} and not both:
        supported = "the sweep supports query_to_doc, or both per direction"
        return f"directions are {directions}, {mode}: {supported}."
    if module.hardness_mode is not None and module.hardness_strength > 0:
        return (
            f"hardness_mode is {module.hardness_mode!r}: the sweep gives all negatives the same "
            "weight."
        )
    if module.gather_across_devices and dist.is_available() and dist.is_initialized():
        return f"gather_across_devices: {_OTHER_SCALE}"
    if _similarity_name(module.similarity_fct) is None:
        name = _name_of(module.similarity_fct)
        return f"similarity_fct is {name}: the sweep supports {' and '.join(SIMILARITIES)}."
    return None


def _ranking_loss(module: Any, columns: list[Tensor]) -> Tensor | None:
    """Return the loss of ``columns``, or None if the original must run.

    The columns are queries, positives and hard negatives. The softmax of a query is over the
    documents of all columns. In the direction from documents to queries, the softmax of a positive
    is over the queries, and hard negatives have no term.
    """
    fits = len(columns) > 1 and _are_embeddings(*columns)
    fits = fits and all(x.shape == columns[0].shape for x in columns)
    if not fits or not _is_one_number(module.scale, columns[0]):
        return None
    query, documents = columns[0], torch.cat(tuple(columns[1:]))
    product, loss = _ranking_dtypes(module, query, documents)
    if _similarity_name(module.similarity_fct) == "cos_sim":
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, documents = unit_rows(query.to(dtype)), unit_rows(documents.to(dtype))
    dtype = torch.promote_types(product, loss)
    query, documents = query.to(dtype), documents.to(dtype)
    symmetric = "doc_to_query" in module.directions
    return scaled_info_nce(query, documents, module.scale, symmetric=symmetric).to(loss)


def _ranking_dtypes(
    module: Any,
    query: Tensor,
    documents: Tensor,
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the original's products and of its loss.

    In float32 or float64, without autocast or promotion by the scale, both are the inputs' dtype.
    Otherwise the original's operations are run on one row to find the dtypes.
    """
    full_precision = query.dtype in (torch.float32, torch.float64)
    promotes = isinstance(module.scale, Tensor) and module.scale.dim() > 0
    if full_precision and not promotes and autocast_dtype(query.device.type) is None:
        return query.dtype, query.dtype
    with torch.no_grad():
        product = module.similarity_fct(query[:1], documents[:1])
        logits = product * module.scale
        return product.dtype, (logits[:, 0] - logits.logsumexp(1)).dtype


def _flops(module: Any) -> str:
    if "doc_to_query" in module.directions:
        return "and by count 8 B C D FLOPs instead of 12 for pairs"
    return "but backward recomputes the logits: by count 8 B C D FLOPs instead of 6"


_RANKING_ATTRIBUTES = (
    "model",
    "scale",
    "similarity_fct",
    "gather_across_devices",
    "directions",
    "partition_mode",
    "hardness_mode",
    "hardness_strength",
)


# For type checkers only: a base class with the methods of the original.
if TYPE_CHECKING:

    class _RankingLoss(Swap):
        mini_batch_size: int

        def compute_loss_from_embeddings(
            self, embeddings: list[Tensor], labels: Tensor
        ) -> Tensor: ...

        def calculate_loss(
            self,
            reps: Any,
            labels: Any = None,
            *,
            with_backward: bool = False,
        ) -> Tensor: ...

else:
    _RankingLoss = Swap


class _MultipleNegativesRankingLoss(_RankingLoss):
    family = "losses"
    required = (*_RANKING_ATTRIBUTES, "compute_loss_from_embeddings")
    description = (
        "computes one sweep over queries and documents; a call with unequal columns runs the "
        "original code"
    )
    owns_children = False

    @staticmethod
    def why_not(module: Any) -> str | None:
        return _not_in_one_sweep(module)

    @classmethod
    def estimate_benefit(cls, module: Any) -> str:
        return (
            f"no B x C matrix of logits, forward or backward, {_flops(module)}; no benefit with "
            "small batches, where the matrix is cheap, nor in the encoder"
        )

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        return super().forward(sentence_features, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        swapped = _MultipleNegativesRankingLoss.why_not(self) is None
        loss = _ranking_loss(self, embeddings) if swapped else None
        return super().compute_loss_from_embeddings(embeddings, labels) if loss is None else loss


class _CachedMultipleNegativesRankingLoss(_RankingLoss):
    family = "losses"
    required = (
        *_RANKING_ATTRIBUTES,
        "loss",
        "mini_batch_size",
        "forward_cached",
        "calculate_loss",
    )
    description = (
        "computes one sweep over queries and documents in place of a loop over mini-batches of the "
        "loss; a call with unequal columns runs the original code"
    )
    owns_children = False
    owned_children = ("loss",)  # holds the settings, and is never called
    wrappable_methods = ("calculate_loss",)

    @staticmethod
    def why_not(module: Any) -> str | None:
        size = module.mini_batch_size
        if not isinstance(size, int) or size < 1:
            return f"mini_batch_size is {size!r}: the original takes a number above 0."
        return _not_in_one_sweep(module)

    @staticmethod
    def why_not_here(module: Any, name: str, model: nn.Module) -> str | None:
        if "calculate_loss" not in module.__dict__ or _wrapper(module) is not None:
            return None
        return "The calculate_loss of this module was replaced on the instance."

    @staticmethod
    def rebind(module: Any) -> None:
        # MatryoshkaLoss's wrapper holds a bound method of the previous class.
        wrapper = _wrapper(module)
        if wrapper is not None:
            wrapper.fn = MethodType(type(module).calculate_loss, module)

    @classmethod
    def estimate_benefit(cls, module: Any) -> str:
        size = module.mini_batch_size
        benefit = f"no {size} x C logits for each {size} of B queries"
        if _similarity_name(module.similarity_fct) == "cos_sim":
            benefit += f", documents normalised once, not B / {size} times"
        return (
            f"{benefit}, {_flops(module)}; no benefit with small batches, nor in the encoder, "
            "which runs twice as before"
        )

    def calculate_loss(
        self,
        reps: Any,
        labels: Any = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        swapped = _CachedMultipleNegativesRankingLoss.why_not(self) is None
        loss = _ranking_loss(self, [torch.cat(column) for column in reps]) if swapped else None
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


def _wrapper(module: nn.Module) -> Any:
    """Return MatryoshkaLoss's wrapper around ``calculate_loss`` of ``module``, or None.

    Return None, too, if the wrapped function is not the ``calculate_loss`` of the module's class.
    """
    wrapper: Any = None
    inner: Any = module.__dict__.get("calculate_loss")
    while path_of(type(inner)) == _WRAPPER:
        wrapper, inner = inner, inner.fn
    if type(inner) is not MethodType or inner.__self__ is not module:
        return None
    classes: tuple[Any, ...] = (own_class(module), _CachedMultipleNegativesRankingLoss)
    return wrapper if inner.__func__ in [cls.calculate_loss for cls in classes] else None


_RANKING_LOSSES = (
    "multiple_negatives_ranking.MultipleNegativesRankingLoss",
    "multiple_negatives_symmetric_ranking.MultipleNegativesSymmetricRankingLoss",
)
_CACHED_LOSSES = (
    "cached_multiple_negatives_ranking.CachedMultipleNegativesRankingLoss",
    "cached_multiple_negatives_symmetric_ranking.CachedMultipleNegativesSymmetricRankingLoss",
)
KINDS["open_clip.loss.ClipLoss"] = _ClipLoss
KINDS |= {f"{_LOSSES}.{name}": _MultipleNegativesRankingLoss for name in _RANKING_LOSSES}
KINDS |= {f"{_LOSSES}.{name}": _CachedMultipleNegativesRankingLoss for name in _CACHED_LOSSES}


# ---- known classes that are left ----------------------------------------------------------------

_GUIDED = "A guide model's similarities decide which pairs count: there is no op for that yet"
_NOT_SOFTMAX = "not a softmax over all pairs: there is no op for that"
_OLD = "Its class is from sentence-transformers before 6, which has a different structure"
_PAIRS = "A cross-encoder scores each pair in a separate pass: there is no matrix of products"
_TOKENS = (
    "Its scores are sums over tokens of their best match, not products: there is no op for that"
)
_RANKING_LOSS = "multiple_negatives_ranking.{}MultipleNegativesRankingLoss"
_REASONS = {
    "open_clip.loss": {
        "SigLipLoss": "A sigmoid for each pair, not a softmax: there is no fused op for it yet; "
        "mmfused.losses.sigmoid_contrastive computes it in blocks of rows",
        "CoCaLoss": "It runs ClipLoss's forward inside its own, with a caption loss: use a "
        "separate ClipLoss and nn.CrossEntropyLoss",
        "DistillClipLoss": "It compares the logits of student and teacher: the sweep keeps neither",
    },
    _LOSSES: {
        "gist_embed.GISTEmbedLoss": _GUIDED,
        "cached_gist_embed.CachedGISTEmbedLoss": _GUIDED,
        "mega_batch_margin.MegaBatchMarginLoss": f"A margin to one negative, {_NOT_SOFTMAX}",
        "global_orthogonal_regularization.GlobalOrthogonalRegularizationLoss": (
            f"Moments of the similarities inside a column, {_NOT_SOFTMAX}"
        ),
        "contrastive_tension.ContrastiveTensionLossInBatchNegatives": (
            "Its encoders run inside the forward that holds the loss, which cannot be swapped alone"
        ),
    },
    f"{_TEXT}.sparse_encoder.losses": {
        f"sparse_{_RANKING_LOSS.format('Sparse')}": "Its embeddings are as wide as a vocabulary "
        "and nearly all 0: the sweep is made for dense ones",
    },
    f"{_TEXT}.multi_vector_encoder.losses": {
        _RANKING_LOSS.format("MultiVector"): _TOKENS,
        f"cached_{_RANKING_LOSS.format('CachedMultiVector')}": _TOKENS,
    },
    f"{_TEXT}.cross_encoder.losses": {
        _RANKING_LOSS.format(""): _PAIRS,
        f"cached_{_RANKING_LOSS.format('Cached')}": _PAIRS,
    },
    f"{_TEXT}.losses": {  # each class is in a file of the same name
        f"{name}.{name}": _OLD
        for name in (
            "MultipleNegativesRankingLoss",
            "CachedMultipleNegativesRankingLoss",
            "MultipleNegativesSymmetricRankingLoss",
            "CachedMultipleNegativesSymmetricRankingLoss",
        )
    },
}
LEFT |= {
    f"{module}.{name}": f"{reason}."
    for module, reasons in _REASONS.items()
    for name, reason in reasons.items()
}
