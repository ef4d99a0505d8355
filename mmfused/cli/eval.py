"""``mmfused eval``: a trained model, from a run folder or one of its checkpoints, measured on labelled products."""

from __future__ import annotations

import argparse
from pathlib import Path

from .train import print_rows, score_rows

HELP = "measure a trained model on a folder of products, or on the generated validation set"


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with images and metadata.csv, or 'generated'")
    parser.add_argument("--backend", default="auto", help="auto, reference, composed or fused (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples at a time; the loss's contrastive part depends on it")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--per-class", action="store_true", help="one more table, with a line for each class")
    parser.add_argument("--out", metavar="FILE", help="write the numbers, each class's too, as JSON; replaces the file")


def run(args: argparse.Namespace) -> int:
    from mmfused.run_folder import whole, write_json

    for name in ("batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, takes a number above 0")
    out = Path(args.out) if args.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"out: got {out}, takes a file in a folder that is there")
    result = measure(args)
    print_table(result)
    if args.per_class:
        print_classes(result["classes"])
    if out:
        whole(out, lambda path: write_json(path, result))
        print(f"numbers written to {out}")
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Raises ValueError or FileNotFoundError where the checkpoint or the data cannot be used, or do not fit together."""
    import torch

    import mmfused
    from mmfused.metrics import predict, scores
    from mmfused.run_folder import load_run, read_settings
    from mmfused.train_setup import (
        VAL_BATCH_SIZE,
        check_backend,
        make_collate,
        make_val_batches,
        pick_device,
        use_amp,
        warn_of_skipped,
    )

    device = pick_device(args.device)
    settings = read_settings(Path(args.checkpoint))
    model, tokenizer = load_run(args.checkpoint)
    amp = use_amp(settings["training"].get("amp", "off"), device)
    check_backend(args.backend, device, torch.bfloat16 if amp else torch.float32)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_products(args.data, model.config.num_classes)
    warn_of_skipped("data", data)
    collate = make_collate(tokenizer, image_size(settings, model.config), settings["training"]["max_length"], model.config)
    batches = make_val_batches(data, collate, args.batch_size or VAL_BATCH_SIZE)
    with mmfused.backend(args.backend):
        loss, predictions, labels = predict(model.to(device), batches, amp)
    return {
        "checkpoint": args.checkpoint,
        "data": args.data,
        "model": settings["training"]["model"],
        "modalities": model.config.modalities,
        "backend": args.backend,
        "device": str(device),
        "amp": "bf16" if amp else "off",
        "rows": len(data),
        "skipped": data.skipped,
        "loss": loss,
        **scores(predictions, labels),
        "classes": class_table(predictions, labels, data.class_names),
    }


def load_products(name: str, num_classes: int):
    """Raises ValueError where a label is none of the model's classes."""
    from mmfused.data import GeneratedProducts, ProductFolder

    data = GeneratedProducts("val") if name == "generated" else ProductFolder(name)
    if max(data.labels) >= num_classes:
        known = f"the labels 0 to {num_classes - 1} of the model"
        raise ValueError(f"data: label {max(data.labels)} is out of range, takes {known}")
    return data


def image_size(settings: dict, config) -> int:
    """Of the pictures the model was trained on; runs from before it was noted have it in the encoder's settings alone."""
    return settings.get("image_size") or (config.image or {}).get("img_size", 32)


def class_table(predictions, labels, names) -> list[dict]:
    """One entry for each class that occurs in predictions or labels."""
    from mmfused.metrics import class_scores, count

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
    print_rows(
        {
            "model": f"{result['model']}, {result['modalities']}, from {result['checkpoint']}",
            "data": f"{result['data']}, {result['rows']} rows, {len(result['skipped'])} skipped",
            "backend": f"{result['backend']} on {result['device']}, bf16 autocast {'on' if result['amp'] == 'bf16' else 'off'}",
            "loss": f"{result['loss']:.4f}",
            **score_rows(result),
        }
    )


def print_classes(classes: list[dict]):
    width = max(len("class"), *(len(entry["name"]) for entry in classes))
    print(f"\n{'class':<{width}}  {'rows':>6}  {'predicted':>9}  precision  recall      F1")
    for entry in classes:
        numbers = f"{entry['precision']:>9.1%}  {entry['recall']:>6.1%}  {entry['f1']:>6.1%}"
        print(f"{entry['name']:<{width}}  {entry['rows']:>6}  {entry['predicted']:>9}  {numbers}")
