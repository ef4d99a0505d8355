"""``mmfused embed``: write the embeddings of all items of a folder to one ``.npz`` file."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import model_source

if TYPE_CHECKING:
    from torch import Tensor

    from mmfused.data import Batches
    from mmfused.training.folder_lock import Lock
    from mmfused.training.load import Trained

HELP = "embed a folder of products with a retrieval model, and write one .npz file"
# Names of the files in FILE.parts.
PART = re.compile(r"\d{8}\.safetensors|job\.json")
TEMPORARY = re.compile(rf"\.({PART.pattern})\.\d+\.tmp")
PART_OR_TEMPORARY = re.compile(rf"{PART.pattern}|{TEMPORARY.pattern}")
logger: logging.Logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mmfused embed`` to ``parser``."""
    model_source.add_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with images and metadata.csv, or 'generated'",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the .npz file; a stopped command resumes from FILE.parts if it is repeated",
    )
    parser.add_argument(
        "--views",
        default="image,text,both",
        help="one or more of image, text and both, separated by commas (default: all)",
    )
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="text column of metadata.csv (default: text)",
    )
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
    from mmfused.training.files import remove
    from mmfused.training.folder_lock import half_written

    out = Path(args.out)
    _check(args, out)
    parts = Parts(out.with_name(out.name + ".parts"))
    trained = model_source.load_model(args)
    trained.check_is_retrieval_model("embed")
    data, batches = trained.batches(args.data, args.batch_size, args.text_column)
    job = {
        **trained.identity,
        "rows": data.digest,
        "batch_size": args.batch_size,
        "views": args.views,
    }
    with parts.locked(job, args.overwrite) as lock:
        # Checked again, because another process may have written the file in the meantime.
        _check(args, out)
        if lock.had_marker:
            for path in half_written(out.parent, (out.name,)):
                remove(path)
        with mmfused.backend(args.backend):
            _embed_parts(trained, batches, parts, tuple(args.views.split(",")))
        count = _join_parts(parts, out, data, len(batches))
        parts.remove()
    print(f"{count} items embedded, {len(data.skipped)} rows skipped, written to {out}")
    return 0


def _check(args: argparse.Namespace, out: Path) -> None:
    from mmfused.models.fields import check_field
    from mmfused.models.retrieval import check_views

    check_field("batch_size", args.batch_size, int)
    check_field("threads", args.threads, int | None)
    check_views(tuple(args.views.split(",")))
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise ValueError(f"out: got {args.out!r}, expected an .npz file in an existing folder")
    if out.is_dir() or (out.exists() and not args.overwrite):
        raise FileExistsError(f"out: {out} already exists; choose another name or overwrite it")


class Parts:
    """A folder with one file of embeddings for each finished batch, and ``job.json``.

    ``job.json`` identifies the model, the items, the batch size and the views, so that batches
    of different jobs are never mixed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, index: int) -> Path:
        """Return the path of the file of a batch."""
        return self.folder / f"{index:08d}.safetensors"

    @contextmanager
    def locked(self, job: Mapping[str, Any], overwrite: bool) -> Iterator[Lock]:
        """Create and lock the folder, and write ``job.json`` if it is missing.

        Temporary files are removed. With ``overwrite``, the parts and ``job.json`` are removed too.

        Raises:
            FileExistsError: another process writes to the folder, or the folder holds foreign
                files.
            ValueError: the folder holds the parts of another job.
        """
        from mmfused.training.files import join_names, read_json, write_atomically, write_json
        from mmfused.training.folder_lock import Lock

        foreign = self._foreign_files()
        if foreign:
            raise FileExistsError(
                f"out: {self.folder} holds files that mmfused embed did not make "
                f"({join_names(foreign)}); move them"
            )
        with Lock(self.folder) as lock:
            for path in self.folder.glob("*"):
                if TEMPORARY.fullmatch(path.name) or (overwrite and PART.fullmatch(path.name)):
                    path.unlink()
            source = self.folder / "job.json"
            if not source.is_file():
                write_atomically(source, lambda path: write_json(path, job))
            elif read_json(source) != job:
                raise ValueError(
                    f"out: {self.folder} holds parts made with another checkpoint, host, option, "
                    "batch size or views, or from other pictures or texts; remove or overwrite "
                    "them"
                )
            yield lock

    def _foreign_files(self) -> list[str]:
        """Return the names of the files that ``mmfused embed`` did not make."""
        from mmfused.training.folder_lock import MARKER

        if not os.path.lexists(self.folder):
            return []
        if self.folder.is_symlink() or not self.folder.is_dir():
            return [self.folder.name]
        paths = sorted(self.folder.iterdir())
        marked = MARKER in [path.name for path in paths]

        def is_own(path: Path) -> bool:
            has_own_name = path.name == MARKER or PART_OR_TEMPORARY.fullmatch(path.name)
            return marked and bool(has_own_name) and path.is_file() and not path.is_symlink()

        return [path.name for path in paths if not is_own(path)]

    def read(self, index: int) -> dict[str, Tensor] | None:
        """Return the embeddings of a batch, or None if its file is missing or damaged."""
        from mmfused.training.files import read_tensors

        if not self.path(index).is_file():
            return None
        try:
            return read_tensors(self.path(index))
        except ValueError as error:
            logger.warning("embed: %s; the batch is embedded again", error)
            return None

    def remove(self) -> None:
        """Remove the parts and the marker, and the folder unless it contains other files."""
        from mmfused.training.folder_lock import MARKER

        for path in self.folder.glob("*"):
            if PART.fullmatch(path.name):
                path.unlink()
        # The marker is removed last, because parts without a marker count as foreign files.
        (self.folder / MARKER).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError as error:
            # The folder is not empty, or another process has removed it.
            logger.warning("embed: %s is not removed: %s", self.folder, error.strerror)


def _embed_parts(
    trained: Trained,
    batches: Batches,
    parts: Parts,
    views: tuple[str, ...],
) -> None:
    """Embed each batch that has no intact part yet, and write its part."""
    import torch
    from tqdm import tqdm

    from mmfused.training.files import save_tensors, write_atomically
    from mmfused.training.retrieval_metrics import embed_items

    def embed(first: int, last: int) -> dict[str, Tensor]:
        batch = batches.items.batch(torch.arange(first, last))
        embedded = embed_items(trained.model, [batch], views, trained.amp)
        assert embedded is not None
        return {name: value.contiguous() for name, value in embedded.items()}

    # Embeddings of one item, with which the names, types and shapes in existing parts are compared.
    example: dict[str, Tensor] | None = None
    for index in tqdm(range(len(batches)), desc="embed", unit="batch"):
        first = index * batches.batch_size
        last = min(first + batches.batch_size, len(batches.items))
        part = parts.read(index)
        if part is not None:
            example = embed(0, 1) if example is None else example
            if _is_intact(part, example, last - first):
                continue
        embedded = embed(first, last)
        write_atomically(parts.path(index), lambda path, x=embedded: save_tensors(path, x))


def _is_intact(part: Mapping[str, Tensor], example: Mapping[str, Tensor], rows: int) -> bool:
    """Return whether a part has the tensors of ``example``, ``rows`` rows and finite values."""
    intact = part.keys() == example.keys() and all(
        part[name].dtype == value.dtype
        and part[name].shape == (rows, *value.shape[1:])
        and bool(part[name].isfinite().all())
        for name, value in example.items()
    )
    if not intact:
        logger.warning("embed: a part with %d rows is damaged; the batch is embedded again", rows)
    return intact


def _join_parts(
    parts: Parts,
    out: Path,
    data: Any,
    count: int,
) -> int:
    """Write all parts to one ``.npz`` file, and return the number of items."""
    import numpy as np

    from mmfused.training.files import write_atomically

    loaded: list[dict[str, Tensor]] = []
    for index in range(count):
        part = parts.read(index)
        if part is None:
            raise RuntimeError(
                f"out: {parts.path(index)} is missing or damaged, though it has just been written; "
                "run the command again"
            )
        loaded.append(part)
    arrays = {name: np.concatenate([part[name].numpy() for part in loaded]) for name in loaded[0]}
    arrays["file_names"] = np.array(getattr(data, "file_names", [""] * len(data)))
    arrays["skipped"] = np.array(json.dumps(data.skipped))
    write_atomically(out, lambda path: _save_npz(path, arrays))
    return len(arrays["labels"])


def _save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    import numpy as np

    # Opened here, because numpy would append .npz to the name of a temporary file.
    with open(path, "wb") as file:
        np.savez(file, **arrays)
