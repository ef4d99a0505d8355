"""Batches, gradients and scores of the two tasks: classification (FLUID) and retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mmfused.data import Batches, Collate, PairBatches, PairSet, PairSetBatches
from mmfused.models import MODELS
from mmfused.training.config import TrainConfig
from mmfused.training.gradients import add_cached_gradients, add_gradients
from mmfused.training.metrics import evaluate_classifier, model_inputs
from mmfused.training.pair_metrics import evaluate_pairs
from mmfused.training.ranks import fail_together
from mmfused.training.retrieval_metrics import embed_items, mean_scores, retrieval_scores
from mmfused.training.setup import (
    batch_size_of,
    make_batches,
    make_collate,
    make_reader,
    make_val_batches,
)

Loss: TypeAlias = tuple[Tensor, dict[str, Tensor]]
Items: TypeAlias = dict[str, Any]


class Classification:
    """Batches, gradients and scores of a classifier.

    Args:
        config: the settings.
        tokenizer: the model's tokenizer.
        size: side of the model's input pictures, in pixels.
        model_config: the model's config, which has the mean and standard deviation of pixels.
        train_set: the training set.
        val_set: the validation set.
        products: None; only retrieval models have a catalogue.
        rank: rank of this process.
        world: number of ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        size: int,
        model_config: Any,
        train_set: Any,
        val_set: Any,
        products: None,
        rank: int,
        world: int,
    ) -> None:
        batches = make_batches(
            config, train_set, val_set, tokenizer, size, model_config, rank, world
        )
        self.batches: Any = batches[0]
        self.val_batches: Any = batches[1]

    def gradients(
        self,
        model: Any,
        batches: Iterable[Items],
        count: int,
        amp: bool,
    ) -> Loss:
        """Add the gradient of the mean loss of ``count`` batches; return the loss and its terms."""
        # `fail_together` allows no collective operations; the gradients of a classifier need none.
        with fail_together():
            inputs = (model_inputs(model, batch) for batch in batches)
            return add_gradients(model, inputs, count, amp)

    def map_items(self, batch: Items, function: Callable[[Items], Items]) -> Items:
        """Return the batch after applying ``function`` to its items."""
        return function(batch)

    def evaluate(
        self,
        model: Any,
        amp: bool,
        stopped: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """Return the scores of the validation set, or None if ``stopped()`` becomes true."""
        return evaluate_classifier(model, self.val_batches, amp, stopped)


class _PairTask:
    """Gradients of a retrieval model, whose batches have parts."""

    chunk: int | None  # number of items that are encoded at a time; None encodes all at once

    def gradients(
        self,
        model: Any,
        batches: Iterable[Items],
        count: int,
        amp: bool,
    ) -> Loss:
        """Add the gradient of the mean loss of ``count`` batches; return the loss and its terms."""
        if self.chunk is None:
            return add_gradients(model, batches, count, amp)
        (batch,) = batches
        return add_cached_gradients(model, batch, self.chunk, amp)

    def map_items(self, batch: Items, function: Callable[[Items], Items]) -> Items:
        """Return the batch after applying ``function`` to the items of each part."""
        return {role: function(items) for role, items in batch.items()}


class Retrieval(_PairTask):
    """Batches, gradients and scores of a retrieval model.

    In validation, each item of ``val_set`` is a query. The relevant items are the products with the
    query's label or, if ``products`` is None, the other items of ``val_set`` with this label. The
    arguments are those of :class:`Classification`, except that ``products`` may be a catalogue.

    Raises:
        ValueError: no query has a relevant item.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        size: int,
        model_config: Any,
        train_set: Any,
        val_set: Any,
        products: Any,
        rank: int,
        world: int,
    ) -> None:
        _check_findable(val_set, products)
        self.chunk: int | None = config.grad_cache
        collate = make_collate(
            tokenizer,
            size,
            config.max_length,
            model_config,
            augment=config.strength,
            seed=config.seed,
        )
        self.batches: PairBatches = PairBatches(
            train_set,
            collate,
            batch_size_of(config, len(train_set), world),
            products=products,
            negatives=MODELS[config.model].model.takes_negatives,
            num_negatives=config.num_negatives,
            seed=config.seed,
            rank=rank,
            world=world,
            workers=config.workers,
        )
        plain = make_collate(tokenizer, size, config.max_length, model_config)
        self.val_batches: Any = make_val_batches(val_set, plain, workers=config.workers)
        self.product_batches: Any = None
        if products is not None:
            self.product_batches = make_val_batches(products, plain, workers=config.workers)

    def evaluate(
        self,
        model: Any,
        amp: bool,
        stopped: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """Return the scores of the validation set, or None if ``stopped()`` becomes true."""
        return evaluate_retrieval(model, self.val_batches, self.product_batches, amp, stopped)


class ExplicitPairs(_PairTask):
    """Batches, gradients and scores of a retrieval model with a `PairSet`.

    In validation, each query of ``val_set`` searches all candidates of ``val_set``. The arguments
    are those of :class:`Classification`.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        size: int,
        model_config: Any,
        train_set: PairSet,
        val_set: PairSet,
        products: None,
        rank: int,
        world: int,
    ) -> None:
        self.chunk: int | None = config.grad_cache
        self.val_set: PairSet = val_set
        options = (config.model, tokenizer, size, config.max_length, model_config)
        reader = make_reader(*options, augment=config.strength, seed=config.seed)
        is_complete = not isinstance(reader, Collate)
        for name in ("drop_image", "drop_text"):
            if is_complete and getattr(config, name):
                raise ValueError(
                    f"{name}: got {getattr(config, name)} with pairs and model {config.model!r}, "
                    "expected 0: the sequences are complete"
                )
        self.batches: PairSetBatches = PairSetBatches(
            train_set,
            reader,
            batch_size_of(config, len(train_set), world),
            negatives=_negatives(config),
            num_negatives=config.num_negatives,
            one_task=not config.mix_tasks,
            seed=config.seed,
            rank=rank,
            world=world,
            workers=config.workers,
        )
        self.val_batches: Any = make_val_batches(
            val_set.items, make_reader(*options), workers=config.workers
        )

    def evaluate(
        self,
        model: Any,
        amp: bool,
        stopped: Callable[[], bool],
    ) -> dict[str, Any] | None:
        """Return the scores of the validation set, or None if ``stopped()`` becomes true."""
        return evaluate_pairs(model, self.val_set, self.val_batches, amp, stopped)


def _negatives(config: TrainConfig) -> Literal["given", "drawn", "none"]:
    """Return which hard negatives the model trains with."""
    if not MODELS[config.model].model.takes_negatives:
        return "none"
    return "drawn" if config.model == "moon2" else "given"  # MOON2.0 compares triplets


Task: TypeAlias = "Classification | Retrieval | ExplicitPairs"


def task_of(
    config: TrainConfig,
    train_set: Any,
) -> type[Classification] | type[Retrieval] | type[ExplicitPairs]:
    """Return the class of the task that the model and the training set have."""
    if isinstance(train_set, PairSet):
        return ExplicitPairs
    return Classification if MODELS[config.model].task == "classification" else Retrieval


def _check_findable(val_set: Any, products: Any) -> None:
    """Raise ValueError if no query has a relevant item."""
    counts = Counter(val_set.labels)
    if products is None:
        found = {label for label, count in counts.items() if count > 1}
    else:
        found = counts.keys() & {*products.labels}
    if not found:
        target = "another row" if products is None else "a product"
        raise ValueError(f"val: got no row with {target} of the same label, expected at least one")


def evaluate_retrieval(
    model: Any,
    batches: Batches,
    products: Batches | None,
    amp: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Return the retrieval scores of a model, or None if ``stopped()`` becomes true.

    The scores are means over the pairs of a query view and a candidate view; "pairs" has the scores
    of each pair.

    Args:
        model: a retrieval model.
        batches: batches of queries.
        products: batches of candidates; if None, each query searches the other queries.
        amp: compute under bfloat16 autocast.
        stopped: called before each batch.
    """
    queries = embed_items(model, batches, amp=amp, stopped=stopped)
    if queries is None:
        return None
    candidates = None
    if products is not None:
        candidates = embed_items(model, products, amp=amp, stopped=stopped)
        if candidates is None:
            return None
    pairs = retrieval_scores(queries, candidates, next(model.parameters()).device)
    return {**mean_scores(pairs), "pairs": pairs}


def drop_modalities(
    batch: Items,
    image: float,
    text: float,
    generator: torch.Generator,
    tokenizer: Any,
) -> Items:
    """Return the batch, with the image or the text of random items hidden.

    Items that lack an image or a text are not changed. A hidden image counts as missing, and a
    hidden text is replaced by the empty text, [CLS] [SEP].

    Args:
        batch: a batch from :class:`mmfused.data.Collate`.
        image: probability that the image of an item is hidden.
        text: probability that the text of an item is hidden.
        generator: random generator that selects the items.
        tokenizer: the model's tokenizer.
    """
    draw = torch.rand(len(batch["labels"]), generator=generator)
    has_both = batch["image_present"] & (batch["attention_mask"].sum(1) > 2)
    no_image = has_both & (draw < image)
    no_text = has_both & (draw >= image) & (draw < image + text)
    ids = batch["input_ids"].clone()
    ids[no_text] = tokenizer.pad_token_id
    ids[no_text, 0] = tokenizer.cls_token_id
    ids[no_text, 1] = tokenizer.sep_token_id
    mask = batch["attention_mask"].clone()
    mask[no_text, 2:] = 0
    return {
        **batch,
        "pixel_values": batch["pixel_values"].masked_fill(no_image[:, None, None, None], 0.0),
        "image_present": batch["image_present"] & ~no_image,
        "input_ids": ids,
        "attention_mask": mask,
    }
