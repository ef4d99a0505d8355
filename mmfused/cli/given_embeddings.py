"""Measure the embeddings in files, for ``mmfused eval --embeddings``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .embedding_files import Embeddings, read_embeddings

if TYPE_CHECKING:
    import torch

# The options that go with --embeddings; the others belong to a model and its data.
OPTIONS = ("embeddings", "products_embeddings", "device", "threads", "out")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the contents of the JSON file of ``mmfused eval``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be used, or another option is given.
    """
    import torch

    from mmfused.training.pair_metrics import pair_scores
    from mmfused.training.setup import pick_device

    for name, value in vars(args).items():
        is_default = value is None or value is False or value == "auto"
        if name not in ("command", "run", *OPTIONS) and not is_default:
            raise ValueError(
                f"{name}: got {value!r} with embeddings, expected it only with a model and data"
            )
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    queries = _labelled(read_embeddings(Path(args.embeddings), "embeddings"), "embeddings")
    products = None
    if args.products_embeddings is not None:
        name = "products_embeddings"
        products = _labelled(read_embeddings(Path(args.products_embeddings), name), name)
        _check_products(args, queries, products)
        _share_labels(queries, products)
    if queries.pairs is None:
        scored = _score_products(queries, products, device)
    else:
        scored = pair_scores(queries.items["embedding"], queries.pairs, device)
    items = queries.items
    return {
        "embeddings": args.embeddings,
        "products_embeddings": args.products_embeddings,
        "device": str(device),
        "rows": len(items["has_image"]),
        "without_image": int((~items["has_image"]).sum()),
        "without_text": int((~items["has_text"]).sum()),
        "skipped": queries.skipped + (products.skipped if products is not None else []),
        **scored,
    }


def _labelled(found: Embeddings, name: str) -> Embeddings:
    """Return the items that have a label; those without one have -1, and are not the same product.

    Raises:
        ValueError: there are none.
    """
    if found.pairs is not None:
        return found
    kept = found.items["labels"] >= 0
    lost = int((~kept).sum())
    if not lost:
        return found
    if not kept.any():
        raise ValueError(f"{name}: got only items without a label, expected at least one with one")
    items = {key: x[kept] for key, x in found.items.items()}
    return replace(found, items=items, skipped=[*found.skipped, f"{lost} items have no label"])


def _check_products(
    args: argparse.Namespace,
    queries: Embeddings,
    products: Embeddings,
) -> None:
    """Raise ValueError unless ``queries`` can be searched in ``products``."""
    for name, file in (("embeddings", queries), ("products_embeddings", products)):
        if file.pairs is not None:
            raise ValueError(
                f"{name}: got {getattr(args, name)}, which holds pairs, with two files, expected "
                "products with labels"
            )
    if None not in (queries.model, products.model) and queries.model != products.model:
        raise ValueError(
            f"products_embeddings: got {args.products_embeddings} of another model than "
            f"{args.embeddings}, expected embeddings of the same model"
        )
    if products.width != queries.width:
        raise ValueError(
            f"products_embeddings: got {products.width} features in {args.products_embeddings}, "
            f"expected {queries.width}, as in {args.embeddings}"
        )


def _share_labels(queries: Embeddings, products: Embeddings) -> None:
    """Give equal names of classes equal labels; the names of a file are numbered on their own."""
    import torch

    known, added = products.class_names, queries.class_names
    if known is None and added is None:
        return
    for name, names in (("embeddings", added), ("products_embeddings", known)):
        if names is None:
            raise ValueError(f"{name}: got labels that are numbers, expected names as in the other")
    assert known is not None and added is not None
    index = {name: label for label, name in enumerate(dict.fromkeys([*known, *added]))}
    for file, names in ((products, known), (queries, added)):
        numbers = torch.tensor([index[name] for name in names])
        file.items["labels"] = numbers[file.items["labels"]]


def _score_products(
    queries: Embeddings,
    products: Embeddings | None,
    device: torch.device,
) -> dict[str, Any]:
    from mmfused.training.retrieval_metrics import mean_scores, retrieval_scores

    candidates = None if products is None else products.items
    unknown: list[int] = []
    if candidates is not None:
        known = {*candidates["labels"].tolist()}
        unknown = sorted({*queries.items["labels"].tolist()} - known)
    pairs = retrieval_scores(queries.items, candidates, device)
    return {"unknown_labels": unknown, **mean_scores(pairs), "pairs": pairs}
