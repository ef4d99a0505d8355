"""``mmfused eval``: measure a trained classifier or retrieval model, or given embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import given_embeddings, model_source
from .data_options import (
    add_catalogue_arguments,
    add_format_arguments,
    add_reading_arguments,
    check_for_pairs,
    parse_columns,
    reading_options,
)
from .embed import holds_pairs
from .tables import print_rows, score_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mmfused.data import Batches
    from mmfused.training.load import Trained

HELP = "measure a trained model on a data set, or the embeddings that mmfused embed wrote"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused eval`` to ``parser``."""
    model_source.add_arguments(parser)
    group = parser.add_argument_group("embeddings: files of mmfused embed, instead of a model")
    group.add_argument(
        "--embeddings",
        metavar="FILE",
        help="embeddings of the queries, which are searched in --products-embeddings or, without "
        "it, in the other queries",
    )
    group.add_argument(
        "--products-embeddings",
        metavar="FILE",
        help="embeddings of the catalogue to search",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="products or pairs: a folder with images and metadata.csv, another data set, or "
        "'generated'",
    )
    add_format_arguments(parser)
    parser.add_argument(
        "--products",
        metavar="DIR",
        help="retrieval models: folder of the catalogue to search (default: that of --data)",
    )
    add_catalogue_arguments(parser)
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="text column of --data, short for --columns text=NAME (default: that of training)",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        help="auto, reference, composed or fused (default: auto)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="number of items per batch; the contrastive part of the loss depends on it",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, ... (default: cuda if available)",
    )
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: torch's)")
    parser.add_argument(
        "--per-class",
        action="store_true",
        help="also print the scores of each class",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write all scores to this JSON file; an existing file is replaced",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and return the exit code."""
    from mmfused.models.fields import check_field
    from mmfused.training.files import write_atomically, write_json

    for name in ("batch_size", "threads"):
        check_field(name, getattr(args, name), int | None)
    out = Path(args.out) if args.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"out: got {out}, expected a file in an existing folder")
    result = given_embeddings.measure(args) if args.embeddings else _measure(args)
    _print_table(result)
    if "pairs" in result:
        _print_pairs(result["pairs"])
    elif "searches" in result:
        _print_searches(result["searches"])
    elif args.per_class:
        _print_classes(result["classes"])
    if out:
        write_atomically(out, lambda path: write_json(path, result))
        print(f"scores written to {out}")
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the contents of the JSON file.

    Raises:
        FileNotFoundError: the checkpoint or the data are missing.
        ValueError: the checkpoint or the data cannot be used, or do not fit together.
    """
    import mmfused
    from mmfused.training.datasets import share_labels

    if args.products_embeddings is not None:
        raise ValueError(
            f"products_embeddings: got {args.products_embeddings!r} without embeddings, expected "
            "both"
        )
    if args.data is None:
        raise ValueError("data: got None without embeddings, expected one of the two")
    trained = model_source.load_model(args)
    retrieves = trained.task == "retrieval"
    if args.products_columns and not args.products:
        raise ValueError("products_columns: got columns without products, expected both")
    if args.products and not retrieves:
        raise ValueError(
            f"products: got {args.products!r} with model {trained.name!r}, "
            "expected a retrieval model"
        )
    data = _load_set(args, trained)
    products = None
    if args.products:
        columns = parse_columns(args.products_columns, "products_columns")
        products = trained.load_set(
            args.products,
            name="products",
            columns=columns,
            stream=args.stream,
            splits=("train",),
            like=data,
        )
    if retrieves and not holds_pairs(data):
        share_labels({"data": data, "products": products})
    batches = trained.batches_of(data, args.batch_size, args.workers)
    if holds_pairs(data):
        check_for_pairs(args)
        return _measure_pairs(args, trained, data, batches)
    product_batches = None
    if products is not None:
        product_batches = trained.batches_of(products, args.batch_size, args.workers)
    with mmfused.backend(args.backend):
        if retrieves:
            scored = _score_retrieval(trained, batches, product_batches)
        else:
            scored = _score_classes(trained, batches, data.class_names)
    items: Any = batches.items
    unknown = [] if products is None else sorted({*data.labels} - {*products.labels})
    return {
        **_facts(args, trained),
        "rows": len(data),
        "without_image": int((~items.present).sum()),
        "without_text": sum(not text for text in data.texts),
        "unknown_labels": unknown,
        "skipped": data.skipped + (products.skipped if products is not None else []),
        "unreadable": [row for one in (data, products) for row in getattr(one, "lost", ())],
        **scored,
    }


def _load_set(args: argparse.Namespace, trained: Trained) -> Any:
    """Return the data to measure; columns and labels are those of training if none are given."""
    training = trained.settings["training"]
    options = reading_options(args)
    text_column = args.text_column or "text"
    if args.columns is None and args.text_column is None:
        options["columns"] = training.get("columns")
        text_column = training.get("text_column", "text")
    if args.labels is None:
        options["labels"] = training.get("labels", "auto")
    num_classes = None if trained.task == "retrieval" else trained.model.config.num_classes
    return trained.load_set(args.data, text_column, num_classes, **options)


def _facts(args: argparse.Namespace, trained: Trained) -> dict[str, Any]:
    return {
        "checkpoint": args.checkpoint,
        "host": args.host,
        "data": args.data,
        "products": args.products,
        "model": trained.name,
        "modalities": getattr(trained.model.config, "modalities", "both"),
        "backend": args.backend,
        "device": str(trained.device),
        "amp": "bf16" if trained.amp else "off",
    }


def _measure_pairs(
    args: argparse.Namespace,
    trained: Trained,
    pairs: Any,
    batches: Batches,
) -> dict[str, Any]:
    """Return the contents of the JSON file for a `PairSet`."""
    import mmfused
    from mmfused.training.pair_metrics import evaluate_pairs

    with mmfused.backend(args.backend):
        scored = evaluate_pairs(trained.model, pairs, batches, trained.amp)
    assert scored is not None
    present = [bool(x) for x in pairs.items.present]
    return {
        **_facts(args, trained),
        "rows": len(present),
        "without_image": present.count(False),
        "without_text": sum(not text for text in pairs.items.texts),
        "skipped": pairs.skipped,
        "unreadable": pairs.lost,
        **scored,
    }


def _score_classes(
    trained: Trained,
    batches: Batches,
    names: Sequence[str] | None,
) -> dict[str, Any]:
    from mmfused.training.metrics import predict, scores

    result = predict(trained.model, batches, trained.amp)
    assert result is not None
    loss, predictions, labels = result
    return {
        "loss": loss,
        **scores(predictions, labels),
        "classes": _class_table(predictions, labels, names),
    }


def _score_retrieval(
    trained: Trained,
    batches: Batches,
    product_batches: Batches | None,
) -> dict[str, Any]:
    from mmfused.training.tasks import evaluate_retrieval

    result = evaluate_retrieval(trained.model, batches, product_batches, trained.amp)
    assert result is not None
    return result


def _class_table(
    predictions: Tensor,
    labels: Tensor,
    names: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Return an entry for each class that occurs in ``predictions`` or ``labels``."""
    from mmfused.training.metrics import class_scores, count

    counts = count(predictions, labels)
    values = class_scores(counts)
    return [
        {
            "label": label,
            "name": names[label] if names else str(label),
            "rows": int(counts.actual[label]),
            "predicted": int(counts.predicted[label]),
            **{name: float(value[label]) for name, value in values.items()},
        }
        for label in (counts.actual + counts.predicted).nonzero().flatten().tolist()
    ]


def _print_table(result: Mapping[str, Any]) -> None:
    has_model = "model" in result
    names = ("data", "products") if has_model else ("embeddings", "products_embeddings")
    data, products = (result[name] for name in names)
    searched = f", searched in {products}" if products else ""
    skipped = len(result["skipped"])
    rows: dict[str, str] = {}
    if has_model:
        source = result["checkpoint"] or result["host"]
        rows["model"] = f"{result['model']}, {result['modalities']}, from {source}"
    rows[names[0]] = f"{data}, {result['rows']} rows, {skipped} skipped{searched}"
    rows["missing"] = (
        f"{result['without_image']} rows without a picture, {result['without_text']} without a text"
    )
    if result.get("unknown_labels"):
        rows["labels"] = f"without a product: {', '.join(map(str, result['unknown_labels']))}"
    if has_model:
        amp = "on" if result["amp"] == "bf16" else "off"
        rows["backend"] = f"{result['backend']} on {result['device']}, bf16 autocast {amp}"
    if "loss" in result:
        rows |= {"loss": f"{result['loss']:.4f}", **score_rows(result)}
    print_rows(rows)


def _print_pairs(pairs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line for each pair of views; "chance" is the expected Recall@1 of a random order."""
    print(
        f"\n{'query->candidate':<16}  queries  no answer  R@1 (chance)     R@5    R@10     MRR"
        "  macro F1"
    )
    for name, pair in pairs.items():
        line = f"{name:<16}  {pair['queries']:>7}  {pair['unanswerable']:>9}"
        if "mrr" in pair:
            chance = f"({pair['chance']['recall_at_1']:.1%})"
            line += f"  {pair['recall_at_1']:>5.1%} {chance:>6}"
            for score in ("recall_at_5", "recall_at_10", "mrr"):
                line += f"  {pair[score]:>6.1%}"
            line += f"  {pair['macro_f1']:>8.1%}"
        print(line)


def _print_searches(searches: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line for each search of a pair set.

    "all@10" is the mean fraction of a query's relevant candidates that are among the first 10.
    """
    width = max(map(len, ("queries->candidates", *searches)))
    print(
        f"\n{'queries->candidates':<{width}}  queries  candidates  no answer  R@1 (chance)     R@5"
        "    R@10  all@10  MRR@10     MRR"
    )
    for name, search in searches.items():
        line = f"{name:<{width}}  {search['queries']:>7}  {search['candidates']:>10}"
        line += f"  {search['unanswerable']:>9}"
        if "mrr" in search:
            chance = f"({search['chance']['recall_at_1']:.1%})"
            line += f"  {search['recall_at_1']:>5.1%} {chance:>6}"
            for score in ("recall_at_5", "recall_at_10", "true_recall_at_10", "mrr_at_10", "mrr"):
                line += f"  {search[score]:>6.1%}"
        print(line)


def _print_classes(classes: Sequence[Mapping[str, Any]]) -> None:
    width = max(len("class"), *(len(entry["name"]) for entry in classes))
    print(f"\n{'class':<{width}}  {'rows':>6}  {'predicted':>9}  precision  recall      F1")
    for entry in classes:
        numbers = f"{entry['precision']:>9.1%}  {entry['recall']:>6.1%}  {entry['f1']:>6.1%}"
        print(f"{entry['name']:<{width}}  {entry['rows']:>6}  {entry['predicted']:>9}  {numbers}")
