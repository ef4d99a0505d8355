"""``mmfused embed``: write the embeddings of all items of a data set to one file."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import model_source
from .data_options import (
    add_format_arguments,
    add_reading_arguments,
    check_for_pairs,
    reading_options,
)
from .embedding_files import SUFFIXES, VIEWS, write_npz, write_parquet
from .embedding_parts import Embed, Finished, Parts, embed_parts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmfused.data import Batches
    from mmfused.training.load import Trained

HELP = "embed a folder of products with a retrieval model, and write one .npz or .parquet file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused embed`` to ``parser``."""
    model_source.add_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="products or pairs: a folder with images and metadata.csv, another data set, or "
        "'generated'",
    )
    add_format_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the .npz or .parquet file; a stopped command resumes from FILE.parts if it is "
        "repeated",
    )
    parser.add_argument(
        "--views",
        help="one or more of image, text and both, separated by commas (default: all); items of "
        "pairs are embedded as they are",
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="text column, short for --columns text=NAME (default: text)",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=256,
        metavar="N",
        help="number of items per batch (default: 256)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help="auto, reference, composed or fused (default: auto)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, ... (default: cuda if available)",
    )
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: torch's)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    """Embed the items, write the file and return the exit code."""
    import mmfused
    from mmfused.training.datasets import rows_digest
    from mmfused.training.files import remove
    from mmfused.training.folder_lock import half_written

    out = Path(args.out)
    _check(args, out)
    parts = Parts(out.with_name(out.name + ".parts"))
    trained = model_source.load_model(args)
    trained.check_is_retrieval_model("embed")
    options = reading_options(args)
    if args.columns is None and args.text_column is None:
        options["columns"] = trained.settings["training"].get("columns")
    data, batches = trained.batches(
        args.data,
        args.batch_size,
        args.text_column or "text",
        workers=args.workers,
        needs_label=False,
        **options,
    )
    embed, views = _embedder(trained, data, args, out)
    job = {
        **trained.identity,
        "rows": rows_digest(data),
        "batch_size": args.batch_size,
        "views": views,
    }
    with parts.locked(job, args.overwrite) as lock:
        # Checked again, because another process may have written the file in the meantime.
        _check(args, out)
        if lock.had_marker:
            for path in half_written(out.parent, (out.name,)):
                remove(path)
        with mmfused.backend(args.backend):
            embed_parts(batches, parts, embed)
        model = hashlib.sha256(json.dumps(trained.identity, sort_keys=True).encode()).hexdigest()
        _join_parts(parts, out, data, batches, model)
        parts.remove()
    count, skipped = len(batches.items), len(data.skipped)
    lost = len(getattr(data, "lost", ()))
    unreadable = f", {lost} pictures unreadable" if lost else ""
    print(f"{count} items embedded, {skipped} rows skipped{unreadable}, written to {out}")
    return 0


def _embedder(
    trained: Trained,
    data: Any,
    args: argparse.Namespace,
    out: Path,
) -> tuple[Embed, str]:
    """Return the function that embeds a batch, and the views that it embeds."""
    if not holds_pairs(data):
        views = args.views or ",".join(VIEWS)
        return _embed_products(trained, tuple(views.split(","))), views
    check_for_pairs(args)
    if args.views is not None:
        raise ValueError(
            f"views: got {args.views!r} with {args.data!r}, which holds pairs, expected None: an "
            "item is embedded as it is"
        )
    if out.suffix != ".npz":
        raise ValueError(
            f"out: got {args.out!r} with {args.data!r}, which holds pairs, expected an .npz file"
        )
    return _embed_pair_items(trained, data), "own"


def holds_pairs(data: Any) -> bool:
    """Return whether a data set is a `PairSet`."""
    return hasattr(data, "positives")


def _embed_products(trained: Trained, views: tuple[str, ...]) -> Embed:
    from mmfused.training import retrieval_metrics

    def embed(batch: dict[str, Tensor], rows: range) -> dict[str, Tensor]:
        embedded = retrieval_metrics.embed_items(trained.model, [batch], views, trained.amp)
        assert embedded is not None
        return embedded

    return embed


def _embed_pair_items(trained: Trained, pairs: Any) -> Embed:
    import torch

    from mmfused.training.pair_metrics import embed_pair_items

    def embed(batch: dict[str, Tensor], rows: range) -> dict[str, Tensor]:
        texts = [bool(pairs.items.texts[row]) for row in rows]
        pictures = torch.tensor([bool(pairs.items.present[row]) for row in rows])
        embedding = embed_pair_items(trained.model, [batch], texts, trained.amp)
        assert embedding is not None
        return {
            "embedding": embedding,
            "has_image": batch.get("image_present", pictures),
            "has_text": torch.tensor(texts),
        }

    return embed


def _check(args: argparse.Namespace, out: Path) -> None:
    from mmfused.models.fields import check_field
    from mmfused.models.retrieval import check_views

    check_field("batch_size", args.batch_size, int)
    check_field("threads", args.threads, int | None)
    if args.views is not None:
        check_views(tuple(args.views.split(",")))
    if out.suffix not in SUFFIXES or not out.parent.is_dir():
        raise ValueError(
            f"out: got {args.out!r}, expected an .npz or .parquet file in an existing folder"
        )
    if out.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  # a missing package is told before anything is embedded
    if out.is_dir() or (out.exists() and not args.overwrite):
        raise FileExistsError(f"out: {out} already exists; choose another name or overwrite it")


def _join_parts(
    parts: Parts,
    out: Path,
    data: Any,
    batches: Batches,
    model: str,
) -> None:
    """Write all parts to one file."""
    from mmfused.training.files import write_atomically

    finished, rows = Finished(parts, len(batches)), len(batches.items)
    if holds_pairs(data):
        names = [next(iter(data.items.files_of(row)), "") for row in range(rows)]
        arrays = _pair_arrays(data)
    else:
        names, arrays = getattr(data, "file_names", [""] * rows), {}

    # The generated sets have the same labels everywhere.
    class_names = data.class_names if hasattr(data, "relabel") else None

    def write(path: Path) -> None:
        if out.suffix == ".npz":
            write_npz(path, finished, rows, names, data.skipped, arrays, class_names, model)
        else:
            write_parquet(path, finished, names, data.skipped, class_names, model)

    write_atomically(out, write)


def _pair_arrays(pairs: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a pair set: those of `Pairs`, and which items they are."""
    import numpy as np

    is_query, is_candidate = np.zeros((2, len(pairs.items)), bool)
    is_query[pairs.queries] = True
    is_candidate[pairs.candidates] = True
    return {
        "is_query": is_query,
        "is_candidate": is_candidate,
        "queries": np.asarray(pairs.queries),
        "positives_indptr": np.asarray(pairs.positives.offsets),
        "positives_indices": np.asarray(pairs.positives.values),
        "tasks": np.asarray(pairs.tasks),
        "candidates": np.asarray(pairs.candidates),
        "corpora": np.asarray(pairs.corpora),
        "task_names": np.array(pairs.task_names),
        "corpus_names": np.array(pairs.corpus_names),
    }
