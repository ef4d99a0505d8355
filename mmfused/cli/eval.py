"""``mmfused eval``: a trained model, of a run or a checkpoint, measured on labelled products: its
classes, or retrieval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .train import print_rows, score_rows

HELP = "measure a trained model on a folder of products, or on the generated validation set"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="folder of a run, or one of its checkpoints",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with images and metadata.csv, or 'generated'",
    )
    parser.add_argument(
        "--products",
        metavar="DIR",
        help="retrieval: what is looked in (default: the data themselves)",
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="of the data's metadata.csv (default: the one trained with)",
    )
    parser.add_argument(
        "--backend", default="auto", help="auto, reference, composed or fused (default: auto)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="samples at a time; the loss's contrastive part depends on it",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--per-class", action="store_true", help="one more table, with a line for each class"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the numbers, each class's too, as JSON; replaces the file",
    )


def run(args: argparse.Namespace) -> int:
    from mmfused.models.fields import check_field
    from mmfused.training.run_folder import whole, write_json

    for name in ("batch_size", "threads"):
        check_field(name, getattr(args, name), int | None)
    out = Path(args.out) if args.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"out: got {out}, expected a file in a folder that is there")
    result = measure(args)
    print_table(result)
    if "pairs" in result:
        print_pairs(result["pairs"])
    elif args.per_class:
        print_classes(result["classes"])
    if out:
        whole(out, lambda path: write_json(path, result))
        print(f"numbers written to {out}")
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Raises ValueError or FileNotFoundError where the checkpoint or the data cannot be used, or do
    not fit together.
    """
    import mmfused
    from mmfused.training.load import load_trained

    trained = load_trained(args.checkpoint, args.backend, args.device, args.threads)
    retrieves = trained.task == "retrieval"
    if args.products and not retrieves:
        raise ValueError(
            f"products: got {args.products!r} with model {trained.name!r}, expected a retrieval model"
        )
    text_column = args.text_column or trained.settings["training"].get("text_column", "text")
    num_classes = None if retrieves else trained.model.config.num_classes
    data, batches = trained.batches(args.data, args.batch_size, text_column, num_classes)
    products, product_batches = (
        trained.batches(args.products, args.batch_size, name="products")
        if args.products
        else (None, None)
    )
    with mmfused.backend(args.backend):
        scored = (
            score_retrieval(trained, batches, product_batches)
            if retrieves
            else score_classes(trained, data, batches)
        )
    return {
        "checkpoint": args.checkpoint,
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
        "unknown_labels": [] if products is None else sorted({*data.labels} - {*products.labels}),
        "skipped": data.skipped + (products.skipped if products is not None else []),
        **scored,
    }


def score_classes(trained, data, batches) -> dict:
    from mmfused.training.metrics import predict, scores

    loss, predictions, labels = predict(trained.model, batches, trained.amp)
    return {
        "loss": loss,
        **scores(predictions, labels),
        "classes": class_table(predictions, labels, data.class_names),
    }


def score_retrieval(trained, batches, product_batches) -> dict:
    from mmfused.training.tasks import evaluate_retrieval

    return evaluate_retrieval(trained.model, batches, product_batches, trained.amp)


def class_table(predictions, labels, names) -> list[dict]:
    """One entry for each class that occurs in predictions or labels."""
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


def print_table(result: dict):
    where = f", looking in {result['products']}" if result["products"] else ""
    unknown = (
        {"labels": f"no product has {', '.join(map(str, result['unknown_labels']))}"}
        if result["unknown_labels"]
        else {}
    )
    scored = {"loss": f"{result['loss']:.4f}", **score_rows(result)} if "loss" in result else {}
    print_rows(
        {
            "model": f"{result['model']}, {result['modalities']}, from {result['checkpoint']}",
            "data": f"{result['data']}, {result['rows']} rows, {len(result['skipped'])} skipped{where}",
            "missing": f"{result['without_image']} rows without a picture, {result['without_text']} without a text",
            **unknown,
            "backend": f"{result['backend']} on {result['device']}, bf16 autocast {'on' if result['amp'] == 'bf16' else 'off'}",
            **scored,
        }
    )


def print_pairs(pairs: dict[str, dict]):
    """A line for each pair of views; what chance gives beside Recall@1."""
    print(
        f"\n{'query->candidate':<16}  queries  no answer  R@1 (chance)     R@5    R@10     MRR  macro F1"
    )
    for name, pair in pairs.items():
        line = f"{name:<16}  {pair['queries']:>7}  {pair['unanswerable']:>9}"
        if "mrr" in pair:
            line += f"  {pair['recall_at_1']:>5.1%} {'(' + format(pair['chance']['recall_at_1'], '.1%') + ')':>6}"
            line += "".join(
                f"  {pair[score]:>6.1%}" for score in ("recall_at_5", "recall_at_10", "mrr")
            )
            line += f"  {pair['macro_f1']:>8.1%}"
        print(line)


def print_classes(classes: list[dict]):
    width = max(len("class"), *(len(entry["name"]) for entry in classes))
    print(f"\n{'class':<{width}}  {'rows':>6}  {'predicted':>9}  precision  recall      F1")
    for entry in classes:
        numbers = f"{entry['precision']:>9.1%}  {entry['recall']:>6.1%}  {entry['f1']:>6.1%}"
        print(f"{entry['name']:<{width}}  {entry['rows']:>6}  {entry['predicted']:>9}  {numbers}")
