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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmfused.distributed import Ranks, gradient_needed, refuse

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


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least; a row of zeros stays one."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def late_fusion(image: Tensor, text: Tensor) -> Tensor:
    """What stands in a fusion's place: the direction between two unit embeddings (B, D)."""
    return unit(image + text)


def in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.gather(x.contiguous())

    @staticmethod
    def backward(ctx, gradient):
        return ctx.ranks.return_gradient(gradient.contiguous()), None


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order; ranks may have unequally many, or none. The gradient is
    summed over the ranks' uses of a row. All ranks raise where one's rows have another shape or
    dtype, or need a gradient while the others' need none.

    A loss that every rank evaluates on all rows has, averaged over ranks as DDP does, the gradient
    of one process."""
    if not in_group():
        return x
    if x.dim() == 0:
        raise refused(
            "gather_rows", ValueError("gather_rows: x: got a scalar, expected (rows, ...)."), x
        )
    settings = {"a row's shape": tuple(x.shape[1:]), "the rows' gradient": gradient_needed(x)}
    ranks = Ranks("gather_rows", x, x, share_gradients=True, settings=settings)
    return _GatherRows.apply(x, ranks) if x.is_floating_point() else ranks.gather(x)


def refused(op: str, error: Exception, near: Tensor) -> Exception:
    """``error``, to be raised before what this rank would exchange next; there all other ranks
    raise, and quote it.
    """
    if in_group():
        refuse(op, error, near)
    return error


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
