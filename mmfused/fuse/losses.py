"""The contrastive losses of open_clip and sentence-transformers on :func:`mmfused.masked_info_nce`:
no B x C matrix.
"""

from __future__ import annotations

from types import FunctionType, MethodType

import torch
import torch.distributed as dist
from torch import Tensor

from ..children import dense
from ..library import autocast_dtype
from ..losses import unit_rows
from ..ops.masked_info_nce import scaled_info_nce
from .base import KINDS, LEFT, Swap, own_class, path_of

_TEXT = "sentence_transformers"
_LOSSES = f"{_TEXT}.sentence_transformer.losses"
_SIMILARITY, SIMILARITIES = f"{_TEXT}.util.similarity", ("cos_sim", "dot_score")
_WRAPPER = f"{_LOSSES}.matryoshka.CachedLossDecorator"


_OTHERWISE = "its gradients are scaled otherwise; use MaskedInfoNCE(gather='global')."


def _embeddings(*tensors: Tensor) -> bool:
    """(rows, dim) of one dtype and device, neither of them 0, which this op sees as the original
    does."""
    first = tensors[0]
    one_kind = all((x.dtype, x.device) == (first.dtype, first.device) for x in tensors)
    rows = all(x.dim() == 2 and x.is_floating_point() and x.numel() > 0 for x in tensors)
    return dense(*tensors) and one_kind and rows


def _one_number(scale: float | Tensor, x: Tensor) -> bool:
    if not isinstance(scale, Tensor):
        return isinstance(scale, int | float)
    near = scale.device == x.device or (scale.dim() == 0 and scale.device.type == "cpu")
    real = dense(scale) and not scale.is_complex()
    return real and near and scale.numel() == 1 and scale.dim() <= 2


# ---- open_clip ----------------------------------------------------------------------------------


class _ClipLoss(Swap):
    family = "losses"
    needs = "world_size local_loss gather_with_grad get_logits"
    does = "both directions in one sweep; a call with unequal batches or with logit_bias runs the original forward"
    gains = (
        "no B x B matrix of logits, forward or backward, and by count 8 B^2 D FLOPs where the "
        "original takes 12, as both directions share their products; nothing to gain in small "
        "batches, where the matrix is cheap"
    )

    @staticmethod
    def why_not(module):
        if module.world_size > 1:
            return f"world_size is {module.world_size}: {_OTHERWISE}"
        return None

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        logit_bias=None,
        output_dict=False,
    ):
        fits = _ClipLoss.why_not(self) is None and logit_bias is None
        fits = fits and _embeddings(image_features, text_features)
        fits = fits and image_features.shape == text_features.shape
        fits = fits and _one_number(logit_scale, image_features)
        dtype = _clip_dtype(image_features, logit_scale) if fits else None
        if dtype is None:
            return super().forward(
                image_features, text_features, logit_scale, logit_bias, output_dict
            )
        loss = scaled_info_nce(image_features, text_features, logit_scale, symmetric=True).to(dtype)
        return {"contrastive_loss": loss} if output_dict else loss


def _clip_dtype(features: Tensor, scale: float | Tensor) -> torch.dtype | None:
    """What ClipLoss returns: the dtype of (scale * features) @ features.T, whose cross-entropy
    autocast computes in float32; None where that product raises."""
    promotes = isinstance(scale, Tensor) and scale.dim() > 0
    scaled = torch.promote_types(features.dtype, scale.dtype) if promotes else features.dtype
    autocast = autocast_dtype(features.device.type) is not None
    if scaled != features.dtype and (not autocast or torch.float64 in (scaled, features.dtype)):
        return None
    return torch.float32 if autocast and scaled != torch.float64 else scaled


# ---- sentence-transformers ----------------------------------------------------------------------


def _similarity(function: object) -> str | None:
    """Which of SIMILARITIES it is: the very function, not one that wraps it and has its name."""
    if type(function) is not FunctionType:
        return None
    name, module = function.__name__, function.__globals__.get("__name__")
    return name if module == _SIMILARITY and name in SIMILARITIES else None


def _named(function: object) -> str:
    if type(function) is not FunctionType:
        return f"a {path_of(type(function))}"
    path = path_of(function)
    known = path in [f"{_SIMILARITY}.{name}" for name in SIMILARITIES]
    return f"another function with the name {path}" if known else path


def _not_in_one_sweep(module) -> str | None:
    directions, mode = module.directions, module.partition_mode
    if not isinstance(directions, tuple | list | set | frozenset):
        return f"directions is a {type(directions).__name__}: the sweep takes a tuple."
    both = set(directions) == {"query_to_doc", "doc_to_query"} and mode == "per_direction"
    if set(directions) != {"query_to_doc"} and not both:
        knows = "the sweep knows query_to_doc, or both per direction"
        return f"directions are {directions}, {mode}: {knows}."
    if module.hardness_mode is not None and module.hardness_strength > 0:
        return f"hardness_mode is {module.hardness_mode!r}: the sweep weights all negatives alike."
    if module.gather_across_devices and dist.is_available() and dist.is_initialized():
        return f"gather_across_devices: {_OTHERWISE}"
    if _similarity(module.similarity_fct) is None:
        named = _named(module.similarity_fct)
        return f"similarity_fct is {named}: the sweep knows {' and '.join(SIMILARITIES)}."
    return None


def _ranking_loss(module, columns: list[Tensor]) -> Tensor | None:
    """The loss of queries and columns of documents; None where that is not surely the original's.

    Row i sums over the documents of all columns; in the other direction a positive sums over the
    queries, and a hard negative has no sum, which is what a symmetric sweep over C > B candidates
    does too.
    """
    fits = len(columns) > 1 and _embeddings(*columns)
    fits = fits and all(x.shape == columns[0].shape for x in columns)
    if not fits or not _one_number(module.scale, columns[0]):
        return None
    query, documents = columns[0], torch.cat(tuple(columns[1:]))
    product, loss = _ranking_dtypes(module, query, documents)
    if _similarity(module.similarity_fct) == "cos_sim":
        wide = torch.promote_types(query.dtype, torch.float32)
        query, documents = unit_rows(query.to(wide)), unit_rows(documents.to(wide))
    dtype = torch.promote_types(product, loss)
    query, documents = query.to(dtype), documents.to(dtype)
    symmetric = "doc_to_query" in module.directions
    return scaled_info_nce(query, documents, module.scale, symmetric=symmetric).to(loss)


def _ranking_dtypes(module, query: Tensor, documents: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Those of the original's products and of its loss. Both depend on the release, the device and
    autocast, so that but for the plain case one row tells."""
    wide = query.dtype in (torch.float32, torch.float64)
    promotes = isinstance(module.scale, Tensor) and module.scale.dim() > 0
    if wide and not promotes and autocast_dtype(query.device.type) is None:
        return query.dtype, query.dtype
    with torch.no_grad():
        product = module.similarity_fct(query[:1], documents[:1])
        logits = product * module.scale
        return product.dtype, (logits[:, 0] - logits.logsumexp(1)).dtype


def _flops(module) -> str:
    if "doc_to_query" in module.directions:
        return "and by count 8 B C D FLOPs where the original takes 12 for pairs"
    return "as backward forms the logits again: by count 8 B C D FLOPs where the original takes 6"


_SETTINGS = "scale similarity_fct gather_across_devices directions partition_mode hardness_mode"
_RANKING = f"model {_SETTINGS} hardness_strength"


class _MultipleNegativesRankingLoss(Swap):
    family = "losses"
    needs = f"{_RANKING} compute_loss_from_embeddings"
    does = (
        "one sweep over queries and documents; a call with unequal columns runs the original code"
    )
    whole = False

    @staticmethod
    def why_not(module):
        return _not_in_one_sweep(module)

    @classmethod
    def expects(cls, module):
        matrix = f"no B x C matrix of logits, forward or backward, {_flops(module)}"
        return f"{matrix}; nothing to gain in small batches, where it is cheap, nor in the encoder"

    def forward(self, sentence_features, labels):
        return super().forward(sentence_features, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        swapped = _MultipleNegativesRankingLoss.why_not(self) is None
        loss = _ranking_loss(self, embeddings) if swapped else None
        return super().compute_loss_from_embeddings(embeddings, labels) if loss is None else loss


class _CachedMultipleNegativesRankingLoss(Swap):
    family = "losses"
    needs = f"{_RANKING} loss mini_batch_size forward_cached calculate_loss"
    does = (
        "one sweep over queries and documents in place of a loop over mini-batches of the loss; "
        "a call with unequal columns runs the original code"
    )
    whole = False
    parts = ("loss",)  # holds the settings, and is never called
    rewraps = ("calculate_loss",)

    @staticmethod
    def why_not(module):
        size = module.mini_batch_size
        if not isinstance(size, int) or size < 1:
            return f"mini_batch_size is {size!r}: the original takes a number above 0."
        return _not_in_one_sweep(module)

    @staticmethod
    def misplaced(module, name, model):
        if "calculate_loss" not in module.__dict__ or _wrapper(module) is not None:
            return None
        return "The calculate_loss of this module was replaced on the instance."

    @staticmethod
    def rewrap(module):
        """MatryoshkaLoss has wrapped the method as it was bound when that was made."""
        wrapper = _wrapper(module)
        if wrapper is not None:
            wrapper.fn = MethodType(type(module).calculate_loss, module)

    @classmethod
    def expects(cls, module):
        size, gains = module.mini_batch_size, "no {0} x C logits for each {0} of B queries"
        if _similarity(module.similarity_fct) == "cos_sim":
            gains += ", documents normalised once, not B / {0} times"
        gains = f"{gains.format(size)}, {_flops(module)}"
        nothing = "nothing to gain in small batches, nor in the encoder, which runs twice as before"
        return f"{gains}; {nothing}"

    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        swapped = _CachedMultipleNegativesRankingLoss.why_not(self) is None
        loss = _ranking_loss(self, [torch.cat(column) for column in reps]) if swapped else None
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


def _wrapper(module) -> object | None:
    """MatryoshkaLoss's wrapper of the bound ``calculate_loss`` of the class; None where there is
    none, or another thing is wrapped."""
    wrapper, inner = None, module.__dict__.get("calculate_loss")
    while path_of(type(inner)) == _WRAPPER:
        wrapper, inner = inner, inner.fn
    if type(inner) is not MethodType or inner.__self__ is not module:
        return None
    known = (own_class(module), _CachedMultipleNegativesRankingLoss)
    return wrapper if inner.__func__ in [cls.calculate_loss for cls in known] else None


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


# ---- known, and left ---------------------------------------------------------------------------

_GUIDED = "A guide model's similarities decide which pairs count: the op for that is to come"
_NOT_SOFTMAX = "not a softmax over all pairs: no op here"
_OLD = "It is of a sentence-transformers before 6, whose structure is another"
_PAIRS = "A cross-encoder scores each pair by a pass of its own: there is no matrix of products"
_TOKENS = "Its scores are sums over tokens of their best match, not products: no op here"
_RANKING_LOSS = "multiple_negatives_ranking.{}MultipleNegativesRankingLoss"
_REASONS = {
    "open_clip.loss": {
        "SigLipLoss": "A sigmoid for each pair, not a softmax: its fused op is to come; "
        "mmfused.losses.sigmoid_contrastive computes it in blocks of rows",
        "CoCaLoss": "It runs ClipLoss's forward inside its own, beside a caption loss: use a "
        "ClipLoss and an nn.CrossEntropyLoss apart",
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
    f"{_TEXT}.losses": {  # each class in a file of its own name
        f"{name}.{name}": _OLD
        for name in (
            "MultipleNegativesRankingLoss",
            "CachedMultipleNegativesRankingLoss",
            "MultipleNegativesSymmetricRankingLoss",
            "CachedMultipleNegativesSymmetricRankingLoss",
        )
    },
}
LEFT |= {f"{at}.{name}": f"{why}." for at, names in _REASONS.items() for name, why in names.items()}
