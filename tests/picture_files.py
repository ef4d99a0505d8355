"""Picture files in memory, including kinds that Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from mmfused.data import pictures

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
FORMATS += ["AVIF"] if pictures._has_avif() else []
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))


def saved(picture, format, **options):
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png(width, bits, colour, row, *chunks):
    """Return a PNG of one row, of any bit depth and colour type."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    content = header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def tiff(values, photometric, bits, sample_format=1):
    """Return a greyscale TIFF of one row, of any sample format."""
    entries = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric)]
    data = b"".join(values) if isinstance(values[0], bytes) else values.tobytes()
    entries += [(273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, 1), (279, len(data))]
    entries += [(339, sample_format)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0" * 4 + data
