"""Read the rows of folders that Hugging Face datasets writes, and of Parquet files."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmfused.json_files import one_line, read_object

from .jsonl import label_in
from .picture_files import ArrowPictures, FilePictures
from .rows import CHUNK_ROWS, BrokenRow, Names, Numbered, Table, arrow, check_found, shown

# Names that begin like this are of one split: "train-00000-of-00004.parquet".
SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?=[-_.])")


def saved_splits(root: Path) -> list[str]:
    """Return the names of the splits of a DatasetDict; [] for a Dataset."""
    if not (root / "dataset_dict.json").is_file():
        return []
    splits = read_object(root / "dataset_dict.json").get("splits")
    return [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []


def parquet_splits(files: Sequence[Path]) -> list[str]:
    """Return the splits that names of files begin with; [] for a single file."""
    matches = [SPLIT.match(path.name) for path in files] if len(files) > 1 else []
    return list(dict.fromkeys(match[1] for match in matches if match))


def read_saved(root: Path, names: Names, split: str) -> Table:
    """Return the rows of a folder that ``datasets.Dataset.save_to_disk`` wrote.

    Args:
        root: the folder, of a Dataset or of a DatasetDict.
        names: the columns to read.
        split: the part of a DatasetDict.

    Raises:
        ValueError: the folder cannot be read, or lacks the split or a column.
    """
    folder = root
    if (root / "dataset_dict.json").is_file():
        splits = saved_splits(root)
        if split not in splits or not (root / split).is_dir():
            raise ValueError(f"split: got {split!r}, expected one of {root}: {splits!r:.200}")
        folder = root / split
    with _errors_named(folder, "a folder of save_to_disk"):
        import datasets

        dataset = datasets.load_from_disk(str(folder))
    return _table_of(dataset, root, folder.name, names)


def read_parquet(root: Path, files: Sequence[Path], names: Names, split: str) -> Table:
    """Return the rows of Parquet files, which datasets copies to its cache as Arrow.

    Args:
        root: the folder of the files; the names of pictures are relative to it.
        files: the files, in order.
        names: the columns to read.
        split: if names of files begin with those of splits, the split to read.

    Raises:
        ValueError: a file cannot be read, or the split or a column is missing.
    """
    found = parquet_splits(files)
    # A single file is read whatever its name, as is a folder whose files name no split.
    if found:
        matches = {path: SPLIT.match(path.name) for path in files}
        files = [path for path, match in matches.items() if match and match[1] == split]
        if not files:
            raise ValueError(f"split: got {split!r}, expected one of {root}: {', '.join(found)}")
    _check_schemas(files)
    with _errors_named(root if len(files) > 1 else files[0], "Parquet files"):
        import datasets

        # From files on this machine, so that nothing is looked up in the network. Their names are
        # patterns to datasets.
        patterns: Any = [glob.escape(os.path.abspath(path)) for path in files]
        dataset = datasets.Dataset.from_parquet(patterns)
    source = root.name if len(files) > 1 else files[0].name
    return _table_of(dataset, root, source, names)


def _check_schemas(files: Sequence[Path]) -> None:
    """Raise ValueError that names the first file that is not Parquet, or has other columns."""
    first: Sequence[str] = ()
    for path in files:
        with _errors_named(path, "a Parquet file"):
            from pyarrow import parquet

            columns = parquet.read_schema(path).names
        first = first or columns
        if sorted(columns) != sorted(first):
            raise ValueError(
                f"{path}: got the columns {shown(columns)}, "
                f"expected those of {files[0].name}: {shown(first)}"
            )


@contextlib.contextmanager
def _errors_named(path: Path, expected: str) -> Iterator[None]:
    """Turn errors of datasets and pyarrow, of many types, into one sentence; no bars, no log."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        message = f"{path} is read by datasets, which is not installed: pip install datasets"
        raise ModuleNotFoundError(message, name=error.name) from error
    bars, log = datasets.utils, datasets.logging
    had_bars, verbosity = not bars.are_progress_bars_disabled(), log.get_verbosity()
    bars.disable_progress_bars()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    except Exception as error:
        cause = "".join(
            letter if letter.isprintable() else "?" for letter in one_line(error.__cause__ or error)
        )
        raise ValueError(
            f"{path}: datasets cannot read it ({cause}), expected {expected}"
        ) from error
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            bars.enable_progress_bars()


def _table_of(dataset: Any, root: Path, source: str, names: Names) -> Table:
    """Return the rows of a ``datasets.Dataset``."""
    pyarrow = arrow()
    found = dataset.column_names
    if names.image == "image" and "image" not in found and "file_name" in found:
        names = names.with_image("file_name")
    check_found(root, found, names)
    present = [name for name in names.all() if name in found]
    # Arrow columns as they are stored: pictures are not decoded, and nothing is copied.
    with _errors_named(root, "rows that can be read"):
        stored = dataset.select_columns(present).with_format("arrow")[:]
        stored.validate(full=True)
    class_names = getattr(dataset.features.get(names.label), "names", None)
    reader = _Columns(root, stored.schema, names, class_names)
    chunks = [reader.read(batch) for batch in stored.to_batches(max_chunksize=CHUNK_ROWS)]
    roles = ["image", "text", "label", *(["coarse_label"] if names.coarse_label in present else [])]
    kind = pyarrow.large_string()
    columns = {
        role: pyarrow.chunked_array([chunk[role] for chunk in chunks], kind) for role in roles
    }
    files = FilePictures(root, columns["image"])
    in_files = not names.image or _is_text(stored.schema.field(names.image).type)
    return Table(
        source,
        pyarrow.table(columns),
        files if in_files else ArrowPictures(stored[names.image], files),
        Numbered(f"{source} row"),
        reader.broken,
        named_labels=True if class_names else None,
        class_names=list(class_names) if class_names else None,
    )


class _Columns:
    """Turns stored columns into strings, a batch of rows at a time.

    Raises:
        ValueError: a column has another type than its role.
    """

    def __init__(
        self, root: Path, schema: Any, names: Names, class_names: Sequence[str] | None
    ) -> None:
        self.broken: dict[int, str] = {}
        self._names, self._class_names = names, class_names
        self._row = 0  # number of the next batch's first row
        checks: list[tuple[str, Callable[[Any], bool], str]] = [
            (names.image, _is_picture, "bytes, names of files, or structs of bytes and path"),
            *((name, _is_text, "strings") for name in names.text),
            (names.label, _is_label, "strings, integers, floats or booleans"),
            (names.coarse_label, _is_label, "strings, integers, floats or booleans"),
        ]
        for name, is_valid, expected in checks:
            if name in schema.names and not is_valid(schema.field(name).type):
                raise ValueError(
                    f"{root}: got column {name} of {str(schema.field(name).type)[:80]}, "
                    f"expected {expected}"
                )

    def read(self, batch: Any) -> dict[str, Any]:
        """Return the columns of the next batch by role."""
        pyarrow = arrow()
        compute = _compute()
        names = self._names
        empty = pyarrow.array([""] * len(batch), pyarrow.large_string())
        texts = [_strings(batch[name]) for name in names.text]
        if len(texts) > 1:
            parts = [compute.if_else(compute.equal(text, ""), None, text) for text in texts]
            space = pyarrow.scalar(" ", pyarrow.large_string())
            texts = [compute.binary_join_element_wise(*parts, space, null_handling="skip")]
        columns = {
            "image": self._pictures_of(batch[names.image]) if names.image else empty,
            "text": texts[0] if texts else empty,
            "label": empty,
        }
        for role, name in (("label", names.label), ("coarse_label", names.coarse_label)):
            if name in batch.schema.names:
                columns[role] = self._labels_of(role, batch[name])
        for role in ("image", "text"):
            for row in compute.indices_nonzero(compute.match_substring(columns[role], "\0")):
                self.broken[self._row + row.as_py()] = "it holds a zero byte"
        self._row += len(batch)
        return columns

    def _pictures_of(self, array: Any) -> Any:
        """Return the names of pictures; one without a name gets its row's number."""
        pyarrow = arrow()
        compute = _compute()
        if _is_text(array.type):
            return _strings(array)
        kind, data = pyarrow.large_string(), array
        paths = pyarrow.nulls(len(array), kind)
        if pyarrow.types.is_struct(array.type):
            data = compute.struct_field(array, "bytes")
            paths = compute.struct_field(array, "path")
        numbers = [f"#{row}" for row in range(self._row, self._row + len(array))]
        unnamed = compute.if_else(data.is_valid(), pyarrow.array(numbers, kind), "")
        paths = _strings(paths)
        return compute.if_else(compute.equal(paths, ""), unnamed, paths)

    def _labels_of(self, role: str, array: Any) -> Any:
        pyarrow = arrow()
        column = self._names.label if role == "label" else self._names.coarse_label
        names = self._class_names if role == "label" else None
        labels = []
        for row, value in enumerate(array.to_pylist(), self._row):
            label = ""
            try:
                if names:
                    label = _name_of(column, value, names)
                elif value is not None or column in self._names.needed:
                    label = label_in({column: value}, column).strip()
            except BrokenRow as error:
                self.broken[row] = str(error)
            labels.append(label)
        return pyarrow.array(labels, pyarrow.large_string())


def _name_of(column: str, value: int | None, names: Sequence[str]) -> str:
    if value is None or not 0 <= value < len(names):
        raise BrokenRow(
            f"{column}: got {'null' if value is None else value}, "
            f"expected an integer from 0 to {len(names) - 1}"
        )
    return names[value]


def _compute() -> Any:
    """Return pyarrow.compute, whose functions type checkers do not see."""
    import pyarrow.compute

    return pyarrow.compute


def _strings(array: Any) -> Any:
    """Return large strings without null and without white space at the ends.

    Strings that have neither stay where they are, which may be a file that is mapped into memory.
    """
    pyarrow = arrow()
    compute = _compute()
    array = compute.fill_null(array.cast(pyarrow.large_string()), "")
    trimmed = compute.utf8_trim_whitespace(array)
    return array if trimmed.equals(array) else trimmed


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    # A column without a value has no other type.
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)


def _is_picture(kind: Any) -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return _is_text(kind) or _is_bytes(kind)
    fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
    if fields.keys() != {"bytes", "path"}:
        return False
    return _is_bytes(fields["bytes"]) and _is_text(fields["path"])


def _is_label(kind: Any) -> bool:
    from pyarrow import types

    return _is_text(kind) or (
        types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    )
