"""One loader for all pictures: as a person sees them, or one sentence that says why not."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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

MAX_PIXELS = 100_000_000  # that are decoded at once, 286 MiB of RGB
MAX_BYTES = 256 * 2**20  # of a picture file
LARGE = 2**24  # pixels; of pictures that have more, one is decoded at a time, lest threads add up
one_at_a_time = threading.Lock()

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 0x0102, 0x0106  # EXIF and TIFF tags
WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")


class BrokenPicture(ValueError):
    """A picture that cannot be used; its message is the reason, in one sentence."""


def load_picture(
    source: str | os.PathLike | bytes | BinaryIO,
    size: int | None = None,
) -> torch.Tensor:
    """The picture as uint8 (3, H, W), as a person sees it; a path, a file's bytes, or an open file.

    JPEG (MPO: its first picture), PNG, WEBP, GIF, BMP and TIFF, and AVIF where Pillow has it; the
    content decides, not the name. With ``size`` the short side is resized to it (bicubic,
    antialiased) and the centre (size, size) kept; a JPEG is decoded near that size, so that a large
    photo takes little memory.

    Turned as EXIF says (EXIF data that cannot be read say nothing); transparent parts are white;
    of animations, the first frame. 16-bit grey is scaled to 8 bits, so are floats from 0 to 1.
    Other floats and integers of more bits have no defined white and are refused. ICC profiles are
    not applied.

    At most ``MAX_BYTES`` of file and ``MAX_PIXELS`` that are decoded, whatever Pillow's own
    ``Image.MAX_IMAGE_PIXELS`` is, but one that is set lower also bounds WEBP. A file that is cut
    short is refused also where ``ImageFile.LOAD_TRUNCATED_IMAGES`` is set; data damaged in the
    middle then load as far as Pillow lets them. Pillow does not warn, but libtiff writes what it
    finds wrong with a TIFF to the process's stderr.

    Raises:
        BrokenPicture: anything else than such a picture; the message says why.
    """
    with quiet():
        return decode(read_picture(source), size)


def read_picture(source: str | os.PathLike | bytes | BinaryIO) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        data = read_file(source, MAX_BYTES)
    else:
        try:
            data = source.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise BrokenPicture(sentence(error)) from error
    if len(data) > MAX_BYTES:
        raise BrokenPicture(f"it has more than {MAX_BYTES} bytes")
    return data


def read_file(path: str | os.PathLike, limit: int) -> bytes:
    """The bytes of a regular file, at most ``limit``; a pipe or a device is not even opened."""
    try:
        check_regular(os.stat(path))
        # Not blocking, and checked again: the file may have been replaced since.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            check_regular(found)
            data = b"" if found.st_size > limit else file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenPicture("the file does not exist") from error
    except BrokenPicture:
        raise
    except (OSError, ValueError) as error:
        raise BrokenPicture(getattr(error, "strerror", None) or sentence(error)) from error
    if found.st_size > limit or len(data) > limit:
        raise BrokenPicture(f"it has more than {limit} bytes")
    return data


def check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BrokenPicture("it is no regular file")


def decode(data: bytes, size: int | None) -> torch.Tensor:
    """:func:`load_picture` of a file's bytes, for callers that are :func:`quiet` already."""
    try:
        with opened(data) as image:
            return load_rgb(image, size)
    except BrokenPicture:
        raise
    # Whatever Pillow's decoders meet in hostile bytes: OSError, SyntaxError, struct.error,
    # MemoryError, KeyError, AssertionError ... their number grows with every format.
    except Exception as error:
        raise BrokenPicture(sentence(error)) from error


def opened(data: bytes) -> Image.Image:
    """Pillow's picture, nothing decoded yet. ``Image.open`` would consult the program's settings."""
    plugin = plugin_of(data[:16])
    if plugin is None:
        known = "JPEG, PNG, WEBP, GIF, BMP, TIFF" + (", AVIF" if has_avif() else "")
        raise BrokenPicture(f"it is no picture in a format that is read ({known})")
    if plugin is WebPImagePlugin.WebPImageFile:
        check_pixels(*webp_size(data))  # its decoder takes memory as soon as it is opened
    file = Whole(data)
    image = plugin(file, "")
    file.cut_short_is_an_error = True
    return image


def plugin_of(prefix: bytes) -> type | None:
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
    if has_avif() and prefix[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return AvifImagePlugin.AvifImageFile
    return None


def has_avif() -> bool:
    return AvifImagePlugin is not None and AvifImagePlugin.SUPPORTED


class Whole(io.BytesIO):
    """A file that may not end while pixels are read from it.

    With ``ImageFile.LOAD_TRUNCATED_IMAGES``, a setting of the whole program, Pillow would fill up
    what is missing. A picture that is whole is never read to its end.
    """

    cut_short_is_an_error = False

    def read(self, count: int | None = -1) -> bytes:
        data = super().read(count)
        if not data and count != 0 and self.cut_short_is_an_error:
            raise OSError("image file is truncated")
        return data


def load_rgb(image: Image.Image, size: int | None) -> torch.Tensor:
    if image.format == "JPEG":
        width, height = draft(image, size)
    elif image.format == "TIFF":
        # Memory made here: Pillow's own would be bounded by a setting of the whole program.
        stored = getattr(image, "_tile_size", image.size)
        check_pixels(*stored)
        image.im = Image.new(image.mode, stored).im
    else:
        check_pixels(*image.size)
    with one_at_a_time if image.size[0] * image.size[1] > LARGE else contextlib.nullcontext():
        transparency = transparency_of(image)
        image.load()
        if image.format != "JPEG":
            width, height = image.size  # of a TIFF, turned by now
        turn = TRANSPOSE.get(orientation_of(image))
        image = to_rgb(image, transparency)
        if size is not None:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if turn is not None:
            image = image.transpose(turn)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def draft(image: Image.Image, size: int | None) -> tuple[float, float]:
    """Has a JPEG decoded near ``size``; its width and height then, fractions of a pixel included."""
    whole, width, height = image.size, *image.size
    in_one_scan = is_one_scan(image)
    if size is not None:
        # At least twice the size is left for the resize, as Pillow's reducing_gap has it.
        drafted = image.draft(None, (2 * size, 2 * size))
        width, height = drafted[1][2:] if drafted else whole
    # libjpeg keeps all coefficients of a picture that comes in several scans.
    check_pixels(*(image.size if in_one_scan else whole))
    return width, height


def is_one_scan(image: Image.Image) -> bool:
    if image.info.get("progressive"):
        return False
    # The header of the first scan has just been read; it names all components, or others follow.
    count = image.layers
    scan = image.fp.getvalue()[image.fp.tell() - 6 - 2 * count :][:3]
    return scan == bytes((0, 6 + 2 * count, count))


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenPicture(
            f"it has {width} x {height} pixels to decode, at most {MAX_PIXELS} are taken"
        )


def webp_size(data: bytes) -> tuple[int, int]:
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    return width & 0x3FFF, height & 0x3FFF


def orientation_of(image: Image.Image) -> int | None:
    if image.format == "TIFF":
        return None  # turned by Pillow as it loads
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # of broken EXIF data, as many kinds as of broken pictures
        return None


def transparency_of(image: Image.Image) -> bytes | int | tuple | None:
    """The transparent colour in the values that the decoded picture has."""
    found = image.info.get("transparency")
    if found is None or image.format != "PNG" or not image.tile:
        return found
    rawmode = image.tile[0][3]
    if rawmode == "RGB;16B":
        return tuple(value >> 8 for value in found)
    factor = {"1": 255, "L;2": 85, "L;4": 17}.get(rawmode, 1)
    return min(found * factor, 255) if isinstance(found, int) and factor > 1 else found


def to_rgb(image: Image.Image, transparency: bytes | int | tuple | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return wide_grey(image, transparency)
    if image.mode == "La":  # has no way to RGBA of its own
        image = image.convert("LA")
    if transparency is not None and image.mode in ("1", "L", "P", "RGB"):
        image.info["transparency"] = transparency
        image = image.convert("RGBA")
    if image.mode not in WITH_ALPHA:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    # Before any resize, which would mix in the colours that transparent pixels hide.
    return Image.alpha_composite(white, image).convert("RGB")


def wide_grey(image: Image.Image, transparency: bytes | int | tuple | None) -> Image.Image:
    """Grey of 16 bits or floats, which Pillow would cut off at 255 instead of scaling it."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    inverted = tags.get(PHOTOMETRIC) == 0
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # so written, NaN is refused as well
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


def sentence(error: BaseException, most: int = 200) -> str:
    text = " ".join(str(error).split())[:most].rstrip(".")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    # The others carry no sentence but a missing key or an index, also as what Pillow then raised.
    told = isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
    if told and text and not isinstance(error.__cause__, (LookupError, TypeError, struct.error)):
        return text
    return f"Pillow cannot read it ({type(error).__name__}{': ' if text else ''}{text})"


def short_side(path: str | os.PathLike) -> int:
    """Of the picture in a file, from its header alone. Raises as :func:`load_picture`."""
    try:
        with quiet(), opened(read_file(path, MAX_BYTES)) as image:
            return min(image.size)
    except BrokenPicture:
        raise
    except Exception as error:
        raise BrokenPicture(sentence(error)) from error


def inside(root: Path, name: str) -> Path:
    """``root / name``. Raises BrokenPicture where that is not below ``root``, be it by a link."""
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root.resolve()):
            return path
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, links in a circle
        raise BrokenPicture(f"it is no name of a file ({sentence(error)})") from error
    raise BrokenPicture("it leads outside of the folder")


class Quiet:
    """While any thread is inside, Pillow neither warns nor logs; what others warn of is shown.

    Filters of warnings belong to the whole program: the first to come sets them and the last to
    leave puts them back, since threads that restore what they found leave with each other's.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = 0
        self.undo: Callable[[], None] | None = None

    @contextlib.contextmanager
    def __call__(self):
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.undo = self.silence()
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    self.undo()

    @staticmethod
    def silence() -> Callable[[], None]:
        stack = contextlib.ExitStack()
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")
        stack.callback(setattr, TiffImagePlugin.logger, "disabled", TiffImagePlugin.logger.disabled)
        TiffImagePlugin.logger.disabled = True
        return stack.close


quiet = Quiet()
