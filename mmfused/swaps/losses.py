"""The contrastive losses of open_clip and sentence-transformers on :func:`mmfused.masked_info_nce`: no B x C matrix."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..children import dense
from ..ops.masked_info_nce.function import scaled_info_nce
from ..ops.masked_info_nce.modules import unit
from .base import KINDS, Swap, path_of

SIMILARITIES = {f"sentence_transformers.util.similarity.{name}" for name in ("cos_sim", "dot_score")}


def _embeddings(*tensors: Tensor) -> bool:
    """(rows, dim) of one dtype each, neither of them 0, which this op sees as the original does."""
    same = all(x.dim() == 2 and x.is_floating_point() and x.dtype == tensors[0].dtype for x in tensors)
    return dense(*tensors) and same and all(x.numel() > 0 for x in tensors)


def _one_number(scale: float | Tensor) -> bool:
    return isinstance(scale, int | float) or (isinstance(scale, Tensor) and dense(scale) and scale.numel() == 1)


class _ClipLoss(Swap):
    needs = "world_size local_loss gather_with_grad get_logits"
    does = "both directions in one sweep; a call with unequal batches or with logit_bias runs the original forward"

    @staticmethod
    def why_not(module):
        if module.world_size > 1:
            return f"world_size is {module.world_size}: its gradients are scaled otherwise; use MaskedInfoNCE(gather='global')."
        return None

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        fits = _embeddings(image_features, text_features) and image_features.shape == text_features.shape
        if _ClipLoss.why_not(self) or not fits or not _one_number(logit_scale) or logit_bias is not None:
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        loss = scaled_info_nce(image_features, text_features, logit_scale, symmetric=True)
        return {"contrastive_loss": loss} if output_dict else loss


class _MultipleNegativesRankingLoss(Swap):
    needs = (
        "model scale similarity_fct gather_across_devices directions partition_mode hardness_mode hardness_strength "
        "compute_loss_from_embeddings"
    )
    does = "one sweep over queries and documents; a call with unequal columns runs the original code"
    whole = False

    @staticmethod
    def why_not(module):
        both = set(module.directions) == {"query_to_doc", "doc_to_query"} and module.partition_mode == "per_direction"
        if module.directions != ("query_to_doc",) and not both:
            return (
                f"directions are {module.directions}, {module.partition_mode}: the sweep knows query_to_doc, or both per direction."
            )
        if module.hardness_mode is not None and module.hardness_strength > 0:
            return f"hardness_mode is {module.hardness_mode!r}: the sweep weights all negatives alike."
        if module.gather_across_devices and dist.is_available() and dist.is_initialized():
            return "gather_across_devices: its gradients are scaled otherwise; use MaskedInfoNCE(gather='global')."
        if path_of(module.similarity_fct) not in SIMILARITIES:
            return f"similarity_fct is {path_of(module.similarity_fct)}: the sweep knows cos_sim and dot_score."
        return None

    def forward(self, sentence_features, labels):
        return super().forward(sentence_features, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        fits = len(embeddings) > 1 and _embeddings(*embeddings) and all(x.shape == embeddings[0].shape for x in embeddings)
        if _MultipleNegativesRankingLoss.why_not(self) or not fits or not _one_number(self.scale):
            return super().compute_loss_from_embeddings(embeddings, labels)
        query, documents = embeddings[0], torch.cat(embeddings[1:])
        if self.similarity_fct.__name__ == "cos_sim":
            query, documents = unit(query), unit(documents)
        return scaled_info_nce(query, documents, self.scale, symmetric=len(self.directions) == 2)


KINDS |= {
    "open_clip.loss.ClipLoss": _ClipLoss,
    "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking.MultipleNegativesRankingLoss": (
        _MultipleNegativesRankingLoss
    ),
}
