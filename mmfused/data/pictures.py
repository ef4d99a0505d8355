"""Load pictures as an image viewer shows them, or raise an error with the reason."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ._common import Resample, Resize, check_choice
from .quiet import quiet

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    AvifImagePlugin = None

# Largest number of pixels to decode: 286 MiB as RGB.
MAX_PIXELS = 100_000_000
# Largest size of a picture file in bytes.
MAX_BYTES = 256 * 2**20
# Pictures with more pixels are decoded by one thread at a time, to limit the memory.
LARGE = 2**24
_large_picture_lock = threading.Lock()

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EXIF and TIFF tags.
ORIENTATION = 0x0112
BITS_PER_SAMPLE = 0x0102
PHOTOMETRIC = 0x0106
WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class BrokenPicture(ValueError):
    """A picture cannot be used; the message gives the reason."""


def load_picture(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    size: int | None = None,
    *,
    resize: Resize = "crop",
    resample: Resample = "bicubic",
) -> torch.Tensor:
    """Return a picture as a (3, H, W) uint8 tensor, as an image viewer would show it.

    The formats are JPEG, PNG, WEBP, GIF, BMP, TIFF, and AVIF if Pillow supports it. The format is
    determined from the contents, not from the file name. EXIF rotation is applied, and unreadable
    EXIF data are ignored. Transparent pixels become white. If a file contains an animation or
    several pictures, the first frame or picture is loaded. 16-bit grey values, and floats from 0 to
    1, are scaled to 8 bits. Other floats and wider integers are rejected, because they do not
    define which value is white. ICC profiles are not applied.

    The limits are 256 MiB per file and 100 million decoded pixels. Pillow's global limit
    ``Image.MAX_IMAGE_PIXELS`` affects only WEBP and some GIF files. Truncated files are rejected,
    even with ``ImageFile.LOAD_TRUNCATED_IMAGES``. With this setting, files that are damaged in the
    middle load as far as Pillow can read them. Pillow's warnings are suppressed, but libtiff may
    write to stderr.

    Args:
        source: a path, the bytes of a file, or an open file.
        size: side of the square to which the picture is resized (antialiased); None keeps the
            picture's size. To save memory, a large JPEG is decoded at a reduced size, with sides of
            at least ``2 * size``.
        resize: "crop" resizes the central square, and "stretch" the whole picture, without keeping
            its shape, like torchvision's ``Resize((size, size))``. "shortest" resizes the shorter
            side to ``size`` and then cuts out the centre, in whole pixels of the result, like
            torchvision's ``Resize(size)`` and ``CenterCrop(size)``: up to half a pixel from "crop".
        resample: the interpolation, "bicubic" or "bilinear".

    Raises:
        ValueError: ``resize`` or ``resample`` is none of these.
        BrokenPicture: the picture cannot be loaded; the message gives the reason. It is a
            ``ValueError``.

    Examples:
        >>> import io
        >>> from PIL import Image
        >>> from mmfused.data import load_picture
        >>> file = io.BytesIO()
        >>> Image.new("RGBA", (40, 30)).save(file, "PNG")  # all pixels are transparent
        >>> picture = load_picture(file.getvalue(), size=16)
        >>> picture.shape, picture.min().item()  # white
        (torch.Size([3, 16, 16]), 255)
        >>> load_picture(b"no picture")
        Traceback (most recent call last):
            ...
        mmfused.data.pictures.BrokenPicture: ...
    """
    check_choice("resize", resize, Resize)
    check_choice("resample", resample, Resample)
    with quiet():
        return decode(read_picture(source), size, resize, resample)


def read_picture(source: str | os.PathLike[str] | bytes | BinaryIO) -> bytes:
    """Return the bytes of a picture file; raise BrokenPicture if it is unreadable or too large."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        data = _read_file(source, MAX_BYTES)
    else:
        try:
            data = source.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise BrokenPicture(_sentence(error)) from error
    if len(data) > MAX_BYTES:
        raise BrokenPicture(f"it has more than {MAX_BYTES} bytes")
    return data


def _read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes, or raise BrokenPicture."""
    try:
        _check_regular(os.stat(path))
        # The file may have been replaced by a pipe, so do not block, and check again.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(status)
            # One byte more tells whether the file has grown; a larger number takes longer.
            data = b"" if status.st_size > limit else file.read(status.st_size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenPicture("the file does not exist") from error
    except BrokenPicture:
        raise
    except (OSError, ValueError) as error:
        raise BrokenPicture(getattr(error, "strerror", None) or _sentence(error)) from error
    if status.st_size > limit or len(data) > limit:
        raise BrokenPicture(f"it has more than {limit} bytes")
    return data


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BrokenPicture("it is not a regular file")


def decode(
    data: bytes,
    size: int | None,
    resize: Resize = "crop",
    resample: Resample = "bicubic",
) -> torch.Tensor:
    """Decode the bytes of a picture file like :func:`load_picture`; call within ``quiet()``."""
    try:
        with _opened(data) as image:
            return load_rgb(image, size, resize, resample)
    except BrokenPicture:
        raise
    # For damaged data, Pillow's decoders raise many types: OSError, SyntaxError, struct.error,
    # MemoryError, KeyError, AssertionError and others.
    except Exception as error:
        raise BrokenPicture(_sentence(error)) from error


def _opened(data: bytes) -> Image.Image:
    """Return the Pillow image of a file, not decoded yet.

    `Image.open` is not used because it depends on global settings.
    """
    plugin = _plugin_of(data[:16])
    if plugin is None:
        formats = "JPEG, PNG, WEBP, GIF, BMP, TIFF" + (", AVIF" if _has_avif() else "")
        raise BrokenPicture(f"it is not a picture in a supported format ({formats})")
    if plugin is WebPImagePlugin.WebPImageFile:
        _check_pixels(*_webp_size(data))  # checked before opening, which allocates the memory
    file = _CompleteFile(data)
    image = plugin(file, "")
    file.end_is_error = True
    return image


def _plugin_of(prefix: bytes) -> Any:
    """Return the Pillow class for a file that begins with ``prefix``, or None."""
    if prefix.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if prefix.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if prefix.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if prefix.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    if prefix.startswith(tuple(TiffImagePlugin.PREFIXES)):
        return TiffImagePlugin.TiffImageFile
    if prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP" and WebPImagePlugin.SUPPORTED:
        return WebPImagePlugin.WebPImageFile
    if (
        AvifImagePlugin is not None
        and _has_avif()
        and prefix[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1")
    ):
        return AvifImagePlugin.AvifImageFile
    return None


def _has_avif() -> bool:
    return AvifImagePlugin is not None and AvifImagePlugin.SUPPORTED


class _CompleteFile(io.BytesIO):
    """A file in memory; if ``end_is_error`` is set, reading at its end raises OSError.

    Without the error, Pillow would fill in the missing pixels of a truncated file if the global
    setting ``ImageFile.LOAD_TRUNCATED_IMAGES`` is on.
    """

    end_is_error = False

    def read(self, count: int | None = -1) -> bytes:
        data = super().read(count)
        if not data and count != 0 and self.end_is_error:
            raise OSError("image file is truncated")
        return data


def load_rgb(
    image: Any,
    size: int | None,
    resize: Resize = "crop",
    resample: Resample = "bicubic",
) -> torch.Tensor:
    """Return a Pillow image as a (3, H, W) uint8 tensor; see :func:`load_picture`."""
    if image.format == "JPEG":
        width, height = _draft(image, size)
    elif image.format == "TIFF":
        # Allocated here, because Pillow's own allocation depends on a global limit.
        stored_size = getattr(image, "_tile_size", image.size)
        _check_pixels(*stored_size)
        image.im = Image.new(image.mode, stored_size).im
    else:
        _check_pixels(*image.size)
    is_large = image.size[0] * image.size[1] > LARGE
    with _large_picture_lock if is_large else contextlib.nullcontext():
        transparency = _transparency_of(image)
        image.load()
        if image.format != "JPEG":
            # Read after loading, which rotates a TIFF.
            width, height = image.size
        turn = TRANSPOSE.get(_orientation_of(image))
        image = _to_rgb(image, transparency)
        if size is not None:
            # The square is the same before and after the turn, but for half a pixel of "shortest".
            image = _square(image, width, height, size, resize, FILTERS[resample])
        if turn is not None:
            image = image.transpose(turn)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _square(
    image: Image.Image,
    width: float,
    height: float,
    size: int,
    resize: Resize,
    resample: Image.Resampling,
) -> Image.Image:
    """Return a decoded picture as a square; ``width`` and ``height`` are those of `_draft`."""
    short = min(width, height)
    if resize == "shortest":
        whole = int(size * width / short), int(size * height / short)
        _check_pixels(*whole)
        left, top = (round((side - size) / 2) for side in whole)
        image = image.resize(whole, resample, box=(0, 0, width, height))
        return image.crop((left, top, left + size, top + size))
    across, down = (short, short) if resize == "crop" else (width, height)
    left, top = (width - across) / 2, (height - down) / 2
    return image.resize((size, size), resample, box=(left, top, left + across, top + down))


def _draft(image: Any, size: int | None) -> tuple[float, float]:
    """Set the size at which Pillow decodes a JPEG; return its sides before Pillow rounds them.

    If ``size`` is given, a large JPEG is reduced to sides of at least ``2 * size``.
    """
    full_size = image.size
    width, height = full_size
    is_one_scan = _is_one_scan(image)
    if size is not None:
        # Twice the final size keeps the quality, as with Pillow's reducing_gap.
        drafted = image.draft(None, (2 * size, 2 * size))
        width, height = drafted[1][2:] if drafted else full_size
    # With several scans, libjpeg keeps the coefficients of the full-size picture in memory.
    _check_pixels(*(image.size if is_one_scan else full_size))
    return width, height


def _is_one_scan(image: Any) -> bool:
    if image.info.get("progressive"):
        return False
    # The file position is after the header of the first scan. If that scan has all components, it
    # is the only scan.
    count = image.layers
    scan = image.fp.getvalue()[image.fp.tell() - 6 - 2 * count :][:3]
    return scan == bytes((0, 6 + 2 * count, count))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenPicture(
            f"it has {width} x {height} pixels to decode, expected at most {MAX_PIXELS}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    return width & 0x3FFF, height & 0x3FFF


def _orientation_of(image: Any) -> int:
    """Return the EXIF orientation; 1 means upright."""
    # Pillow's `load` rotates a TIFF.
    if image.format == "TIFF":
        return 1
    # Pillow raises many types of exceptions for damaged EXIF data.
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _transparency_of(image: Any) -> bytes | int | tuple | None:
    """Return the transparent colour, scaled like the values of the decoded picture."""
    colour = image.info.get("transparency")
    if colour is None or image.format != "PNG" or not image.tile:
        return colour
    rawmode = image.tile[0][3]
    if rawmode == "RGB;16B":
        return tuple(value >> 8 for value in colour)
    factor = {"1": 255, "L;2": 85, "L;4": 17}.get(rawmode, 1)
    return min(colour * factor, 255) if isinstance(colour, int) and factor > 1 else colour


def _to_rgb(image: Any, transparency: bytes | int | tuple | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey(image, transparency)
    # Pillow cannot convert La to RGBA directly.
    if image.mode == "La":
        image = image.convert("LA")
    if transparency is not None and image.mode in ("1", "L", "P", "RGB"):
        image.info["transparency"] = transparency
        image = image.convert("RGBA")
    if image.mode not in WITH_ALPHA:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    # Done before resizing, which would mix in the hidden colours of transparent pixels.
    return Image.alpha_composite(white, image).convert("RGB")


def _wide_grey(image: Any, transparency: bytes | int | tuple | None) -> Image.Image:
    """Scale integer or float grey values to 8 bits; Pillow's own conversion would clip at 255."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    inverted = tags.get(PHOTOMETRIC) == 0
    values = np.asarray(image)
    if image.mode == "F":
        # Written so that NaN is rejected too.
        if not (values.min() >= 0 and values.max() <= 1):
            raise BrokenPicture("its floats are not all from 0 to 1, so white is undefined")
        grey = np.rint(values * 255).astype(np.uint8)
    elif image.mode == "I" and image.format == "TIFF":
        raise BrokenPicture("its integers are signed or have 32 bits, so white is undefined")
    else:
        if values.min() < 0 or values.max() > 65535:
            raise BrokenPicture("its integers are not all from 0 to 65535")
        white = 4095 if tuple(tags.get(BITS_PER_SAMPLE, ())) == (12,) else 65535
        grey = (values.astype(np.uint32) * 255 + white // 2) // white
        grey = np.minimum(grey, 255).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if isinstance(transparency, int):
        grey = np.where(values == transparency, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _sentence(error: BaseException, most: int = 200) -> str:
    """Return the message of a Pillow error as one printable sentence."""
    text = " ".join(str(error).split())[:most].rstrip(".")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    # The messages of other errors, such as the missing key of a KeyError, explain nothing.
    readable = isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
    if (
        readable
        and text
        and not isinstance(error.__cause__, (LookupError, TypeError, struct.error))
    ):
        return text
    return f"Pillow cannot read it ({type(error).__name__}{': ' if text else ''}{text})"


def read_header(data: bytes) -> tuple[str, int, int]:
    """Return the format, width and height of a picture, upright; call within ``quiet()``.

    Only the header is read; raise like :func:`load_picture`.
    """
    try:
        with _opened(data) as image:
            width, height = image.size
            is_turned = _orientation_of(image) in (5, 6, 7, 8)
            return str(image.format), *((height, width) if is_turned else (width, height))
    except BrokenPicture:
        raise
    except Exception as error:
        raise BrokenPicture(_sentence(error)) from error


def picture_path(root: Path, name: str) -> Path:
    """Return ``root / name``; raise BrokenPicture if it leads outside ``root``, even by a link."""
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    # Raised for a zero byte in the name or a cycle of links.
    except (OSError, ValueError, RuntimeError) as error:
        raise BrokenPicture(f"it is not a valid file name ({_sentence(error)})") from error
    raise BrokenPicture("it leads outside the folder")
