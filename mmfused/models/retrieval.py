"""What the four retrieval models share: the views of an item, the parts of a training batch, and
rows of other ranks.

An item is a picture, a text, or both. A batch's parts are items: `query`, `candidate` (row i is
query i's positive) and, for models that take them, `negative` (row i a hard negative of query i).
Parts are dicts of the arguments of `embed`, with `labels` (B,) int64 beside them: items of one
label are one product, and nobody's negatives for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmfused.distributed import in_group, refused
from mmfused.losses import unit_rows

VIEWS = ("image", "text", "both")


class RetrievalOutput(NamedTuple):
    loss: Tensor  # scalar, the weighted sum
    losses: dict[str, Tensor]  # each term, unweighted


class RetrievalModel(nn.Module):
    """Parts of a batch in, a loss out; in between a dict of tensors for each part, whose rows
    GradCache can make in chunks.

    A model has `encode(role, **items)`: what the loss needs of a part, tensors of a row an item,
    and scalars that are means over the items; `compare(query, candidate, negative)`: the output,
    from these; and `embed(views, **items)`: for each view unit embeddings (B, D) in float32. Over
    several ranks each gives the loss such that the mean over ranks has the gradient of one process
    with the whole batch; a rank may have no rows."""

    takes_negatives = True  # whether a batch has hard negatives

    def forward(
        self,
        query: dict,
        candidate: dict,
        negative: dict | None = None,
    ) -> RetrievalOutput:
        parts = {"query": query, "candidate": candidate, "negative": negative}
        encoded = {
            role: None if items is None else self.encode_part(role, items)
            for role, items in parts.items()
        }
        return self.compare(**encoded)

    def encode_part(self, role: str, items: dict) -> dict[str, Tensor]:
        """`encode` of items that may be none. What it refuses on one rank, all ranks refuse."""
        try:
            if len(items["labels"]) or not in_group():
                return self.encode(role, **items)
            # A rank without rows takes part all the same, in backward too: hosts take no 0 rows, so
            # one of zeros that is dropped.
            one = {
                name: None if x is None else x.new_zeros(1, *x.shape[1:])
                for name, x in items.items()
            }
            return {
                name: x[:0] if x.dim() else 0 * x for name, x in self.encode(role, **one).items()
            }
        except Exception as error:
            if any(type(parameter).__name__ == "DTensor" for parameter in self.parameters()):
                raise  # the other ranks are among the exchanges of FSDP, not at the next one here
            raise refused(type(self).__name__, error, items["labels"]) from None

    @property
    def picture_size(self) -> int:
        """Side of the pictures it takes."""
        return self.image_encoder.patch_embed.img_size[0]

    def set_progress(self, share: float) -> None:
        """How much of the training is over, 0 to 1; for models with a schedule."""


def check_views(views: tuple[str, ...]) -> None:
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views or len(set(views)) < len(views):
        raise ValueError(
            f"views: got {', '.join(map(str, views)) or 'none'}, expected some of {', '.join(VIEWS)}, each once"
        )


def late_fusion(image: Tensor, text: Tensor) -> Tensor:
    """What stands in a fusion's place: the direction between two unit embeddings (B, D)."""
    return unit_rows(image + text)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; the mode it was in comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
