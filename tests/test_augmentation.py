"""The light augmentation, whose boxes are read off the pictures, and the names of the strengths."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode, functional

from mmfused.data import Collate, train_tokenizer
from mmfused.data.augment import LIGHT_TRIES, _light_box, augment

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


def test_a_light_box_follows_from_its_draws():
    """A box of 90 % of the area, with the ratio in the middle of the logarithms, in a corner."""
    middle = [0.0] * LIGHT_TRIES + [0.5] * LIGHT_TRIES  # sqrt(0.9) * 96 = 91.07
    assert _light_box(SIDE, SIDE, [*middle, 0.999, 0.0]) == (0, 5, 91, 91)
    assert _light_box(SIDE, SIDE, [*middle, 0.0, 0.999]) == (5, 0, 91, 91)


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


def test_light_crops_depend_on_the_generator_alone():
    images = PICTURE.expand(8, 3, SIDE, SIDE)
    assert torch.equal(light(images, 32), light(images, 32))
    assert not torch.equal(light(images, 32), light(images, 32, seed=1))


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
