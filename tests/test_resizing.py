"""Pictures that are cropped or stretched to squares; the oracles are Pillow and torchvision."""

import io

import numpy as np
import pytest
import torch
from picture_files import saved
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.v2 import functional

from mmfused.data import (
    Batches,
    Collate,
    GeneratedProducts,
    PairBatches,
    ProductFolder,
    load_picture,
    pictures,
    train_tokenizer,
)
from mmfused.data.batches import Items

MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
BRIGHT_ENDS = np.zeros((100, 400, 3), np.uint8)
BRIGHT_ENDS[:, :100] = BRIGHT_ENDS[:, 300:] = 255
TOKENIZER = train_tokenizer(["red mug", "blue plate"])


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def folder_of(path, *arrays):
    lines = ["file_name,text,label"]
    for row, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{row}.png")
        lines.append(f"{row}.png,thing,{row % 2}")
    (path / "metadata.csv").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("resample", MODES)
@pytest.mark.parametrize(
    ("height", "width", "size"), [(53, 121, 32), (90, 37, 48), (20, 31, 64), (24, 24, 24)]
)
def test_a_picture_file_is_resized_as_by_torchvision(height, width, size, resample):
    array = noise(height, width)
    image, data = Image.fromarray(array), saved(array, "PNG")
    stretched = Resize((size, size), MODES[resample])(image)
    found = load_picture(data, size, resize="stretch", resample=resample)
    assert torch.equal(found, as_tensor(stretched))
    side = min(height, width)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    cropped = image.resize((size, size), getattr(Image.Resampling, resample.upper()), box)
    assert torch.equal(load_picture(data, size, resample=resample), as_tensor(cropped))
    centre = CenterCrop(size)(Resize(size, MODES[resample])(image))
    found = load_picture(data, size, resize="shortest", resample=resample)
    assert torch.equal(found, as_tensor(centre))


def test_a_long_picture_is_refused_before_its_shorter_side_is_enlarged():
    data = saved(noise(1, 5000), "PNG")
    with pytest.raises(pictures.BrokenPicture, match="3920000 x 784 pixels to decode"):
        load_picture(data, 784, resize="shortest")
    assert load_picture(data, 784).shape == (3, 784, 784)


def test_the_whole_picture_is_seen_wherever_pictures_are_read(tmp_path):
    """Of a picture with bright ends, the stretched one is grey in the mean, the crop black."""
    folder = folder_of(tmp_path, *[BRIGHT_ENDS] * 3, BRIGHT_ENDS.transpose(1, 0, 2))
    for resize, mean in (("crop", 0), ("stretch", 127.5)):
        of_files = ProductFolder(folder, image_size=100, resize=resize)
        assert (of_files.images.double().mean((1, 2, 3)) - mean).abs().max() < 0.5
        of_sizes = ProductFolder(folder)  # of several sizes
        collate = Collate(TOKENIZER, 60, 8, resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
        batches = Batches(of_sizes, collate, 4, shuffle=False, drop_last=False)
        pairs = PairBatches(of_sizes, collate, 2, negatives=False)
        for pixels in (
            next(iter(batches))["pixel_values"],
            collate([of_sizes[row] for row in range(4)])["pixel_values"],
            collate([of_sizes[row] for row in range(3)])["pixel_values"],  # of one size
            next(pairs.stream())["candidate"]["pixel_values"],
        ):
            assert (255 * pixels.double().mean((1, 2, 3)) - mean).abs().max() < 1.5


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_resized_as_it_is_shown(orientation, resize):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    data = saved(noise(40, 96), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    left, top = [(side - 40) / 2 if resize == "crop" else 0 for side in upright.size]
    box = (left, top, upright.width - left, upright.height - top)
    expected = as_tensor(upright.resize((24, 24), Image.Resampling.BICUBIC, box)).int()
    # Pillow rounds between the two directions, whose order the turn changes.
    assert (load_picture(data, 24, resize=resize).int() - expected).abs().max() <= 1


def test_a_large_jpeg_is_stretched_from_a_reduced_size(monkeypatch):
    y, x = np.mgrid[0:603, 0:1601]
    photo = np.stack([x * 255 / 1600, y * 255 / 602, (x + y) * 255 / 2202], -1).astype(np.uint8)
    expected = as_tensor(Image.fromarray(photo).resize((64, 64))).int()
    decoded, to_rgb = [], pictures._to_rgb

    def watched(image, transparency):
        decoded.append(image.size)
        return to_rgb(image, transparency)

    monkeypatch.setattr(pictures, "_to_rgb", watched)
    found = load_picture(saved(photo, "JPEG", quality=95), 64, resize="stretch")
    # 1601 and 603 are no multiples of 4; the columns that fill up the last block are not shown.
    assert decoded == [(401, 151)] and (found.int() - expected).abs().max() <= 3


@pytest.mark.parametrize("resample", MODES)
def test_pictures_in_memory_are_resized_as_by_torchvision(resample):
    images = [as_tensor(noise(30, 53)), as_tensor(noise(20, 20)), as_tensor(noise(71, 18))]
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    items = [{"image": x, "image_present": True, "text": "", "label": 0} for x in images]
    collate = Collate(TOKENIZER, 24, 8, resize="stretch", resample=resample, **plain)
    found = collate(items)["pixel_values"]
    for image, pixels in zip(images, found, strict=True):
        expected = functional.resize(image, [24, 24], MODES[resample], antialias=True)
        assert torch.equal(pixels, expected.float() / 255)
    collate = Collate(TOKENIZER, 24, 8, resize="shortest", resample=resample, **plain)
    found = collate(items)["pixel_values"]
    for image, pixels in zip(images, found, strict=True):
        resized = functional.resize(image, [24], MODES[resample], antialias=True)
        assert torch.equal(pixels, functional.center_crop(resized, [24, 24]).float() / 255)


def test_square_pictures_are_the_same_cropped_and_stretched():
    products = GeneratedProducts(size=12, image_size=40)
    for size in (32, 40, 64):
        for strength in ("none", "light", "strong"):
            crop, stretch = (
                Items(products, Collate(TOKENIZER, size, 8, augment=strength, resize=resize))
                for resize in ("crop", "stretch")
            )
            # Augmentation starts from the stored pictures.
            assert stretch.images.shape[-1] == (size if strength == "none" else 40)
            pixels = [items.batch(torch.arange(12))["pixel_values"] for items in (crop, stretch)]
            assert torch.equal(*pixels)


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_a_stretched_picture_is_augmented_after_the_stretch(strength):
    """Its random boxes have the shapes of boxes in a square, not in the wide picture."""
    images = torch.stack([as_tensor(noise(24, 40))] * 6)
    present, stretched = torch.ones(6, dtype=torch.bool), functional.resize(images, [24, 24])
    found, expected = (
        Collate(TOKENIZER, 24, 8, augment=strength, resize="stretch").pixel_values(x, present)
        for x in (images, stretched)
    )
    assert torch.equal(found, expected) and not torch.equal(found[0], found[1])


def test_unknown_ways_of_resizing_are_refused_by_name(tmp_path):
    for arguments, message in (
        ({"resize": "pad"}, "resize: got 'pad', expected 'crop' or 'stretch' or 'shortest'"),
        ({"resample": 3}, "resample: got 3, expected 'bicubic' or 'bilinear'"),
    ):
        for call in (
            lambda options: load_picture(b"", 8, **options),
            lambda options: ProductFolder(tmp_path, **options),  # before metadata.csv is read
            lambda options: Collate(TOKENIZER, 8, 8, **options),
        ):
            with pytest.raises(ValueError) as caught:
                call(arguments)
            assert str(caught.value) == message
