"""Base of the four retrieval models: views of an item, parts of a training batch, ranks.

An item is a picture, a text, or both. The parts of a batch are `query`, `candidate` (row i is query
i's positive) and, for models that take them, `negative` (row i is a hard negative of query i). A
part is a dict of the arguments of `encode`, with `labels` (B,) int64 among them. Items of one label
are the same product, and are excluded as negatives of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mmfused.distributed import in_group, refused
from mmfused.losses import unit_rows
from mmfused.models.inputs import check_rows

View = Literal["image", "text", "both"]
VIEWS: tuple[View, ...] = get_args(View)


class RetrievalOutput(NamedTuple):
    """The loss of a batch and its terms."""

    loss: Tensor  # scalar, the weighted sum
    losses: dict[str, Tensor]  # each term, unweighted


class RetrievalModel(nn.Module):
    """A model that maps the parts of a batch to a loss, in two steps that GradCache can separate.

    A subclass defines:
        encode: what the loss needs of one part, as tensors with a row for each item, and scalars
            that are means over the items.
        compare: the output, from the encoded parts.
        embed: unit embeddings (B, D) in float32 of each view.

    Over several ranks each rank returns the loss of which the mean over ranks has the gradient of
    one process with the whole batch. A rank may have no rows.
    """

    takes_negatives: bool = True  # whether a batch has hard negatives

    def forward(
        self,
        query: dict[str, Any],
        candidate: dict[str, Any],
        negative: dict[str, Any] | None = None,
    ) -> RetrievalOutput:
        """Encode each part, then compare them; the arguments are those of `encode`."""
        return self.compare(
            query=self.encode_part("query", query),
            candidate=self.encode_part("candidate", candidate),
            negative=None if negative is None else self.encode_part("negative", negative),
        )

    def encode(self, role: str, *, labels: Tensor, **items: Any) -> dict[str, Tensor]:
        """Return what the loss needs of the items of one part."""
        raise NotImplementedError

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss of encoded parts."""
        raise NotImplementedError

    def embed(self, views: Sequence[View] = ("both",), **items: Any) -> dict[str, Tensor]:
        """Return unit embeddings (B, D) of each view, in float32 or float64."""
        raise NotImplementedError

    def encode_part(self, role: str, items: dict[str, Any]) -> dict[str, Tensor]:
        """Encode a part that may have no items; an error on one rank is raised on all ranks."""
        try:
            if len(items["labels"]) or not in_group():
                return self.encode(role, **items)
            # A rank without rows still takes part in exchanges, in backward too. Hosts do not
            # accept 0 rows, so it encodes one row of zeros, which is dropped.
            zeros: dict[str, Any] = {
                name: None if x is None else x.new_zeros(1, *x.shape[1:])
                for name, x in items.items()
            }
            encoded = self.encode(role, **zeros)
            return {name: x[:0] if x.dim() else 0 * x for name, x in encoded.items()}
        except Exception as error:
            if any(type(parameter).__name__ == "DTensor" for parameter in self.parameters()):
                raise  # the other ranks are inside FSDP's exchanges, not at the next one here
            raise refused(type(self).__name__, error, items["labels"]) from None

    @property
    def picture_size(self) -> int:
        """Side of the pictures that the image encoder takes, in pixels."""
        encoder: Any = self.image_encoder
        return encoder.patch_embed.img_size[0]

    def set_progress(self, share: float) -> None:
        """Set the share of training that is done, 0 to 1; for models with a schedule."""


def check_part(model: str, name: str, part: dict[str, Tensor], query: Tensor, key: str) -> None:
    """Require a row for each query; an error is raised on all ranks."""
    try:
        check_rows(name, len(part[key]), len(query))
    except ValueError as error:
        raise refused(model, error, query) from None


def check_views(views: Sequence[str]) -> None:
    """Require some of VIEWS, each once."""
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views or len(set(views)) < len(views):
        got = ", ".join(map(str, views)) or "none"
        raise ValueError(f"views: got {got}, expected some of {', '.join(VIEWS)}, each once")


def late_fusion(image: Tensor, text: Tensor) -> Tensor:
    """Return the direction between two unit embeddings (B, D): the ablation of a fusion."""
    return unit_rows(image + text)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without gradients; restore the mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
