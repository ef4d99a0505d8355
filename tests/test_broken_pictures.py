from __future__ import annotations

import os
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from picture_files import FORMATS, NOISE, RAMP, saved
from PIL import Image

from mmfused.data import pictures
from mmfused.data.pictures import BrokenPicture, load_picture


def test_unsupported_formats_are_rejected_by_their_content(tmp_path):
    others = [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS",
        b"%PDF-1.4",
        b"",
        b"tea",
    ]
    others += [saved(NOISE, "PPM"), saved(NOISE, "ICO"), saved(NOISE, "TGA")]
    for data in others:
        (tmp_path / "picture.png").write_bytes(data)
        with pytest.raises(BrokenPicture, match="^it is not a picture in a supported format .JPEG"):
            load_picture(tmp_path / "picture.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_devices_and_folders_are_rejected_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    start = time.monotonic()
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(BrokenPicture, match="^it is not a regular file$"):
            load_picture(path)
    with pytest.raises(BrokenPicture, match="^the file does not exist$"):
        load_picture(tmp_path / "gone.png")
    with pytest.raises(BrokenPicture, match="name too long"):
        load_picture(tmp_path / ("a" * 300))
    with pytest.raises(BrokenPicture, match="null"):
        load_picture("a\0b")
    assert time.monotonic() - start < 5


def valid_files():
    turned = [Image.fromarray(NOISE).rotate(angle) for angle in (0, 90)]
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": turned[1:]}
    yield from (saved(NOISE, format) for format in FORMATS)
    yield from (saved(NOISE, format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF"))
    yield from (saved(turned[0], format, **several) for format in ("GIF", "PNG", "WEBP", "MPO"))
    yield saved(turned[0].quantize(16), "PNG", transparency=3)
    yield saved(turned[0].quantize(16), "BMP")
    yield saved(turned[0].convert("CMYK"), "JPEG")
    yield saved(RAMP, "PNG")


def damaged(rng, data):
    data = bytearray(data)
    kind = rng.integers(3)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    reach = len(data) if kind == 1 else min(len(data), 120)  # kind 2: only the headers
    for place in rng.integers(0, reach, rng.integers(1, 8)):
        data[place] = rng.choice([0, 127, 128, 255, rng.integers(256)])
    return bytes(data)


def test_damaged_files_load_or_raise_broken_picture(recwarn, caplog, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10**6)  # to save time
    rng = np.random.default_rng(16)
    rejected = loaded = 0
    for data in valid_files():
        for trial in range(40):
            try:
                picture = load_picture(damaged(rng, data), (None, 8)[trial % 2])
                assert picture.dtype == torch.uint8 and picture.shape[0] == 3
                loaded += 1
            except BrokenPicture as error:
                assert str(error) and str(error).isprintable() and len(str(error)) < 300
                rejected += 1
    assert rejected > 100 and loaded > 100 and not recwarn.list and not caplog.records


def test_every_exception_of_pillow_becomes_broken_picture(monkeypatch):
    for error in (
        MemoryError(),
        KeyError(128),
        struct.error("x"),
        RuntimeError("a\nb"),
        zlib.error(),
    ):

        def fails(data, error=error):
            raise error

        monkeypatch.setattr(pictures, "_opened", fails)
        with pytest.raises(BrokenPicture, match=f"^Pillow cannot read it .{type(error).__name__}"):
            load_picture(b"")


def test_quiet_suppresses_only_the_warnings_of_pillow():
    filters = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def slow():
        with pictures.quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=slow)
    with pictures.quiet():
        thread.start()
        inside.wait(10)
    # This thread's context has ended and the other thread's is still open.
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit("pillow's", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
        warnings.warn_explicit("another's", UserWarning, "x.py", 1, module="program")
    leave.set()
    thread.join(10)
    assert [str(warning.message) for warning in caught] == ["another's"]
    assert warnings.filters == filters


def test_quiet_in_a_thread_keeps_the_filters_that_others_set(monkeypatch):
    before = list(warnings.filters)
    inner, outer = pictures.quiet(), pictures.quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner.__enter__()
    inner.__exit__(None, None, None)
    assert warnings.filters == before
    outer.__enter__()
    with warnings.catch_warnings(record=True):
        outer.__exit__(None, None, None)
        assert warnings.filters == before
    # The filter that came back with the others is removed at the next time.
    with pictures.quiet():
        pass
    assert warnings.filters == before
