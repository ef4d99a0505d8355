from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from picture_files import FORMATS, NOISE, RAMP, chunk, png, saved, tiff
from PIL import Image, ImageFile, features

from mmfused.data import pictures
from mmfused.data.pictures import BrokenPicture, load_picture


def grey(data):
    picture = load_picture(data)
    assert torch.equal(picture[0], picture[1]) and torch.equal(picture[0], picture[2])
    return picture[0, 0].tolist()


def corner(data):
    return load_picture(data)[:, 0, 0].tolist()


# Colors


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_loads_from_a_path_bytes_and_an_open_file(tmp_path, format):
    data = saved(NOISE, format)
    path = tmp_path / "wrong.suffix"
    path.write_bytes(data)
    whole = load_picture(data)
    assert whole.shape == (3, 24, 32) and whole.dtype == torch.uint8 and whole.is_contiguous()
    with path.open("rb") as file:
        assert torch.equal(load_picture(file), whole)
    assert torch.equal(load_picture(path), whole) and torch.equal(load_picture(str(path)), whole)
    if format in ("PNG", "BMP", "TIFF"):
        assert torch.equal(whole, torch.from_numpy(NOISE).permute(2, 0, 1))


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"GIF", "BMP"}))
def test_the_exif_orientation_is_applied(format):
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:20, :30] = 255  # the top left quarter
    places = {  # orientation -> row and column of the bright quarter
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    for orientation, (row, column) in places.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(stored, format, exif=exif)
        picture = load_picture(data)
        assert picture.shape[1:] == ((40, 60) if orientation < 5 else (60, 40))
        # The crop to 20 x 20 keeps the middle two thirds of the long side.
        for shown in (picture, load_picture(data, 20)):
            bright = [shown[:, y, x].float().mean() > 128 for y in (2, -3) for x in (1, -2)]
            assert bright.index(True) == 2 * row + column and sum(bright) == 1


def test_invalid_exif_data_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    good = saved(np.zeros((4, 6, 3), np.uint8), "JPEG", exif=exif)
    assert load_picture(good).shape == (3, 6, 4)
    for bad in (b"XX*\0", b"MM\0*\xff\xff\xff\xff"):
        data = good.replace(exif.tobytes()[6:14], bad + exif.tobytes()[6 + len(bad) : 14])
        assert data != good and load_picture(data).shape == (3, 4, 6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(format):
    expected = np.rint(RAMP[0] / 257).astype(int).tolist()
    assert grey(saved(RAMP, format)) == expected
    if format == "TIFF":
        assert grey(saved(RAMP, format, compression="tiff_lzw")) == expected
        assert grey(saved(RAMP.astype(">u2"), format)) == expected
        # With photometric interpretation 0, the value 0 is white.
        assert grey(tiff(RAMP[0], 0, 16)) == [255 - value for value in expected]


def test_sixteen_bit_color_transparency_and_twelve_bit_grey_are_scaled():
    values = struct.pack(">6H", 65535, 32768, 256, 0x8001, 0x8001, 0x8001)
    assert load_picture(png(2, 16, 2, values))[:, 0].tolist() == [[255, 128], [128, 128], [1, 128]]
    key = chunk(b"tRNS", struct.pack(">3H", 0x8001, 0x8001, 0x8001))
    shown = load_picture(png(2, 16, 2, values, key))[:, 0]
    assert shown.tolist() == [[255, 255], [128, 255], [1, 255]]
    row = struct.pack(">3H", 65535, 0x4001, 0)
    assert grey(png(3, 16, 0, row, chunk(b"tRNS", struct.pack(">H", 0x4001)))) == [255, 255, 0]
    assert grey(png(2, 16, 4, struct.pack(">4H", 0, 65535, 0, 0))) == [0, 255]
    # The values have 12 bits, so 4095 is white.
    assert grey(tiff([b"\xff\xf0\x00"] + [b""], 1, 12)) == [255, 0]


def test_sixteen_bit_grey_in_the_mode_of_older_pillow_versions_is_scaled():
    image = Image.fromarray(RAMP.astype(np.int32))
    image.format = "PNG"
    assert np.array(pictures._to_rgb(image, None))[0, :, 0].tolist() == grey(saved(RAMP, "PNG"))


def test_floats_from_0_to_1_are_scaled_and_other_floats_refused():
    ramp = np.linspace(0, 1, 8, dtype=np.float32)[None]
    assert grey(saved(ramp, "TIFF")) == np.rint(ramp[0] * 255).astype(int).tolist()
    with_nan = ramp.copy()
    with_nan[0, 3] = np.nan
    for values in (ramp * 255, -ramp, with_nan):
        with pytest.raises(BrokenPicture, match="^its floats are not all from 0 to 1"):
            load_picture(saved(values, "TIFF"))


def test_signed_and_32_bit_integers_are_refused():
    for data in (saved(RAMP.astype(np.int32), "TIFF"), tiff(RAMP[0].astype(np.int16), 1, 16, 2)):
        with pytest.raises(BrokenPicture, match="^its integers are signed or have 32 bits"):
            load_picture(data)


def test_transparent_parts_are_white():
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for format in ("PNG", "WEBP", "TIFF"):
        assert corner(saved(hidden, format)) == [255, 255, 255]
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert corner(saved(half, "PNG")) == [127, 127, 127]
    assert corner(saved(Image.new("LA", (8, 8), (0, 0)), "PNG")) == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert corner(saved(palette, "PNG")) == [255, 0, 0]
    assert corner(saved(palette, "PNG", transparency=1)) == [255, 255, 255]
    assert corner(saved(palette, "PNG", transparency=b"\xff\x80")) == [255, 127, 127]
    assert corner(saved(palette, "GIF", transparency=1)) == [255, 255, 255]
    for mode, colour in (("L", 7), ("RGB", (7, 8, 9)), ("1", 0)):
        picture = Image.new(mode, (8, 8), colour)
        assert corner(saved(picture, "PNG", transparency=colour)) == [255, 255, 255]
        assert corner(saved(picture, "PNG")) == list(picture.convert("RGB").getpixel((0, 0)))


def test_transparent_grey_of_two_and_four_bits_is_white():
    steps = bytes([0b00011011])
    key = chunk(b"tRNS", struct.pack(">H", 1))
    assert grey(png(4, 2, 0, steps)) == [0, 85, 170, 255]
    assert grey(png(4, 2, 0, steps, key)) == [0, 255, 170, 255]
    assert grey(png(2, 4, 0, bytes([0x12]), key)) == [255, 34]


def test_a_resize_does_not_mix_in_the_colors_of_transparent_pixels():
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 0] = 255  # red and transparent
    pixels[:, ::2] = 255  # every second column: white and opaque
    assert load_picture(saved(pixels, "PNG"), 8).unique().tolist() == [255]


def test_cmyk_ycbcr_and_lab_are_converted_to_rgb():
    red = (255, 0, 0)
    for format, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        assert corner(saved(cmyk, format, **options)) == list(red)
    ycbcr = saved(Image.new("RGB", (8, 8), red).convert("YCbCr"), "TIFF")
    assert np.abs(np.array(corner(ycbcr)) - red).max() <= 2
    assert corner(saved(Image.new("1", (8, 8), 1), "TIFF")) == [255, 255, 255]
    if features.check("littlecms2"):
        assert min(corner(saved(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"))) >= 250


@pytest.mark.parametrize(
    "format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"] + ["AVIF"] * pictures._has_avif()
)
def test_a_file_with_several_pictures_loads_the_first(format):
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue"))
    data = saved(first, format, save_all=True, append_images=others)
    assert load_picture(data).float().mean((1, 2)).sub_(torch.tensor([255.0, 0, 0])).abs().max() < 4


# Size and memory


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_short_side_is_resized_and_the_center_cropped(format):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    shown = load_picture(saved(wide, format), 10)
    assert shown.shape == (3, 10, 10) and shown[:, :, 1:-1].min() > 250
    tall = load_picture(saved(wide.transpose(1, 0, 2), format), 10)
    assert tall.shape == (3, 10, 10) and tall[:, 1:-1].min() > 250
    assert load_picture(saved(NOISE, format), 100).shape == (3, 100, 100)  # enlarged


def test_a_large_jpeg_is_decoded_near_the_requested_size(monkeypatch):
    y, x = np.mgrid[0:1203, 0:1601]
    photo = np.stack([x * 255 / 1600, y * 255 / 1202, (x + y) * 255 / 2802], -1).astype(np.uint8)
    data = saved(photo, "JPEG", quality=95)
    whole = load_picture(saved(photo, "PNG"), 64).int()
    decoded = []
    to_rgb = pictures._to_rgb

    def watched(image, transparency):
        decoded.append(image.size)
        return to_rgb(image, transparency)

    monkeypatch.setattr(pictures, "_to_rgb", watched)
    assert (load_picture(data, 64).int() - whole).abs().max() <= 3
    assert decoded == [(201, 151)] and load_picture(data).shape == (3, 1203, 1601)


def blank_jpeg(width, height, **options):
    return saved(Image.new("L", (width, height)), "JPEG", **options)


def test_pictures_with_too_many_pixels_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000 * 1000)
    message = "^it has 1500 x 1000 pixels to decode, expected at most 1000000$"
    large = [saved(Image.new("L", (1500, 1000)), format) for format in FORMATS]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
        webp = pictures.WebPImagePlugin.WebPImageFile  # opening a WEBP allocates memory
        patch.setattr(webp, "_open", lambda image: pytest.fail("it was opened"))
        for data in large:
            with pytest.raises(BrokenPicture, match=message):
                load_picture(data)
    # For a JPEG the scaled size counts, for a progressive JPEG the full size.
    assert load_picture(blank_jpeg(1500, 1000), 100).shape == (3, 100, 100)
    with pytest.raises(BrokenPicture, match=message):
        load_picture(blank_jpeg(1500, 1000, progressive=True), 100)


def test_webp_size_reads_the_headers_of_all_kinds_of_webp():
    clear = Image.new("RGBA", (70, 50), (9, 9, 9, 9))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [saved(clear, "WEBP"), saved(clear, "WEBP", lossless=True)]
    kinds += [saved(clear.convert("RGB"), "WEBP"), saved(clear, "WEBP", exif=exif)]
    assert {data[12:16] for data in kinds} == {b"VP8X", b"VP8L", b"VP8 "}
    assert [pictures._webp_size(data) for data in kinds] == [(70, 50)] * 4


def test_a_file_with_too_many_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    data = saved(NOISE, "BMP")
    (tmp_path / "large.bmp").write_bytes(data)
    for source in (data, tmp_path / "large.bmp", io.BytesIO(data)):
        with pytest.raises(BrokenPicture, match="^it has more than 1000 bytes$"):
            load_picture(source)


@pytest.mark.parametrize("limit", [None, 10])
def test_pillows_own_pixel_limit_affects_only_webp(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for format in set(FORMATS) - {"WEBP"} | ({"WEBP"} if limit is None else set()):
        assert load_picture(saved(NOISE, format)).shape == (3, 24, 32)
    large = saved(Image.new("L", (10000, 10001)), "PNG")
    with pytest.raises(
        BrokenPicture, match="^it has 10000 x 10001 pixels to decode, expected at most 1000"
    ):
        load_picture(large)


@pytest.mark.parametrize("load_truncated", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused_whatever_pillows_setting(monkeypatch, format, load_truncated):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", load_truncated)
    data = saved(NOISE, format)
    assert load_picture(data).shape == (3, 24, 32)
    for length in (len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(BrokenPicture):
            load_picture(data[:length])
    if format == "JPEG":
        data = saved(NOISE, format, progressive=True)
        with pytest.raises(BrokenPicture, match="^image file is truncated"):
            load_picture(data[: len(data) // 2])
