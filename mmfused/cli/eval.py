"""``mmfused eval``: measure a trained classifier or retrieval model on labelled products."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import model_source
from .tables import print_rows, score_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mmfused.data import Batches
    from mmfused.training.load import Trained

HELP = "measure a trained model on a folder of products, or on the generated validation set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused eval`` to ``parser``."""
    model_source.add_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with images and metadata.csv, or 'generated'",
    )
    parser.add_argument(
        "--products",
        metavar="DIR",
        help="retrieval models: folder of the catalogue to search (default: that of --data)",
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="text column in the metadata.csv of --data (default: that of training)",
    )
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
    result = _measure(args)
    _print_table(result)
    if "pairs" in result:
        _print_pairs(result["pairs"])
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

    trained = model_source.load_model(args)
    retrieves = trained.task == "retrieval"
    if args.products and not retrieves:
        raise ValueError(
            f"products: got {args.products!r} with model {trained.name!r}, "
            "expected a retrieval model"
        )
    text_column = args.text_column or trained.settings["training"].get("text_column", "text")
    num_classes = None if retrieves else trained.model.config.num_classes
    data, batches = trained.batches(args.data, args.batch_size, text_column, num_classes)
    products, product_batches = None, None
    if args.products:
        products, product_batches = trained.batches(args.products, args.batch_size, name="products")
    with mmfused.backend(args.backend):
        if retrieves:
            scored = _score_retrieval(trained, batches, product_batches)
        else:
            scored = _score_classes(trained, batches, data.class_names)
    unknown = [] if products is None else sorted({*data.labels} - {*products.labels})
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
        "rows": len(data),
        "without_image": int((~batches.items.present).sum()),
        "without_text": sum(not text for text in data.texts),
        "unknown_labels": unknown,
        "skipped": data.skipped + (products.skipped if products is not None else []),
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
    searched = f", searched in {result['products']}" if result["products"] else ""
    skipped = len(result["skipped"])
    amp = "on" if result["amp"] == "bf16" else "off"
    rows = {
        "model": f"{result['model']}, {result['modalities']}, "
        f"from {result['checkpoint'] or result['host']}",
        "data": f"{result['data']}, {result['rows']} rows, {skipped} skipped{searched}",
        "missing": f"{result['without_image']} rows without a picture, "
        f"{result['without_text']} without a text",
    }
    if result["unknown_labels"]:
        rows["labels"] = f"without a product: {', '.join(map(str, result['unknown_labels']))}"
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


def _print_classes(classes: Sequence[Mapping[str, Any]]) -> None:
    width = max(len("class"), *(len(entry["name"]) for entry in classes))
    print(f"\n{'class':<{width}}  {'rows':>6}  {'predicted':>9}  precision  recall      F1")
    for entry in classes:
        numbers = f"{entry['precision']:>9.1%}  {entry['recall']:>6.1%}  {entry['f1']:>6.1%}"
        print(f"{entry['name']:<{width}}  {entry['rows']:>6}  {entry['predicted']:>9}  {numbers}")
