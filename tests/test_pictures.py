"""Pictures as cameras, scanners and editors write them: loaded as a person sees them, or named."""

import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mmfused.data import Collate, ProductFolder, load_picture, swap_texts, train_tokenizer
from mmfused.data import pictures as loader
from mmfused.data.batches import Items
from mmfused.data.pictures import FORMATS, BrokenPicture

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))


def saved(picture, kind, **options):
    file = BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, kind, **options)
    return file.getvalue()


def noise(height=48, width=64, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width):
    small = Image.fromarray(noise(6, 8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(small)


def pixels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# Numbers


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(kind):
    image = load_picture(saved(RAMP, kind))
    assert torch.equal(image[0, 0], torch.from_numpy((RAMP[0] / 257).round().astype(np.uint8)))
    assert torch.equal(image, image[:1].expand(3, -1, -1))


def test_sixteen_bits_in_the_other_byte_order_and_of_older_readers():
    big = Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes())
    assert torch.equal(load_picture(saved(big, "TIFF")), load_picture(saved(RAMP, "TIFF")))
    older = Image.fromarray(RAMP.astype(np.int32))  # mode "I", as which a PNG of 16 bits was once read
    older.format = "PNG"
    assert torch.equal(loader.load_rgb(older, None), load_picture(saved(RAMP, "PNG")))


def test_floats_from_0_to_1_are_scaled_and_others_named():
    image = load_picture(saved(RAMP.astype(np.float32) / 65535, "TIFF"))
    assert image[0, 0, ::9].tolist() == [0, 36, 73, 109, 146, 182, 219, 255]
    for values in (RAMP.astype(np.float32), np.full((4, 4), np.nan, np.float32), np.full((4, 4), -0.1, np.float32)):
        with pytest.raises(BrokenPicture, match="floating-point numbers that are not all from 0 to 1"):
            load_picture(saved(values, "TIFF"))


def test_whole_numbers_of_32_bits_are_named():
    with pytest.raises(BrokenPicture, match="32-bit integers, of which none is defined as white"):
        load_picture(saved(RAMP.astype(np.int32), "TIFF"))


# The right way up

UPRIGHT = {  # what a viewer does to rows and columns
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9, 77])
def test_every_exif_orientation_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture = smooth(40, 60)
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = load_picture(saved(picture, kind, exif=exif, **lossless)).permute(1, 2, 0).numpy()
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(picture)
    assert image.shape == expected.shape and np.abs(image.astype(int) - expected).max() <= 6
    half = load_picture(saved(picture, kind, exif=exif, **lossless), 20).permute(1, 2, 0).numpy()
    plain = load_picture(saved(np.ascontiguousarray(expected), kind, **lossless), 20).permute(1, 2, 0).numpy()
    assert half.shape == (20, 20, 3) and np.abs(half.astype(int) - plain).max() <= 12


def test_broken_exif_counts_as_none():
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense", b""):
        assert load_picture(saved(noise(), "JPEG", exif=exif)).shape == (3, 48, 64)


# Colours


def test_transparent_parts_show_white():
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 0] = 255
    hidden[:, 4:, 3] = 255
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        image = load_picture(saved(Image.fromarray(hidden, "RGBA"), kind, **options))
        assert image[:, 0, 0].tolist() == [255, 255, 255] and image[:, 0, 7].tolist() == [255, 0, 0]
    half = np.full((4, 4, 4), 128, np.uint8)
    assert load_picture(saved(Image.fromarray(half, "RGBA"), "PNG"))[:, 0, 0].tolist() == [191] * 3
    grey = Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 0)])
    assert load_picture(saved(grey, "PNG")).min() == 255


def test_hidden_colours_do_not_reach_their_neighbours_by_resizing():
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[..., 0] = 255
    picture[:, 32:] = (0, 0, 255, 255)
    image = load_picture(saved(Image.fromarray(picture, "RGBA"), "PNG"), 16).float()
    assert image[1, :, :6].min() == 255 and (image[0] <= image[1] + 1).all()


def test_transparency_of_palettes_grey_and_rgb():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    assert load_picture(saved(palette, "PNG"))[:, 0, 0].tolist() == [0, 255, 0]
    for kind in ("PNG", "GIF"):
        assert load_picture(saved(palette, kind, transparency=1)).min() == 255
    assert load_picture(saved(Image.new("L", (4, 4), 7), "PNG", transparency=7)).min() == 255
    assert load_picture(saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))).min() == 255


def test_cmyk_and_other_colour_spaces():
    for kind in ("JPEG", "TIFF"):
        image = load_picture(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)).float()
        assert image[0].min() > 250 and image[1:].max() < 5
    for mode in ("1", "L", "P", "YCbCr", "LAB", "RGBX"):
        assert load_picture(saved(Image.new("RGB", (8, 8), "white").convert(mode if mode != "LAB" else "RGB"), "TIFF")).min() > 250


# Frames


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = load_picture(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)).float()
    assert image[0].min() > 250 and image[1:].max() < 5


# Sizes


def test_a_large_jpeg_is_decoded_near_the_size_asked_for(monkeypatch):
    data, decoded = saved(smooth(1500, 2000), "JPEG", quality=95), []
    decode = loader.decode
    monkeypatch.setattr(loader, "decode", lambda image: (decoded.append(image.size), decode(image)))
    for size, most in ((64, 250), (224, 1000), (700, 2000)):
        image = load_picture(data, size)
        assert image.shape == (3, size, size) and max(decoded[-1]) <= most and min(decoded[-1]) >= 2 * size
        whole = Image.open(BytesIO(data))
        expected = whole.resize((size, size), Image.Resampling.BICUBIC, box=(250, 0, 1750, 1500))
        assert (image.float() - pixels(expected).float()).abs().mean() < 1.5
    assert load_picture(data).shape == (3, 1500, 2000)


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (3, 1000)])
def test_odd_shapes(shape):
    for kind in ("PNG", "JPEG"):
        assert load_picture(saved(noise(*shape), kind), 8).shape == (3, 8, 8)


def test_too_many_pixels_are_named_before_they_are_decoded(monkeypatch):
    data = saved(noise(48, 64), "PNG")
    monkeypatch.setattr(loader, "MOST_PIXELS", 3000)
    with pytest.raises(BrokenPicture, match="has 64 x 48 pixels, more than 3000"):
        load_picture(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as many programs have it
    with pytest.raises(BrokenPicture, match="has 64 x 48 pixels, more than 3000"):
        load_picture(data, 8)
    assert load_picture(saved(noise(320, 480), "JPEG"), 8).shape == (3, 8, 8)  # 60 x 40 are decoded


# Files that are none


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("switch", [False, True])
def test_a_truncated_file_is_named_whatever_the_program_told_pillow(monkeypatch, kind, switch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", switch)
    data = saved(noise(), kind)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(BrokenPicture, match="cannot be read: "):
            load_picture(data[: int(len(data) * share)])
        with pytest.raises(BrokenPicture, match="cannot be read: "):
            load_picture(data[: int(len(data) * share)], 8)
    assert load_picture(data).shape == (3, 48, 64)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is switch


def test_threads_do_not_undo_each_other_s_strictness(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole, cut = saved(noise(400, 400), "PNG"), saved(noise(400, 400), "PNG")[:300_000]

    def refused(_):
        load_picture(whole)
        with pytest.raises(BrokenPicture):
            load_picture(cut)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(refused, range(60)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_many_names_of_folders_leave_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(30):
        with pytest.raises(BrokenPicture, match="is no regular file"):
            load_picture(tmp_path)
    assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "PDF", "JPEG2000", "PCX", "SGI"])
def test_other_formats_are_named(kind):
    with pytest.raises(BrokenPicture, match="cannot be read: it is none of JPEG, PNG"):
        load_picture(saved(noise(), kind))


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    for name, says in (
        ("pipe.png", "is no regular file"),
        ("folder.png", "is no regular file"),
        ("gone.png", "the file does not exist"),
        ("empty.png", "none of JPEG"),
        ("x" * 4000, "File name too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(BrokenPicture, match=says):
            load_picture(tmp_path / name)


def test_a_file_of_many_bytes_is_named_unread(tmp_path):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(BrokenPicture, match="has 268435457 bytes, more than 268435456"):
        load_picture(tmp_path / "large.png")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_give_a_picture_or_a_sentence(kind):
    chance = random.Random(kind)
    whole = saved(noise(24, 32), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(chance.choice((1, 3, 20))):
                data[chance.randrange(len(data) if chance.random() < 0.5 else 64)] = chance.randrange(256)
            if chance.random() < 0.2:
                del data[chance.randrange(len(data)) :]
            try:
                image = load_picture(bytes(data), chance.choice((None, 8)))
                assert image.dtype == torch.uint8 and image.shape[0] == 3
            except BrokenPicture as error:
                assert "\n" not in str(error)


# Folders


def write_folder(folder, count=5, side=40, kind="JPEG"):
    lines = ["file_name,text,label"]
    for row in range(count):
        (folder / f"{row}.jpg").write_bytes(saved(noise(side, side + 10, seed=row), kind))
        lines.append(f"{row}.jpg,thing {row},{row % 2}")
    (folder / "metadata.csv").write_text("\n".join([*lines, ",no photo,1"]))
    return folder


def test_a_folder_holds_its_images_once(tmp_path):
    data = ProductFolder(write_folder(tmp_path), image_size=16)
    assert data.images.shape == (6, 3, 16, 16) and not data.images[5].any() and data[5]["image_present"] is False
    for row in range(5):
        assert torch.equal(data[row]["image"], load_picture(tmp_path / f"{row}.jpg", 16))
    tokenizer = train_tokenizer(data.texts)
    for dataset in (data, swap_texts(data, 0.5, 0)):
        for augment in (False, True):
            items = Items(dataset, Collate(tokenizer, 16, 8, augment=augment))
            assert items.images.data_ptr() == data.images.data_ptr() and len(items) == 6


def test_more_images_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfused.data.folder.physical_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="holds 6 images of 64 x 64 pixels, 0.0 GiB, more than this machine's memory"):
        ProductFolder(write_folder(tmp_path), image_size=64)


def test_a_digest_is_of_texts_labels_and_pictures(tmp_path):
    write_folder(tmp_path)
    digests = {ProductFolder(tmp_path, image_size=8).digest, ProductFolder(tmp_path).digest}
    assert len(digests) == 1  # not of how they are read
    swapped = swap_texts(ProductFolder(tmp_path), 0.5, 0).digest
    assert swapped == swap_texts(ProductFolder(tmp_path), 0.5, 0).digest != swap_texts(ProductFolder(tmp_path), 0.5, 1).digest
    rows = (tmp_path / "metadata.csv").read_text()
    (tmp_path / "3.jpg").write_bytes(saved(noise(seed=9), "PNG"))
    digests.add(ProductFolder(tmp_path).digest)
    (tmp_path / "metadata.csv").write_text(rows.replace("thing 1", "thing one"))
    digests.add(ProductFolder(tmp_path).digest)
    (tmp_path / "metadata.csv").write_text(rows.replace("thing 1,1", "thing 1,0"))
    digests.add(ProductFolder(tmp_path).digest)
    assert len(digests | {swapped}) == 5


def test_names_stay_below_the_folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    write_folder(root)
    (tmp_path / "secret.jpg").write_bytes(saved(noise(), "JPEG"))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "near.jpg").symlink_to(root / "0.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "a/../../secret.jpg", "near.jpg", "./1.jpg"]
    (root / "metadata.csv").write_text("file_name,text,label\n" + "".join(f"{name},a,0\n" for name in names))
    (tmp_path / "alias").symlink_to(root)
    for folder in (root, tmp_path / "alias"):
        data = ProductFolder(folder, image_size=8)
        assert data.file_names == ["near.jpg", "./1.jpg"]
        assert all("leads outside of the folder" in sentence for sentence in data.skipped) and len(data.skipped) == 4
