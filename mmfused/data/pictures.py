"""One loader for all pictures: as a person sees them, or an error with the reason."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
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

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    AvifImagePlugin = None

# Decoded at once: 286 MiB of RGB.
MAX_PIXELS = 100_000_000
# Of a picture file.
MAX_BYTES = 256 * 2**20
# Pixels. Larger pictures are decoded one at a time, which bounds the memory of all threads.
LARGE = 2**24
_one_at_a_time = threading.Lock()

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


class BrokenPicture(ValueError):
    """A picture that cannot be used; the message is the reason, in one sentence."""


def load_picture(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    size: int | None = None,
) -> torch.Tensor:
    """Load a picture as uint8 (3, H, W), as a person sees it.

    Formats are JPEG (of MPO the first picture), PNG, WEBP, GIF, BMP and TIFF, and AVIF if Pillow
    has it; the content decides, not the name. EXIF rotation is applied (unreadable EXIF data are
    ignored), transparent parts become white, and of animations the first frame is taken. 16-bit
    grey and floats from 0 to 1 are scaled to 8 bits. Other floats, and integers of more bits, have
    no defined white and are refused. ICC profiles are not applied.

    A file may have ``MAX_BYTES``, and a picture ``MAX_PIXELS`` to decode, whatever
    ``Image.MAX_IMAGE_PIXELS`` is; a lower one also bounds WEBP. Truncated files are refused even if
    ``ImageFile.LOAD_TRUNCATED_IMAGES`` is set; data damaged in the middle then load as far as
    Pillow can. Pillow gives no warnings, but libtiff writes problems of a TIFF to stderr.

    Args:
        source: a path, the bytes of a file, or an open file.
        size: resize the short side to it (bicubic, antialiased) and crop the centre (size, size). A
            JPEG is decoded near that size, which saves memory.

    Raises:
        BrokenPicture: the source is no such picture; the message is the reason.
    """
    with quiet():
        return decode(read_picture(source), size)


def read_picture(source: str | os.PathLike[str] | bytes | BinaryIO) -> bytes:
    """Return the bytes of a picture file, at most ``MAX_BYTES``."""
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
    """Return the bytes of a regular file, at most ``limit``; pipes and devices are not opened."""
    try:
        _check_regular(os.stat(path))
        # Not blocking, and checked again: the file may have been replaced since.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            _check_regular(found)
            data = b"" if found.st_size > limit else file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenPicture("the file does not exist") from error
    except BrokenPicture:
        raise
    except (OSError, ValueError) as error:
        raise BrokenPicture(getattr(error, "strerror", None) or _sentence(error)) from error
    if found.st_size > limit or len(data) > limit:
        raise BrokenPicture(f"it has more than {limit} bytes")
    return data


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BrokenPicture("it is no regular file")


def decode(data: bytes, size: int | None) -> torch.Tensor:
    """Return as :func:`load_picture`, from a file's bytes; call it within :func:`quiet`."""
    try:
        with _opened(data) as image:
            return load_rgb(image, size)
    except BrokenPicture:
        raise
    # Pillow's decoders raise many kinds for damaged data: OSError, SyntaxError, struct.error,
    # MemoryError, KeyError, AssertionError and more, depending on the format.
    except Exception as error:
        raise BrokenPicture(_sentence(error)) from error


def _opened(data: bytes) -> Image.Image:
    """Return Pillow's picture, not decoded yet; `Image.open` would depend on global settings."""
    plugin = _plugin_of(data[:16])
    if plugin is None:
        known = "JPEG, PNG, WEBP, GIF, BMP, TIFF" + (", AVIF" if _has_avif() else "")
        raise BrokenPicture(f"it is no picture in a format that is read ({known})")
    if plugin is WebPImagePlugin.WebPImageFile:
        _check_pixels(*_webp_size(data))  # opening allocates the memory
    file = _WholeFile(data)
    image = plugin(file, "")
    file.cut_short_is_an_error = True
    return image


def _plugin_of(prefix: bytes) -> Any:
    """Return the class of Pillow for a file that begins with ``prefix``, or None."""
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


class _WholeFile(io.BytesIO):
    """A file that raises OSError if pixels are read beyond its end.

    With ``ImageFile.LOAD_TRUNCATED_IMAGES``, a global setting, Pillow would fill in the missing
    part. Of a complete picture no byte after the end is read.
    """

    cut_short_is_an_error = False

    def read(self, count: int | None = -1) -> bytes:
        data = super().read(count)
        if not data and count != 0 and self.cut_short_is_an_error:
            raise OSError("image file is truncated")
        return data


def load_rgb(image: Any, size: int | None) -> torch.Tensor:
    """Return a picture of Pillow as uint8 (3, H, W); see :func:`load_picture`."""
    if image.format == "JPEG":
        width, height = _draft(image, size)
    elif image.format == "TIFF":
        # Allocated here: in Pillow, a global setting would bound it.
        stored = getattr(image, "_tile_size", image.size)
        _check_pixels(*stored)
        image.im = Image.new(image.mode, stored).im
    else:
        _check_pixels(*image.size)
    is_large = image.size[0] * image.size[1] > LARGE
    with _one_at_a_time if is_large else contextlib.nullcontext():
        transparency = _transparency_of(image)
        image.load()
        if image.format != "JPEG":
            # A TIFF has been rotated by now.
            width, height = image.size
        turn = TRANSPOSE.get(_orientation_of(image))
        image = _to_rgb(image, transparency)
        if size is not None:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if turn is not None:
            image = image.transpose(turn)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _draft(image: Any, size: int | None) -> tuple[float, float]:
    """Let a JPEG be decoded near ``size``; return its width and height then, as floats."""
    whole = image.size
    width, height = whole
    in_one_scan = _is_one_scan(image)
    if size is not None:
        # Twice the size at least remains for the resize, as with Pillow's reducing_gap.
        drafted = image.draft(None, (2 * size, 2 * size))
        width, height = drafted[1][2:] if drafted else whole
    # For a picture in several scans, libjpeg keeps all coefficients in memory.
    _check_pixels(*(image.size if in_one_scan else whole))
    return width, height


def _is_one_scan(image: Any) -> bool:
    if image.info.get("progressive"):
        return False
    # The header of the first scan has just been read. If it names all components, it is the only
    # one.
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
    # Pillow rotates a TIFF when it loads it.
    if image.format == "TIFF":
        return 1
    # Broken EXIF data raise as many kinds of errors as broken pictures.
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _transparency_of(image: Any) -> bytes | int | tuple | None:
    """Return the transparent colour, in the values of the decoded picture."""
    found = image.info.get("transparency")
    if found is None or image.format != "PNG" or not image.tile:
        return found
    rawmode = image.tile[0][3]
    if rawmode == "RGB;16B":
        return tuple(value >> 8 for value in found)
    factor = {"1": 255, "L;2": 85, "L;4": 17}.get(rawmode, 1)
    return min(found * factor, 255) if isinstance(found, int) and factor > 1 else found


def _to_rgb(image: Any, transparency: bytes | int | tuple | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey(image, transparency)
    # Pillow cannot convert it to RGBA directly.
    if image.mode == "La":
        image = image.convert("LA")
    if transparency is not None and image.mode in ("1", "L", "P", "RGB"):
        image.info["transparency"] = transparency
        image = image.convert("RGBA")
    if image.mode not in WITH_ALPHA:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    # Before any resize, which would mix in the hidden colours of transparent pixels.
    return Image.alpha_composite(white, image).convert("RGB")


def _wide_grey(image: Any, transparency: bytes | int | tuple | None) -> Image.Image:
    """Scale grey of 16 bits or floats to 8 bits; Pillow would clip it at 255."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    inverted = tags.get(PHOTOMETRIC) == 0
    values = np.asarray(image)
    if image.mode == "F":
        # In this form, NaN is refused as well.
        if not (values.min() >= 0 and values.max() <= 1):
            raise BrokenPicture("its floats are not all from 0 to 1, which leaves white undefined")
        grey = np.rint(values * 255).astype(np.uint8)
    elif image.mode == "I" and image.format == "TIFF":
        raise BrokenPicture("its integers are signed or of 32 bits, which leaves white undefined")
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
    """Return an error of Pillow as one printable sentence."""
    text = " ".join(str(error).split())[:most].rstrip(".")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    # Messages of other kinds are a missing key or an index, also as the cause of these.
    readable = isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
    if (
        readable
        and text
        and not isinstance(error.__cause__, (LookupError, TypeError, struct.error))
    ):
        return text
    return f"Pillow cannot read it ({type(error).__name__}{': ' if text else ''}{text})"


def short_side(path: str | os.PathLike[str]) -> int:
    """Return the short side from a picture's header; raises as :func:`load_picture`."""
    try:
        with quiet(), _opened(_read_file(path, MAX_BYTES)) as image:
            return min(image.size)
    except BrokenPicture:
        raise
    except Exception as error:
        raise BrokenPicture(_sentence(error)) from error


def inside(root: Path, name: str) -> Path:
    """Return ``root / name``; raise BrokenPicture if that leads outside, by a link too."""
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    # A zero byte in the name, or a cycle of links.
    except (OSError, ValueError, RuntimeError) as error:
        raise BrokenPicture(f"it is no name of a file ({_sentence(error)})") from error
    raise BrokenPicture("it leads outside the folder")


class _Quiet:
    """A context in which Pillow neither warns nor logs; other warnings are shown.

    Warning filters are global: the first thread that enters sets them, and the last that leaves
    restores them. If each thread restored what it found, one could restore another's.
    """

    def __init__(self) -> None:
        self.lock: Any = threading.Lock()
        self.inside: int = 0
        self.undo: Callable[[], None] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.undo = self._silence()
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0 and self.undo is not None:
                    self.undo()

    @staticmethod
    def _silence() -> Callable[[], None]:
        stack = contextlib.ExitStack()
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")
        stack.callback(setattr, TiffImagePlugin.logger, "disabled", TiffImagePlugin.logger.disabled)
        TiffImagePlugin.logger.disabled = True
        return stack.close


quiet: _Quiet = _Quiet()
