"""``mmfused embed``: the items of a folder as embeddings, in one ``.npz``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path

HELP = "embed a folder of products with a trained retrieval model, into one .npz"
PART = re.compile(r"\d{8}\.safetensors|job\.json")
HALF_WRITTEN = re.compile(rf"\.({PART.pattern})\.\d+\.tmp")
OWN = re.compile(rf"{PART.pattern}|{HALF_WRITTEN.pattern}")
logger = logging.getLogger(__name__)


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
        "--out",
        required=True,
        metavar="FILE",
        help="the .npz; a run that was stopped goes on from FILE.parts",
    )
    parser.add_argument(
        "--views", default="image,text,both", help="some of image, text, both (default: all)"
    )
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="column of metadata.csv (default: text)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="items at a time (default: 256)"
    )
    parser.add_argument(
        "--backend", default="auto", help="auto, reference, composed or fused (default: auto)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    import mmfused
    from mmfused.training.load import load_trained
    from mmfused.training.ownership import half_written
    from mmfused.training.run_folder import remove

    out = Path(args.out)
    check(args, out)
    parts = Parts(out.with_name(out.name + ".parts"))
    trained = load_trained(args.checkpoint, args.backend, args.device, args.threads)
    trained.must_retrieve("embed")
    data, batches = trained.batches(args.data, args.batch_size, args.text_column)
    job = {
        "checkpoint": trained.digest,
        "rows": data.digest,
        "batch_size": args.batch_size,
        "views": args.views,
    }
    with parts.locked(job, args.overwrite) as lock:
        check(args, out)  # again: another process may have made it meanwhile
        if lock.was_there:
            for path in half_written(out.parent, (out.name,)):
                remove(path)
        with mmfused.backend(args.backend):
            embed_parts(trained, batches, parts, tuple(args.views.split(",")))
        count = join_parts(parts, out, data, len(batches))
        parts.remove()
    print(f"{count} items embedded, {len(data.skipped)} rows skipped, written to {out}")
    return 0


def check(args: argparse.Namespace, out: Path) -> None:
    from mmfused.models.fields import check_field
    from mmfused.models.retrieval import check_views

    check_field("batch_size", args.batch_size, int)
    check_field("threads", args.threads, int | None)
    check_views(tuple(args.views.split(",")))
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise ValueError(f"out: got {args.out!r}, expected an .npz in a folder that is there")
    if out.is_dir() or (out.exists() and not args.overwrite):
        raise FileExistsError(f"out: {out} is there already; choose another name or overwrite it")


class Parts:
    """The folder of what is done: a file for each batch, and ``job.json``, which tells what they
    are parts of.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    @contextmanager
    def locked(self, job: dict, overwrite: bool):
        """Raises FileExistsError where another process writes to it or it holds other files,
        ValueError for another job's.
        """
        from mmfused.training.ownership import Lock
        from mmfused.training.run_folder import read_json, shown, whole, write_json

        foreign = self.foreign()
        if foreign:
            raise FileExistsError(
                f"out: {self.folder} holds files that mmfused embed did not make ({shown(foreign)}); move them"
            )
        with Lock(self.folder) as lock:
            for path in self.folder.glob("*"):
                if HALF_WRITTEN.fullmatch(path.name) or (overwrite and PART.fullmatch(path.name)):
                    path.unlink()
            source = self.folder / "job.json"
            if source.is_file():
                if read_json(source) != job:
                    held = "parts of another checkpoint, folder or batch size, or of other pictures or texts"
                    raise ValueError(f"out: {self.folder} holds {held}; remove or overwrite them")
            else:
                whole(source, lambda path: write_json(path, job))
            yield lock

    def foreign(self) -> list[str]:
        from mmfused.training.ownership import MARK

        if not os.path.lexists(self.folder):
            return []
        if self.folder.is_symlink() or not self.folder.is_dir():
            return [self.folder.name]
        paths = sorted(self.folder.iterdir())
        marked = MARK in [path.name for path in paths]
        known = [
            path.is_file()
            and not path.is_symlink()
            and (path.name == MARK or OWN.fullmatch(path.name))
            for path in paths
        ]
        return [path.name for path, own in zip(paths, known, strict=True) if not (own and marked)]

    def read(self, index: int) -> dict | None:
        """The arrays of a batch that is done. One that is damaged is said to be so, and counts as
        not done.
        """
        from mmfused.training.run_folder import read_tensors

        if not self.path(index).is_file():
            return None
        try:
            return read_tensors(self.path(index))
        except ValueError as error:
            logger.warning("embed: %s; it is made again", error)
            return None

    def remove(self) -> None:
        from mmfused.training.ownership import MARK

        for path in self.folder.glob("*"):
            if PART.fullmatch(path.name):
                path.unlink()
        (self.folder / MARK).unlink(
            missing_ok=True
        )  # last: without it the rest would be taken for another program's
        try:
            self.folder.rmdir()
        except OSError as error:  # something else was put in meanwhile, or it is gone
            logger.warning("embed: %s is not removed: %s", self.folder, error.strerror)


def embed_parts(trained, batches, parts: Parts, views: tuple[str, ...]) -> None:
    """A file for each batch that has none yet."""
    import safetensors.torch
    import torch
    from tqdm import tqdm

    from mmfused.training.ranking import embed_items
    from mmfused.training.run_folder import whole

    first_row = None  # what parts that are there already are compared with
    for index in tqdm(range(len(batches)), desc="embed", unit="batch"):
        first, last = (
            index * batches.batch_size,
            min((index + 1) * batches.batch_size, len(batches.items)),
        )
        done = parts.read(index)
        if done is not None and first_row is None:
            first_row = embed_items(
                trained.model, [batches.items.batch(torch.arange(1))], views, trained.amp
            )
        if done is None or not fits(done, first_row, last - first):
            embedded = embed_items(
                trained.model, [batches.items.batch(torch.arange(first, last))], views, trained.amp
            )
            data = safetensors.torch.save(
                {name: value.contiguous() for name, value in embedded.items()}
            )
            whole(parts.path(index), lambda draft, data=data: draft.write_bytes(data))


def fits(done: dict, first_row: dict, rows: int) -> bool:
    """Whether a part has what such a part has, of which ``first_row`` is an example: another's may
    bear its name.
    """
    same = done.keys() == first_row.keys() and all(
        done[name].dtype == value.dtype
        and done[name].shape == (rows, *value.shape[1:])
        and done[name].isfinite().all()
        for name, value in first_row.items()
    )
    if not same:
        logger.warning(
            "embed: a part of %d rows does not hold what it should; it is made again", rows
        )
    return same


def join_parts(parts: Parts, out: Path, data, count: int) -> int:
    import numpy as np

    from mmfused.training.run_folder import whole

    loaded = [parts.read(index) for index in range(count)]
    if None in loaded:
        raise RuntimeError(
            f"out: {parts.path(loaded.index(None))} is missing or damaged: removed meanwhile? Run the command again"
        )
    arrays = {name: np.concatenate([part[name].numpy() for part in loaded]) for name in loaded[0]}
    arrays["file_names"] = np.array(getattr(data, "file_names", [""] * len(data)))
    arrays["skipped"] = np.array(json.dumps(data.skipped))
    whole(out, lambda draft: save_npz(draft, arrays))
    return len(arrays["labels"])


def save_npz(path: Path, arrays: dict) -> None:
    import numpy as np

    with open(path, "wb") as file:  # given a name, numpy would put .npz behind it
        np.savez(file, **arrays)
