"""Base of the four retrieval models: views of an item, parts of a training batch.

An item is a picture, a text, or both. A view of an item shows its picture, its text, or both. The
parts of a batch are `query`, `candidate` and, for models with hard negatives, `negative`. Row i of
`candidate` is the positive of query i. `negative` has n hard negatives for each query, in rows n i
and following; MOON2.0 needs n = 1. A part is a dict of the arguments of `encode`, including
`labels` (B,) int64. Items with the same label are the same product. InfoNCE does not use such items
as negatives of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mmfused.distributed import in_group, reported
from mmfused.losses import unit_rows
from mmfused.models.inputs import check_rows

View = Literal["image", "text", "both"]
VIEWS: tuple[View, ...] = get_args(View)


class RetrievalOutput(NamedTuple):
    """The loss of a batch and its terms.

    Examples:
        >>> import torch
        >>> from mmfused.models import UniECS, UniECSConfig
        >>> model = UniECS(UniECSConfig())
        >>> tokens = {"image_tokens": torch.randn(4, 9, 128), "text_tokens": torch.randn(4, 6, 128)}
        >>> items = {**tokens, "labels": torch.arange(4)}
        >>> output = model(query=items, candidate=items)
        >>> output.loss.shape, sorted(output.losses)[:3]
        (torch.Size([]), ['alignment', 'pdc', 'plc'])
    """

    loss: Tensor  # scalar, the weighted sum
    losses: dict[str, Tensor]  # each term, unweighted


class RetrievalModel(nn.Module):
    """Base of models that compute a loss from the parts of a batch.

    The loss has two steps, `encode` and `compare`, so that GradCache can encode a part in chunks.
    A subclass defines

    * `encode`, which returns what the loss needs of one part: tensors with a row for each item, and
      scalars, which GradCache averages over the chunks;
    * `compare`, which returns the loss of the encoded parts;
    * `embed`, which returns unit embeddings (B, D) of each view.

    On several ranks, the mean of the ranks' gradients is the gradient of one process with the whole
    batch. MOON2's balance loss and UniCA with gather="local" are exceptions. A rank may have no
    rows.

    Examples:
        >>> import torch
        >>> from mmfused.data import Collate, GeneratedProducts, PairBatches, train_tokenizer
        >>> from mmfused.models import RetrievalModel, UniECS, UniECSConfig
        >>> products = GeneratedProducts(size=64, image_size=64)
        >>> tokenizer = train_tokenizer(products.texts)
        >>> model = UniECS(UniECSConfig.preset("tiny", vocab_size=len(tokenizer)))
        >>> collate = Collate(tokenizer, image_size=model.picture_size, max_length=16)
        >>> batches = PairBatches(products, collate, batch_size=4, negatives=model.takes_negatives)
        >>> batch = next(batches.stream())  # a dict of "query" and "candidate"
        >>> model(**batch).loss.backward()
        >>> isinstance(model, RetrievalModel)
        True
    """

    takes_negatives: bool = True  # whether a batch may have hard negatives

    def forward(
        self,
        query: dict[str, Any],
        candidate: dict[str, Any],
        negative: dict[str, Any] | None = None,
    ) -> RetrievalOutput:
        """Return the loss of a batch, whose parts are dicts of the arguments of `encode`."""
        return self.compare(
            query=self.encode_part("query", query),
            candidate=self.encode_part("candidate", candidate),
            negative=None if negative is None else self.encode_part("negative", negative),
        )

    def encode(
        self,
        role: str,
        *,
        labels: Tensor,
        **items: Any,
    ) -> dict[str, Tensor]:
        """Return what the loss needs of the items of one part.

        Args:
            role: the part, "query", "candidate" or "negative".
            labels: (B,) int64, the product of each item.
            items: the pictures and texts, as `embed` takes them.
        """
        raise NotImplementedError

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss of encoded parts.

        Args:
            query: what `encode` returned for the queries.
            candidate: the same for the candidates; row i is the positive of query i.
            negative: the same for hard negatives, as many for each query, or None.
        """
        raise NotImplementedError

    def embed(self, views: Sequence[View] = ("both",), **items: Any) -> dict[str, Tensor]:
        """Return unit embeddings (B, D) of each view, in float32 or float64.

        Args:
            views: the views to embed, of "image", "text" and "both".
            items: the pictures and texts, such as pixel_values (B, 3, S, S) and input_ids (B, T);
                each model lists them.
        """
        raise NotImplementedError

    def encode_part(self, role: str, items: dict[str, Any]) -> dict[str, Tensor]:
        """Encode a part, which may have no items.

        An error on one rank is raised on all ranks, except in a model sharded by FSDP.
        """
        labels = _labels_of(role, items)
        try:
            if len(labels) or not in_group():
                return self.encode(role, **items)
            # A rank without rows must still take part in the exchanges of forward and backward.
            # Encoders do not accept 0 rows: the rank encodes a row of zeros and drops the result.
            encoded = self.encode(role, **self.blank_item(items))
            return {name: x[:0] if x.dim() else 0 * x for name, x in encoded.items()}
        except Exception as error:
            if any(type(parameter).__name__ == "DTensor" for parameter in self.parameters()):
                raise  # the other ranks are waiting inside FSDP, where no error can be sent
            raise reported(type(self).__name__, error, labels) from None

    def split(self, items: dict[str, Any], size: int) -> list[dict[str, Any]]:
        """Return the items of a part in chunks of ``size`` rows of every tensor, for GradCache.

        The last chunk may be smaller. A part without items is one empty chunk.
        """
        starts = range(0, max(len(_labels_of("items", items)), 1), size)
        return [
            {name: None if x is None else x[start : start + size] for name, x in items.items()}
            for start in starts
        ]

    def blank_item(self, items: dict[str, Any]) -> dict[str, Any]:
        """Return one item of zeros, with the arguments of ``items``."""
        return {
            name: None if x is None else x.new_zeros(1, *x.shape[1:]) for name, x in items.items()
        }

    @property
    def longest_text(self) -> int | None:
        """Largest number of tokens of a text; None if the model sets no limit."""
        return None

    @property
    def picture_size(self) -> int:
        """Side of the image encoder's pictures in pixels."""
        encoder: Any = self.image_encoder
        return encoder.patch_embed.img_size[0]

    def set_progress(self, share: float) -> None:
        """Tell a model with a schedule which share of the training is done, from 0 to 1."""


def check_part(
    model: str,
    name: str,
    part: dict[str, Tensor],
    query: Tensor,
    key: str,
) -> None:
    """Require a row for each query; an error is raised on all ranks."""
    try:
        check_rows(name, len(part[key]), len(query))
    except ValueError as error:
        raise reported(model, error, query) from None


def _labels_of(part: str, items: dict[str, Any]) -> Tensor:
    """Return the labels of a part; raise ValueError if there are none."""
    if "labels" not in items:
        raise ValueError(
            f"{part}: got {', '.join(items) or 'nothing'}, expected labels (B,) int64 as well"
        )
    return items["labels"]


def check_views(views: Sequence[str]) -> None:
    """Require one or more of VIEWS, each at most once."""
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views or len(set(views)) < len(views):
        got = ", ".join(map(str, views)) or "none"
        raise ValueError(f"views: got {got}, expected some of {', '.join(VIEWS)}, each once")


def late_fusion(image: Tensor, text: Tensor) -> Tensor:
    """Return the normalised sum of two unit embeddings (B, D), which replaces a learned fusion."""
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
