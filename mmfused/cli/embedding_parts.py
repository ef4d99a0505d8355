"""The parts of the embeddings of a data set, one file for each batch, from which they resume."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from mmfused.data import Batches
    from mmfused.training.folder_lock import Lock

# ``embed(batch, rows)`` returns the part of a batch, whose items are ``rows``.
Embed: TypeAlias = "Callable[[dict[str, Tensor], range], dict[str, Tensor]]"

# Names of the files in FILE.parts.
PART = re.compile(r"\d{8}\.safetensors|job\.json")
TEMPORARY = re.compile(rf"\.({PART.pattern})\.\d+\.tmp")
PART_OR_TEMPORARY = re.compile(rf"{PART.pattern}|{TEMPORARY.pattern}")
logger: logging.Logger = logging.getLogger(__name__)


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

    def read(self, index: int, only: str | None = None) -> dict[str, Tensor] | None:
        """Return the embeddings of a batch, or None if its file is missing or damaged.

        Args:
            index: index of the batch.
            only: name of the only tensor to read; None reads all.
        """
        from mmfused.training.files import read_tensors

        if not self.path(index).is_file():
            return None
        try:
            return read_tensors(self.path(index), only)
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


class Finished:
    """The parts of all batches, for reading; see `mmfused.cli.embedding_files.Parts`."""

    def __init__(self, parts: Parts, count: int) -> None:
        self.parts = parts
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._checked(self.parts.read(index), index)

    def column(self, name: str, index: int) -> Tensor:
        """Return one tensor of a part."""
        return self._checked(self.parts.read(index, name), index)[name]

    def _checked(self, part: dict[str, Tensor] | None, index: int) -> dict[str, Tensor]:
        if part is None:
            raise RuntimeError(
                f"out: {self.parts.path(index)} is missing or damaged, though it has just been "
                "written; run the command again"
            )
        return part


def embed_parts(batches: Batches, parts: Parts, embed: Embed) -> None:
    """Embed each batch that has no intact part yet, and write its part."""
    import torch
    from tqdm import tqdm

    from mmfused.data.batches import read_ahead
    from mmfused.training.files import save_tensors, write_atomically

    items, size = batches.items, batches.batch_size

    def rows(index: int) -> range:
        return range(index * size, min((index + 1) * size, len(items)))

    def finish(index: int, started: Any) -> tuple[int, dict[str, Tensor]]:
        return index, items.finish(started)

    missing = _missing_parts(parts, [len(rows(i)) for i in range(len(batches))], items, embed)
    left = sum(len(rows(index)) for index in missing)
    finished = read_ahead(
        missing, lambda index: items.start(torch.tensor(rows(index))), finish, items.ahead
    )
    with tqdm(total=len(items), initial=len(items) - left, desc="embed", unit="item") as bar:
        for index, batch in finished:
            part = {name: x.contiguous() for name, x in embed(batch, rows(index)).items()}
            write_atomically(parts.path(index), lambda path, x=part: save_tensors(path, x))
            bar.update(len(rows(index)))


def _missing_parts(
    parts: Parts,
    sizes: Sequence[int],
    items: Any,
    embed: Embed,
) -> list[int]:
    """Return the indices of the batches, of ``sizes`` rows, that have no intact part."""
    import torch

    # Embeddings of one item, with which the names, types and shapes in existing parts are compared.
    example: dict[str, Tensor] | None = None
    missing: list[int] = []
    for index, size in enumerate(sizes):
        part = parts.read(index)
        if part is not None and example is None:
            example = embed(items.finish(items.start(torch.arange(1))), range(1))
        if part is None or example is None or not _is_intact(part, example, size):
            missing.append(index)
    return missing


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
