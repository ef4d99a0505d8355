"""Write embeddings to .npz and .parquet files part by part, and read them again."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmfused.json_files import one_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmfused.training.pair_metrics import Pairs

SUFFIXES = (".npz", ".parquet")
VIEWS = ("image", "text", "both")
# Number of names that are written at a time.
NAMES = 4096


class Parts(Protocol):
    """The embeddings of all items, in parts of consecutive items."""

    def __len__(self) -> int:
        """Return the number of parts, at least 1."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """Return a part: tensors whose rows are items, with equal names in all parts."""
        ...

    def column(self, name: str, index: int) -> Tensor:
        """Return one tensor of a part."""
        ...


@dataclass
class Array:
    """An array of an .npz file that is never in memory as a whole."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Iterator[np.ndarray]


# ---- writing -------------------------------------------------------------------------------------


def write_npz(
    path: Path,
    parts: Parts,
    rows: int,
    file_names: Sequence[str],
    skipped: Sequence[str],
    pairs: Mapping[str, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
    model: str | None = None,
) -> None:
    """Write the arrays of all parts, "file_names", "skipped" and the arrays of ``pairs``.

    Equal arguments give equal files.

    Args:
        path: the file.
        parts: the embeddings.
        rows: number of items in all parts.
        file_names: the picture file of each item, "" for none.
        skipped: sentences about skipped rows; the file holds them as one JSON string.
        pairs: further arrays.
        class_names: what the labels stand for, a JSON string too; None writes nothing.
        model: identifies the model; None writes nothing.
    """
    import numpy as np

    arrays = {name: _joined(parts, name, rows) for name in parts[0]}
    arrays["file_names"] = _names(file_names)
    whole = {"skipped": np.array(json.dumps(list(skipped))), **(pairs or {})}
    if class_names is not None:
        whole["class_names"] = np.array(json.dumps(list(class_names)))
    if model is not None:
        whole["model"] = np.array(model)
    for name, array in whole.items():
        arrays[name] = Array(array.dtype, array.shape, iter([array]))
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            # Without a file, the date of a member is always the same.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(array.dtype),
                    "fortran_order": False,
                    "shape": array.shape,
                }
                np.lib.format.write_array_header_1_0(member, header)
                for piece in array.pieces:
                    member.write(piece.astype(array.dtype, copy=False).tobytes())


def _joined(parts: Parts, name: str, rows: int) -> Array:
    first = parts.column(name, 0).numpy()
    pieces = (parts.column(name, index).numpy() for index in range(len(parts)))
    return Array(first.dtype, (rows, *first.shape[1:]), pieces)


def _names(names: Sequence[str]) -> Array:
    import numpy as np

    width = max(1, max((len(names[i]) for i in range(len(names))), default=1))
    pieces = (np.array(some) for some in _in_turn(names))
    return Array(np.dtype(f"U{width}"), (len(names),), pieces)


def _in_turn(names: Sequence[str]) -> Iterator[list[str]]:
    for first in range(0, len(names), NAMES):
        yield [names[i] for i in range(first, min(first + NAMES, len(names)))]


def write_parquet(
    path: Path,
    parts: Parts,
    file_names: Sequence[str],
    skipped: Sequence[str],
    class_names: Sequence[str] | None = None,
    model: str | None = None,
) -> None:
    """Write a row per item and a row group per part.

    The columns are "file_name", "label", "has_image", "has_text", and for each view a list of
    float32 of fixed size. The schema's metadata has "skipped" and, unless they are None,
    "class_names" as JSON and "model".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    views = [name for name, x in parts[0].items() if x.ndim == 2]
    metadata = {"skipped": json.dumps(list(skipped))}
    if class_names is not None:
        metadata["class_names"] = json.dumps(list(class_names))
    if model is not None:
        metadata["model"] = model
    schema = pa.schema(
        [
            ("file_name", pa.string()),
            ("label", pa.int64()),
            ("has_image", pa.bool_()),
            ("has_text", pa.bool_()),
            *((view, pa.list_(pa.float32(), parts[0][view].shape[1])) for view in views),
        ],
        metadata=metadata,
    )
    with pq.ParquetWriter(path, schema) as writer:
        first = 0
        for index in range(len(parts)):
            part = parts[index]
            last = first + len(part["labels"])
            columns = [pa.array([file_names[i] for i in range(first, last)], pa.string())]
            columns += [pa.array(part[x].numpy()) for x in ("labels", "has_image", "has_text")]
            for view in views:
                values = pa.array(part[view].numpy().reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(values, part[view].shape[1]))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            first = last


# ---- reading -------------------------------------------------------------------------------------


@dataclass
class Embeddings:
    """The contents of a file that ``mmfused embed`` wrote.

    ``items`` is as `mmfused.training.retrieval_metrics.embed_items` returns it. Of a pair set, it
    has "embedding" (N, D) instead of views and labels.
    """

    items: dict[str, Tensor]
    skipped: list[str]
    pairs: Pairs | None = field(default=None)
    class_names: list[str] | None = None  # what the labels stand for; None if they are indices
    model: str | None = None  # identifies the model; None in files of earlier versions

    @property
    def width(self) -> int:
        """Number of features of an embedding."""
        return next(x.shape[1] for x in self.items.values() if x.ndim == 2)


def read_embeddings(path: Path, name: str) -> Embeddings:
    """Return the contents of a file that ``mmfused embed`` wrote.

    Args:
        path: the .npz or .parquet file.
        name: name of the argument, for messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, lacks an array, or has arrays that do not fit together.
    """
    import torch

    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name}: got {path}, expected an .npz or .parquet file")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: got {path}, expected an existing file")
    where = f"{name}: {path}"
    read = _read_npz if path.suffix == ".npz" else _read_parquet
    arrays = read(path, where)
    skipped = _parse_strings("skipped", arrays.pop("skipped"), where)
    model = arrays.pop("model", None)
    names = arrays.pop("class_names", None)
    class_names = None if names is None else _parse_strings("class_names", names, where)
    pairs = _pairs_of(arrays, where) if "embedding" in arrays else None
    items = {key: torch.from_numpy(array) for key, array in arrays.items()}
    _check_items(items, where)
    if class_names is not None and int(items["labels"].max()) >= len(class_names):
        raise ValueError(
            f"{where}: labels: got {int(items['labels'].max())}, expected numbers below "
            f"{len(class_names)}, the number of class_names"
        )
    return Embeddings(items, skipped, pairs, class_names, None if model is None else str(model))


# The kinds of numpy's dtypes and the numbers of dimensions of the arrays.
_COMMON = {"has_image": ("b", 1), "has_text": ("b", 1), "skipped": ("U", 0)}
_PRODUCTS = {"labels": ("i", 1)}
_PAIRS = {
    "queries": ("i", 1),
    "positives_indptr": ("i", 1),
    "positives_indices": ("i", 1),
    "tasks": ("i", 1),
    "candidates": ("i", 1),
    "corpora": ("i", 1),
    "task_names": ("U", 1),
    "corpus_names": ("U", 1),
}
_TYPES = {"i": "int64", "f": "float32"}
_KINDS = {"b": "bools", "i": "integers", "U": "text", "f": "floats"}


def _read_npz(path: Path, where: str) -> dict[str, np.ndarray]:
    import numpy as np

    with _damaged(where, ".npz"), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
        views = [view for view in VIEWS if view in file.files]
        is_pairs = "embedding" in file.files
        expected = {**_COMMON, **(_PAIRS if is_pairs else _PRODUCTS)}
        for view in ["embedding"] if is_pairs else views or ["both"]:
            expected[view] = ("f", 2)
        for key in ("class_names", "model"):
            if key in file.files:
                expected[key] = ("U", 0)
        missing = [key for key in expected if key not in file.files]
        if missing:
            raise ValueError(f"it lacks the arrays {', '.join(missing)}")
        arrays = {key: file[key] for key in expected}
    for key, (kind, ndim) in expected.items():
        array = arrays[key]
        if array.dtype.kind != kind or array.ndim != ndim:
            raise ValueError(
                f"{where}: {key}: got {array.dtype} with {array.ndim} dimensions, expected "
                f"{_KINDS[kind]} with {ndim}"
            )
        if kind in _TYPES:
            arrays[key] = array.astype(_TYPES[kind], copy=False)
    return arrays


def _read_parquet(path: Path, where: str) -> dict[str, np.ndarray]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _damaged(where, ".parquet"), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        views = [view for view in VIEWS if view in schema.names] or ["both"]
        expected = {"label": pa.int64(), "has_image": pa.bool_(), "has_text": pa.bool_()}
        missing = [key for key in (*expected, *views) if key not in schema.names]
        if missing:
            raise ValueError(f"it lacks the columns {', '.join(missing)}")
        for view in views:
            width = getattr(schema.field(view).type, "list_size", "N")
            expected[view] = pa.list_(pa.float32(), width) if width != "N" else None
        arrays: dict[str, np.ndarray] = {}
        for key, kind in expected.items():
            found = schema.field(key).type
            if found != kind:
                raise ValueError(
                    f"column {key}: got {found}, expected {kind or 'a list of fixed size'}"
                )
            column = file.read(columns=[key]).column(0).combine_chunks()
            if column.null_count:
                raise ValueError(f"column {key}: got rows without a value")
            values = column.flatten() if key in views else column
            array = values.to_numpy(zero_copy_only=False)
            arrays[key] = array.reshape(len(column), -1) if key in views else array
        metadata = schema.metadata or {}
    arrays["labels"] = arrays.pop("label")
    arrays["skipped"] = np.array(metadata.get(b"skipped", b"null").decode())
    for key in ("class_names", "model"):
        if key.encode() in metadata:
            arrays[key] = np.array(metadata[key.encode()].decode())
    return {key: np.array(x) for key, x in arrays.items()}


@contextmanager
def _damaged(where: str, suffix: str) -> Iterator[None]:
    """Turn what is raised for a damaged file into one sentence."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{where} is truncated, corrupt or no {suffix} file of mmfused embed: {one_line(error)}"
        ) from error


def _parse_strings(name: str, text: np.ndarray, where: str) -> list[str]:
    try:
        strings = json.loads(str(text))
    except (ValueError, RecursionError):
        strings = None
    if not isinstance(strings, list) or not all(isinstance(x, str) for x in strings):
        raise ValueError(f"{where}: {name}: expected a JSON list of strings")
    return strings


def _pairs_of(arrays: dict[str, np.ndarray], where: str) -> Pairs:
    """Take the arrays of the pairs out of ``arrays``."""
    import torch

    from mmfused.training.pair_metrics import Pairs

    found: dict[str, Any] = {name: arrays.pop(name) for name in _PAIRS}
    for name, array in found.items():
        found[name] = array.tolist() if array.dtype.kind == "U" else torch.from_numpy(array)
    try:
        return Pairs(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_items(items: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless all arrays have equal lengths, and the embeddings are finite."""
    rows = len(items["has_image"])
    if not rows:
        raise ValueError(f"{where} has no items")
    width = next(x.shape[1] for x in items.values() if x.ndim == 2)
    for name, x in items.items():
        if len(x) != rows:
            raise ValueError(f"{where}: {name}: got {len(x)} rows, expected {rows}, as has_image")
        if x.ndim == 2 and (x.shape[1] != width or not width):
            raise ValueError(f"{where}: {name}: got {x.shape[1]} features, expected {width}")
        if x.ndim == 2 and not x.isfinite().all():
            raise ValueError(f"{where}: {name}: got embeddings that are not finite")
