"""One loader for all pictures: as a person sees them, near the size that is asked for, or one sentence that says why not."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile

Image.init()
# Of Pillow's many formats those that photos come in: some others start programs (EPS) or are seldom looked after.
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN
)  # MPO, which cameras write, is among JPEG's
MOST_PIXELS = 100_000_000  # decoded; of a JPEG that is decoded at a smaller size Pillow takes up to 179 million
MOST_BYTES = 2**28
ORIENTATION = 0x0112  # EXIF
TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGE = 2**24  # pixels: of larger ones one at a time, so that threads do not add up
_flag, _large = threading.Lock(), threading.Lock()
_inside, _switch = 0, False  # see `strictly`


class BrokenPicture(ValueError):
    """A picture that cannot be loaded; the message is one sentence without a subject."""


def load_picture(source: str | os.PathLike | bytes, size: int | None = None) -> torch.Tensor:
    """The picture as uint8 (3, H, W) in sRGB's primaries, the right way up.

    ``source``: a file, or its content. With ``size``, its short side is scaled to that (bicubic, with an antialiasing
    filter) and the centre (size, size) kept; a large JPEG is then decoded at a fraction of its size.

    EXIF orientation is applied, transparent parts show white, 16 bits become 8, of several frames or pages the first
    counts, CMYK and the like are converted as Pillow does; colour profiles are not applied. Raises BrokenPicture where
    that gives no picture: another format than JPEG, PNG, WEBP, GIF, BMP, TIFF and AVIF, a damaged or truncated file,
    more than 100 million pixels to decode, or numbers without a defined white (32-bit integers, floats outside 0 to 1).
    """
    with opened(source if isinstance(source, bytes) else read_bytes(source)) as image:
        return load_rgb(image, size)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The picture in ``data``, not yet decoded. What goes wrong within is raised as BrokenPicture."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            yield image
    except BrokenPicture:
        raise
    except Image.UnidentifiedImageError as error:
        raise BrokenPicture(f"cannot be read: it is none of {', '.join(FORMATS)}, or damaged") from error
    except Exception as error:  # a damaged file can raise nearly anything in one decoder or another
        reason = " ".join(str(error or type(error).__name__).split())[:200]
        raise BrokenPicture(f"cannot be read: {reason}") from error


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file; BrokenPicture where it is none, or too large."""
    try:
        # A pipe would be waited for, without O_NONBLOCK.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise BrokenPicture("is no regular file")
            if about.st_size > MOST_BYTES:
                raise BrokenPicture(f"has {about.st_size} bytes, more than {MOST_BYTES}")
            return file.read()
    except FileNotFoundError as error:
        raise BrokenPicture("cannot be read: the file does not exist") from error
    except IsADirectoryError as error:
        raise BrokenPicture("is no regular file") from error
    except (OSError, ValueError) as error:
        raise BrokenPicture(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def load_rgb(image: Image.Image, size: int | None) -> torch.Tensor:
    """:func:`load_picture` of an image that Pillow has opened, and not yet decoded."""
    if size is not None:
        short = min(image.size)
        # At least twice the size, which the filter below needs; Pillow halves at most three times.
        image.draft(image.mode, tuple(2 * size * side // short for side in image.size))
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise BrokenPicture(f"has {width} x {height} pixels, more than {MOST_PIXELS}")
    with _large if width * height > LARGE else nullcontext():
        decode(image)
        turn = TURNS.get(orientation(image))
        image = to_rgb(image)
        if size is not None:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if turn is not None:
        image = image.transpose(turn)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode(image: Image.Image) -> None:
    """As ``image.load()``, which raises where a file is cut short, whatever the program has told Pillow to do then.

    ``ImageFile.LOAD_TRUNCATED_IMAGES``, one switch for all threads, fills what is missing with grey.
    """
    with strictly():
        image.load()


@contextmanager
def strictly() -> Iterator[None]:
    """The first thread in turns the switch off, the last one out sets it as it was."""
    global _inside, _switch
    with _flag:
        if _inside == 0:
            _switch, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _inside += 1
    try:
        yield
    finally:
        with _flag:
            _inside -= 1
            if _inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _switch


def orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data in an undamaged picture: as if there were none, as viewers do
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image).astype(np.uint32)  # in the machine's byte order
        return Image.fromarray(((wide.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise BrokenPicture("holds 32-bit integers, of which none is defined as white")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN too
            raise BrokenPicture("holds floating-point numbers that are not all from 0 to 1")
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def short_side(path: str | os.PathLike) -> int:
    """Of the picture at ``path``, from its header alone. Raises as :func:`load_picture`."""
    with opened(read_bytes(path)) as image:
        return min(image.size)


def inside(root: Path, name: str) -> Path:
    """``root / name``. Raises BrokenPicture where that is not below ``root``, be it by a link."""
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, links in a circle, too long a name
        raise BrokenPicture(f"is no name of a file: {error}") from error
    raise BrokenPicture("leads outside of the folder")
