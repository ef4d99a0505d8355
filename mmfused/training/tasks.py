"""What differs between training a classifier (FLUID) and the retrieval models: batches, gradients
and scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from mmfused.data import Batches, PairBatches
from mmfused.models import MODELS
from mmfused.training.gradients import add_cached_gradients, add_gradients
from mmfused.training.metrics import evaluate, model_inputs
from mmfused.training.ranking import embed_items, mean_scores, retrieval_scores
from mmfused.training.ranks import refused_together
from mmfused.training.setup import batch_size_of, make_batches, make_collate, make_val_batches


class Classification:
    """Batches of labelled items; loss and scores of the predicted classes."""

    def __init__(
        self,
        config,
        tokenizer,
        size: int,
        model_config,
        train_set,
        val_set,
        products,
        rank: int,
        world: int,
    ):
        made = make_batches(config, train_set, val_set, tokenizer, size, model_config, rank, world)
        self.batches, self.val_batches = made

    def gradients(self, model, batches, count: int, amp: bool):
        with refused_together():  # nothing is exchanged within
            return add_gradients(
                model, (model_inputs(model, batch) for batch in batches), count, amp
            )

    def hide(self, batch: dict, hidden: Callable[[dict], dict]) -> dict:
        return hidden(batch)

    def evaluate(self, model, amp: bool, stopped) -> dict | None:
        return evaluate(model, self.val_batches, amp, stopped)


class Retrieval:
    """Batches of pairs with hard negatives; scores of every query view against every candidate
    view.

    Validation asks with the items of ``val`` for the product of their label, or without products
    for each other."""

    def __init__(
        self,
        config,
        tokenizer,
        size: int,
        model_config,
        train_set,
        val_set,
        products,
        rank: int,
        world: int,
    ):
        check_answers(val_set, products)
        self.chunk = config.grad_cache
        augment = config.data != "generated" if config.augment is None else config.augment
        collate = make_collate(
            tokenizer, size, config.max_length, model_config, augment=augment, seed=config.seed
        )
        batch_size = batch_size_of(config, len(train_set), world)
        options = {
            "negatives": MODELS[config.model].model.takes_negatives,
            "seed": config.seed,
            "rank": rank,
            "world": world,
        }
        self.batches = PairBatches(train_set, collate, batch_size, products=products, **options)
        plain = make_collate(tokenizer, size, config.max_length, model_config)
        self.val_batches = make_val_batches(val_set, plain)
        self.product_batches = None if products is None else make_val_batches(products, plain)

    def gradients(self, model, batches, count: int, amp: bool):
        if self.chunk is None:
            return add_gradients(model, batches, count, amp)
        (batch,) = batches
        return add_cached_gradients(model, batch, self.chunk, amp)

    def hide(self, batch: dict, hidden: Callable[[dict], dict]) -> dict:
        return {role: hidden(items) for role, items in batch.items()}

    def evaluate(self, model, amp: bool, stopped) -> dict | None:
        return evaluate_retrieval(model, self.val_batches, self.product_batches, amp, stopped)


def check_answers(val_set, products) -> None:
    """Raises ValueError where no item to validate on has anything to find."""
    counts = Counter(val_set.labels)
    found = (
        {label for label, count in counts.items() if count > 1}
        if products is None
        else counts.keys() & {*products.labels}
    )
    if not found:
        where = "another row" if products is None else "a product"
        raise ValueError(f"val: takes rows that have {where} of their label to find; got none")


TASKS = {"classification": Classification, "retrieval": Retrieval}


def evaluate_retrieval(
    model,
    batches: Batches,
    products: Batches | None,
    amp: bool = False,
    stopped=lambda: False,
) -> dict | None:
    """Means over the pairs of views, and ``pairs`` with each one's scores; None as soon as
    ``stopped()``.
    """
    queries = embed_items(model, batches, amp=amp, stopped=stopped)
    candidates = (
        None
        if products is None or queries is None
        else embed_items(model, products, amp=amp, stopped=stopped)
    )
    if queries is None or (products is not None and candidates is None):
        return None
    pairs = retrieval_scores(queries, candidates)
    return {**mean_scores(pairs), "pairs": pairs}
