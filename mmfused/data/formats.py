"""Find the format of a data set, whether it holds products or pairs."""

from __future__ import annotations

import os

from .pair_formats import PAIR_FORMATS, detect_pair_format
from .tables import FORMATS, detect_format


def find_format(path: str | os.PathLike[str]) -> str:
    r"""Return the format of a data set, a name in ``FORMATS`` or in ``PAIR_FORMATS``.

    Args:
        path: a folder or a file.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: the format is unknown, or there are files of several formats.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.data import find_format
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "shop.tsv")
        ...     size = path.write_text("file_name\ttext\tlabel\n")
        ...     find_format(path)
        'metadata'
    """
    return detect_pair_format(path) or detect_format(path)


def check_format(name: str) -> None:
    """Raise ValueError unless ``name`` is the name of a format.

    Examples:
        >>> from mmfused.data import check_format
        >>> check_format("parquet")
    """
    names = (*FORMATS, *PAIR_FORMATS)
    if name not in names:
        raise ValueError(f"format: got {name!r:.80}, expected {', '.join(names)}")
