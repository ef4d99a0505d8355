"""The augmentations, whose boxes and factors are read off the pictures."""

import colorsys
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode, functional

from mmfused.data import Collate, train_tokenizer
from mmfused.data.augment import augment, turn_hue

SIDE = 96
RAMP = torch.arange(SIDE, dtype=torch.float64).add(0.5) / SIDE * 250
# Red grows along the columns and green along the rows; blue is constant.
PICTURE = torch.full((3, SIDE, SIDE), 77, dtype=torch.uint8)
PICTURE[0], PICTURE[1] = RAMP.round(), RAMP.round()[:, None]
TOKENIZER = train_tokenizer(["red mug", "blue plate"])


def light(images, size, seed=0):
    return augment(images, size, torch.Generator().manual_seed(seed), "light").double() * 255


def interval(values):
    """Return the first and the last pixel that a line of a ramp shows, and one more."""
    inner = slice(8, SIDE - 8)  # next to its ends, the resized ramp bends
    where = (np.arange(SIDE) + 0.5)[inner] / SIDE
    slope, start = np.polyfit(where, values[inner] / 250 * SIDE, 1)
    return round(start), round(start + slope)


@pytest.fixture(scope="module")
def drawn():
    """Return augmented ramps, and the box (top, left, height, width) of each."""
    found = light(PICTURE.expand(300, 3, SIDE, SIDE), SIDE)
    boxes = []
    for picture in found:
        left, right = interval(picture[0].mean(0).numpy())
        top, bottom = interval(picture[1].mean(1).numpy())
        boxes.append((top, left, bottom - top, right - left))
    return found, boxes


def test_light_crops_are_torchvisions_crops_of_their_boxes(drawn):
    """Without flip, change of colours or erased rectangle."""
    image = Image.fromarray(PICTURE.permute(1, 2, 0).numpy())
    for picture, box in zip(*drawn, strict=True):
        expected = functional.resized_crop(image, *box, [SIDE, SIDE], InterpolationMode.BICUBIC)
        difference = picture - torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert difference.abs().max() <= 1.01 and (picture[2] - 77).abs().max() < 0.01


def test_light_boxes_have_the_areas_and_shapes_of_vistas(drawn):
    boxes = np.array(drawn[1])
    heights, widths = boxes[:, 2], boxes[:, 3]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= SIDE).all()
    areas, shapes = heights * widths / SIDE**2, widths / heights
    # Sides are rounded to pixels.
    assert areas.min() > 0.9 - 1 / SIDE and areas.max() <= 1
    assert shapes.min() > 3 / 4 and shapes.max() < 4 / 3
    assert (shapes > 1.03).any() and (shapes < 0.97).any()
    assert (boxes[:, 0] > 0).any() and (boxes[:, 1] > 0).any()


def test_light_boxes_are_distributed_as_torchvisions(drawn):
    torch.manual_seed(0)
    picture = torch.zeros(3, SIDE, SIDE)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, [0.9, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    )
    ours = np.array(drawn[1])
    for of in (
        lambda boxes: boxes[:, 2] * boxes[:, 3] == SIDE**2,  # no box was drawn in ten attempts
        lambda boxes: boxes[:, 2] * boxes[:, 3] / SIDE**2,
        lambda boxes: abs(np.log(boxes[:, 3] / boxes[:, 2])),
        lambda boxes: boxes[:, 0] / SIDE,
        lambda boxes: boxes[:, 1] / SIDE,
    ):
        expected = of(theirs).astype(float)
        error = expected.std() / np.sqrt(len(ours))
        assert abs(of(ours).mean() - expected.mean()) < 4 * error


def test_light_crops_of_wide_pictures_are_central_boxes_of_the_widest_shape():
    """No box of 90 % of the area of such a picture has an allowed shape."""
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 60, 100), np.uint8))
    for image, (height, width) in ((picture, (60, 80)), (picture.mT, (80, 60))):
        expected = functional.resize(
            functional.center_crop(image, [height, width]),
            [32, 32],
            InterpolationMode.BICUBIC,
            antialias=True,
        )
        assert (light(image[None], 32)[0] - expected).abs().max() < 0.01


# Both strengths


def photos(count, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Smooth, so that no grey level is rounded alike everywhere.
    coarse = torch.rand(count, 3, 5, 4, generator=generator)
    large = functional.resize(coarse, [rows, columns], antialias=True)
    return (large * 255).round().byte()


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_a_batch_gives_the_images_of_its_parts_in_turn(strength):
    images = photos(12, 61, 53)
    whole = augment(images, 37, torch.Generator().manual_seed(3), strength)
    assert whole.shape == (12, 3, 37, 37) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    generator = torch.Generator().manual_seed(3)
    parts = [augment(part, 37, generator, strength) for part in images.split([1, 4, 0, 7])]
    assert torch.equal(torch.cat(parts), whole)
    other = augment(images, 37, torch.Generator().manual_seed(4), strength)
    assert not torch.equal(other, whole)
    same = augment(images[:1].expand(12, -1, -1, -1), 37, generator, strength)
    assert len({image.numpy().tobytes() for image in same}) > 6  # no box of some draws fits


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_augmentation_neither_reads_nor_moves_the_global_generator(strength):
    """Nor Python's and numpy's, whose states are compared too."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        found.append(augment(photos(9, 40, 40), 24, torch.Generator().manual_seed(5), strength))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert torch.equal(*found)


def test_other_numbers_of_threads_change_no_more_than_the_last_bits():
    """At a size at which torch splits an image over the threads."""
    images, threads = photos(6, 230, 250), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(augment(images, 233, torch.Generator().manual_seed(0)))
    finally:
        torch.set_num_threads(threads)
    assert (found[0] - found[1]).abs().max() < 1e-6 and (found[0] - found[2]).abs().max() < 1e-6


def test_threads_augment_side_by_side():
    images = photos(6, 40, 40)

    def augmented(seed):
        return augment(images, 32, torch.Generator().manual_seed(seed))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(augmented, range(12)))
    assert all(torch.equal(result, augmented(seed)) for seed, result in enumerate(together))


# The strong augmentation


def strong(images, size, monkeypatch, **settings):
    """Return images after some of the changes; the others are off."""
    off = {name: 0.0 for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE")}
    off |= {"CROP_AREA": (1.0, 1.0), "CROP_RATIO": (1.0, 1.0), "ERASE_PROBABILITY": 0.0}
    for name, value in {**off, **settings}.items():
        monkeypatch.setattr(f"mmfused.data.augment.{name}", value)
    return augment(images, size, torch.Generator().manual_seed(0))


def test_strong_crops_have_the_areas_shapes_and_flips(monkeypatch):
    found = strong(
        PICTURE.expand(300, 3, SIDE, SIDE),
        SIDE,
        monkeypatch,
        CROP_AREA=(0.5, 1.0),
        CROP_RATIO=(3 / 4, 4 / 3),
    )
    flipped = found[:, 0, :, 0].mean(1) > found[:, 0, :, -1].mean(1)
    assert 0.42 < flipped.float().mean() < 0.58
    upright = torch.where(flipped[:, None, None, None], found.flip(-1), found).double() * 255
    boxes = np.array(
        [
            (*interval(image[1].mean(1).numpy()), *interval(image[0].mean(0).numpy()))
            for image in upright
        ]
    )
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    areas, shapes = heights * widths / SIDE**2, widths / heights
    assert 0.5 - 2 / SIDE < areas.min() < 0.53 and 0.95 < areas.max() <= 1
    assert 0.74 < shapes.min() < 0.8 and 1.25 < shapes.max() < 1.35
    # A large box of another shape than the picture does not fit, and is drawn again.
    assert 0.65 < areas.mean() < 0.75
    assert boxes.min() >= 0 and boxes.max() <= SIDE and boxes[:, [0, 2]].max() > 20


def test_the_colours_change_as_far_as_they_say(monkeypatch):
    """Two halves, of which the mean, the difference and the chroma are read off."""
    images = torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    images[:, :, :, :4], images[:, :, :, 4:] = 100, 140
    mean = strong(images, 8, monkeypatch, BRIGHTNESS=0.3).mean((1, 2, 3)) * 255 / 120
    assert 0.7 <= mean.min() < 0.72 and 1.28 < mean.max() <= 1.3 and abs(mean.mean() - 1) < 0.03
    found = strong(images, 8, monkeypatch, CONTRAST=0.3) * 255
    assert (found.mean((1, 2, 3)) - 120).abs().max() < 0.02
    contrast = (found[..., 0] - found[..., -1]).mean((1, 2)).abs() / 40
    assert 0.7 <= contrast.min() < 0.72 and 1.28 < contrast.max() <= 1.3
    assert abs(contrast.mean() - 1) < 0.03
    images = torch.tensor([120, 100, 80], dtype=torch.uint8)[:, None, None].expand(400, 3, 8, 8)
    found = strong(images, 8, monkeypatch, SATURATION=0.2).mean((2, 3)) * 255
    saturation = (found[:, 0] - found[:, 2]) / 40
    assert 0.8 <= saturation.min() < 0.81 and 1.19 < saturation.max() <= 1.2
    found = strong(images, 8, monkeypatch, HUE=0.015).mean((2, 3))
    hue = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in found.tolist()]) - 1 / 12
    # The hue of HSV is not the angle about the grey axis, but near it.
    assert 0.012 < hue.max() < 0.018 and -0.018 < hue.min() < -0.012 and abs(hue.mean()) < 0.001


def test_a_third_of_a_turn_exchanges_the_colours():
    image = photos(1, 7, 5)[0] / 255
    assert torch.allclose(turn_hue(image, 1 / 3), image.roll(1, 0), atol=1e-6)
    assert torch.allclose(turn_hue(image, -1 / 3), image.roll(-1, 0), atol=1e-6)
    inner = 0.4 + image / 5  # nothing is clamped
    assert torch.allclose(turn_hue(turn_hue(inner, 0.1), -0.1), inner, atol=1e-6)
    assert torch.allclose(turn_hue(inner, 0.1).mean(0), inner.mean(0), atol=1e-6)
    assert turn_hue(torch.eye(3)[:, :, None], 0.1).min() == 0


def test_erased_rectangles_are_grey_and_within_their_sizes(monkeypatch):
    images = torch.zeros(600, 3, 50, 50, dtype=torch.uint8)
    found = strong(images, 50, monkeypatch, ERASE_PROBABILITY=0.1)
    assert set(found.unique().tolist()) == {0.0, 0.5}
    erased = found[:, 0] > 0
    assert (erased == (found[:, 1] > 0)).all() and (erased == (found[:, 2] > 0)).all()
    areas = erased.float().mean((1, 2))
    some = areas > 0
    assert 0.07 < some.float().mean() < 0.13
    heights, widths = erased.any(2).sum(1)[some], erased.any(1).sum(1)[some]
    assert torch.equal(heights * widths, erased.sum((1, 2))[some])  # rectangles
    assert 0.015 < areas[some].min() < 0.04 and 0.17 < areas[some].max() < 0.21
    shapes = widths / heights
    assert 0.35 < shapes.min() < 0.6 and 1.8 < shapes.max() < 2.8


def test_the_names_of_the_strengths():
    """True and False are the names of earlier versions."""
    images, present = PICTURE[None], torch.ones(1, dtype=torch.bool)

    def pixels(augment):
        plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
        collate = Collate(TOKENIZER, 32, 8, augment=augment, **plain)
        return collate.pixel_values(images, present, torch.Generator().manual_seed(0))

    def augmented(*strength):
        return augment(images, 32, torch.Generator().manual_seed(0), *strength)

    assert torch.equal(pixels("strong"), augmented()) and torch.equal(pixels(True), augmented())
    assert torch.equal(pixels("strong"), augmented("strong"))
    assert torch.equal(pixels("light"), augmented("light"))
    assert torch.equal(pixels("none"), pixels(False))
    assert not torch.equal(pixels("none"), pixels("light"))
    with pytest.raises(
        ValueError, match=r"^augment: got 'hard', expected 'none' or 'light' or 'strong'$"
    ):
        pixels("hard")
    with pytest.raises(ValueError, match="^strength: got 'none', expected 'light' or 'strong'$"):
        augmented("none")
