from __future__ import annotations

import csv
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfused.data import GeneratedProducts, ProductFolder, swap_texts

GROCERY = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "grocery"
needs_grocery = pytest.mark.skipif(
    not GROCERY.is_dir(), reason="the grocery photos are not beside this checkout"
)


@pytest.fixture(scope="module")
def products():
    return GeneratedProducts("train", size=600)


def write_folder(root, rows, header=("file_name", "text", "label")):
    """Write a folder with photos 0.png to 3.png of different sizes and the given metadata rows."""
    for index, size in enumerate([(20, 10), (10, 20), (16, 16), (8, 8)]):
        Image.new("RGB", size, (60 * index, 10, 200)).save(root / f"{index}.png")
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return root


# Generated products


def test_generated_items_have_the_documented_types(products):
    item = products[0]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8
    assert (
        isinstance(item["image_present"], bool)
        and isinstance(item["text"], str)
        and isinstance(item["label"], int)
    )
    assert len(products) == len(products.texts) == len(products.labels) == 600
    assert products.num_classes == len(products.class_names) == 16 and products.skipped == []


def test_generated_set_is_reproducible_and_differs_between_splits_and_seeds(products):
    again = GeneratedProducts("train", size=600)
    assert again.texts == products.texts and again.labels == products.labels
    assert all(torch.equal(again[i]["image"], products[i]["image"]) for i in range(600))
    for other in (GeneratedProducts("val", size=600), GeneratedProducts("train", size=600, seed=1)):
        assert other.texts != products.texts and other.labels != products.labels
    larger = GeneratedProducts("train", size=600, image_size=64)
    assert larger.texts == products.texts and larger[0]["image"].shape == (3, 64, 64)


def test_generated_set_has_exact_numbers_of_missing_and_contradicting_rows():
    data = GeneratedProducts(
        "val", size=200, missing_text=0.1, missing_image=0.2, contradicting=0.3
    )
    flags = [data.attributes[name] for name in ("text_missing", "image_missing", "contradicts")]
    assert [int(flag.sum()) for flag in flags] == [20, 40, 60]
    assert np.stack(flags).sum(axis=0).max() == 1
    for row, (no_text, no_image, contradicts) in enumerate(zip(*flags, strict=True)):
        item = data[row]
        assert (item["text"] == "") == no_text
        assert item["image_present"] == (not no_image) and bool(item["image"].any()) == (
            not no_image
        )
        said, shown = data.attributes["said_shape"][row], data.attributes["shape"][row]
        assert (said != shown) if contradicts else (said in (-1, shown))


def test_generated_titles_match_the_attributes(products):
    from mmfused.data.generated import MATERIAL_WORDS, SHAPE_WORDS

    for row, text in enumerate(products.texts):
        words = set(text.lower().split())
        shape, material = (
            products.attributes["said_shape"][row],
            products.attributes["material"][row],
        )
        assert [bool(words & set(group)) for group in SHAPE_WORDS] == [
            kind == shape for kind in range(4)
        ]
        expected = [bool(text) and kind == material for kind in range(4)]
        assert [bool(words & set(group)) for group in MATERIAL_WORDS] == expected
        assert products.labels[row] == products.attributes["shape"][row] * 4 + material


def test_generated_classes_have_a_long_tail():
    counts = np.bincount(GeneratedProducts("train", size=8000, image_size=8).labels, minlength=16)
    assert counts.min() > 0 and counts.max() >= 6 * counts.min()


def best_accuracy(labels, *columns):
    """Return the accuracy of the best rule that predicts the label from these columns.

    The rule is fitted and evaluated on the same rows.
    """
    seen = defaultdict(Counter)
    for label, *key in zip(labels, *columns, strict=True):
        seen[tuple(key)][label] += 1
    return sum(max(counts.values()) for counts in seen.values()) / len(labels)


def test_image_and_text_together_beat_either_alone_by_fifteen_points():
    data = GeneratedProducts("train", size=20000, image_size=8)
    a = data.attributes
    # All columns that depend on the label; -1 if the modality is missing.
    shown = [np.where(a["image_missing"], -1, a[name]) for name in ("shape", "colour")]
    said = [np.where(a["text_missing"], -1, a["material"]), a["said_shape"], a["said_colour"]]
    image_only, text_only = best_accuracy(data.labels, *shown), best_accuracy(data.labels, *said)
    # With both, the material is read from the title. The shape is read from the picture, or from
    # the title if there is no picture.
    shape = np.where(a["image_missing"], a["said_shape"], a["shape"])
    both = best_accuracy(data.labels, shape, said[0])
    assert both >= max(image_only, text_only) + 0.15
    # Image or text alone is still much better than always guessing the largest class.
    assert min(image_only, text_only) > max(Counter(data.labels).values()) / len(data) + 0.15


def test_shape_is_visible_in_the_picture():
    """A nearest-mean classifier of foreground masks finds the shape of most products.

    Only unpatterned products of one size are used. Chance would give an accuracy of 0.25.
    """
    train, val = (
        GeneratedProducts(split, size=1500, missing_image=0.0) for split in ("train", "val")
    )

    def masks(data):
        rows = np.flatnonzero((data.attributes["size"] == 1) & (data.attributes["pattern"] == 0))
        images = torch.stack([data[row]["image"] for row in rows]).float()
        # Saturation distinguishes the coloured product from the pale background.
        return (images.amax(1) - images.amin(1) > 80).float().flatten(1), torch.tensor(
            data.attributes["shape"][rows]
        )

    (x, y), (x_val, y_val) = masks(train), masks(val)
    means = torch.stack([x[y == kind].mean(0) for kind in range(4)])
    assert (torch.cdist(x_val, means).argmin(1) == y_val).float().mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split: got 'test', expected 'train' or 'val'"),
        ({"size": 0}, r"size: got 0, expected an integer of at least 1"),
        ({"image_size": 4}, r"image_size: got 4, expected an integer of at least 8"),
        ({"seed": -1}, r"seed: got -1, expected an integer of at least 0"),
        ({"missing_text": 1.5}, r"missing_text: got 1.5, expected a number from 0 to 1"),
        ({"missing_text": 0.6, "missing_image": 0.6}, r"got a sum of 1.32, expected at most 1"),
    ],
)
def test_generated_products_reject_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GeneratedProducts(**arguments)


def test_arguments_of_the_wrong_type_raise_type_error(products):
    with pytest.raises(TypeError, match="size: got 2.5, expected an integer of at least 1"):
        GeneratedProducts(size=2.5)
    with pytest.raises(TypeError, match="fraction: got '0.3', expected a number from 0 to 1"):
        swap_texts(products, "0.3", 0)


# Product folders


def test_folder_reads_rows_with_missing_modalities(tmp_path):
    rows = [("0.png", "red tea", "2", "x"), ("", "no photo", "0", "x"), ("1.png", "", "1", "x")]
    data = ProductFolder(
        write_folder(tmp_path, rows, ("file_name", "text", "label", "extra")), image_size=6
    )
    assert (len(data), data.num_classes, data.class_names, data.skipped) == (3, 3, None, [])
    assert (data.texts, data.labels) == (["red tea", "no photo", ""], [2, 0, 1])
    assert [data[i]["image_present"] for i in range(3)] == [True, False, True]
    assert all(
        data[i]["image"].shape == (3, 6, 6) and data[i]["image"].dtype == torch.uint8
        for i in range(3)
    )
    assert not data[1]["image"].any() and data[2]["image"][:, 3, 3].tolist() == [60, 10, 200]


def test_folder_keeps_sizes_without_image_size(tmp_path):
    data = ProductFolder(
        write_folder(tmp_path, [("0.png", "a", 0), ("1.png", "b", 0), ("", "c", 0)])
    )
    assert [tuple(data[i]["image"].shape) for i in range(3)] == [
        (3, 10, 20),
        (3, 20, 10),
        (3, 10, 20),
    ]


def test_folder_resizes_the_short_side_and_crops_the_centre(tmp_path):
    write_folder(tmp_path, [("wide.png", "", 0)])
    picture = np.zeros((10, 30, 3), dtype=np.uint8)
    picture[:, 10:20] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    image = ProductFolder(tmp_path, image_size=5)[0]["image"]
    # The resize filter mixes in some black at the border of the crop. The mean of the whole picture
    # would be 85.
    assert image.shape == (3, 5, 5) and image.float().mean() > 235


def test_folder_converts_every_mode_to_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.tiff")
    data = ProductFolder(
        write_folder(tmp_path, [(f"{mode}.tiff", "", 0) for mode in ("L", "RGBA", "P", "CMYK")])
    )
    assert [tuple(data[i]["image"].shape) for i in range(4)] == [(3, 8, 8)] * 4


BROKEN_ROWS = [
    (
        ("0.png", "tea", "-1"),
        r"line 3 \(0.png\): label: got '-1', expected an integer from 0 to 2147483647",
    ),
    (
        ("0.png", "tea", "1.5"),
        r"line 3 \(0.png\): label: got '1.5', expected an integer from 0 to \d+",
    ),
    (("0.png", "tea", ""), r"line 3 \(0.png\): label: got '', expected an integer from 0 to \d+"),
    (
        ("0.png", "tea", "9" * 30),
        r"line 3 \(0.png\): label: got '999",
    ),
    (("0.png", "tea", "1_0"), r"got '1_0'"),
    (
        ("", " ", "0"),
        r"line 3 \(no file_name\): file_name and text are both empty, expected at least one",
    ),
    (
        ("gone.png", "tea", "0"),
        r"line 3 \(gone.png\): the image cannot be read: the file does not exist",
    ),
    (
        ("broken.png", "tea", "0"),
        r"line 3 \(broken.png\): the image cannot be read: it is not a picture in a supported",
    ),
    (("cut.jpg", "tea", "0"), r"line 3 \(cut.jpg\): the image cannot be read: .*truncated"),
    (
        ("0.png", "tea"),
        r"line 3 \(0.png\): it has 2 fields, but the header has 3; it may have an unquoted comma",
    ),
    (("0.png", "tea", "0", "more"), r"line 3 \(0.png\): it has 4 fields, but the header has 3"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN_ROWS)
def test_folder_skips_and_reports_a_broken_row(tmp_path, row, message):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    (tmp_path / "broken.png").write_text("not a picture")
    write_folder(tmp_path, [("0.png", "first", 0), row, ("1.png", "last", 1)])
    data = ProductFolder(tmp_path)
    assert data.texts == ["first", "last"] and data.labels == [0, 1] and data.num_classes == 2
    assert len(data.skipped) == 1
    with pytest.raises(ValueError, match=message) as caught:
        ProductFolder(tmp_path, strict=True)
    assert str(caught.value) == data.skipped[0] and "\n" not in data.skipped[0]


def test_folder_labels_must_be_below_num_classes(tmp_path):
    write_folder(tmp_path, [("0.png", "a", 4), ("1.png", "b", 5)])
    data = ProductFolder(tmp_path, num_classes=5)
    assert data.num_classes == 5 and data.labels == [4]
    assert data.skipped == [
        "metadata.csv line 3 (1.png): label: got '5', expected an integer from 0 to 4"
    ]
    with pytest.raises(
        ValueError, match="line 3 .* label: got '5', expected an integer from 0 to 4"
    ):
        ProductFolder(tmp_path, num_classes=5, strict=True)


def test_folder_reads_another_text_column_and_coarse_labels(tmp_path):
    header = ("file_name", "title", "text", "label", "coarse_label")
    rows = [
        ("0.png", "a mug", "long", 3, 1),
        ("1.png", "", "long", 4, 0),
        ("2.png", "a jar", "", 4, "x"),
    ]
    root = write_folder(tmp_path, rows, header)
    data = ProductFolder(root, text_column="title")
    assert (
        data.texts == ["a mug", ""]
        and data.coarse_labels == [1, 0]
        and data.file_names == ["0.png", "1.png"]
    )
    assert data.skipped == [
        "metadata.csv line 4 (2.png): coarse_label: got 'x', "
        "expected an integer from 0 to 2147483647"
    ]
    assert ProductFolder(root).texts == ["long", "long"]
    with pytest.raises(ValueError, match="expected a header line with file_name, name and label"):
        ProductFolder(root, text_column="name")
    (tmp_path / "plain").mkdir()
    assert (
        ProductFolder(write_folder(tmp_path / "plain", [("0.png", "a mug", 0)])).coarse_labels
        is None
    )


def test_folder_without_a_usable_row_raises(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no usable row in metadata.csv; the first row: metadata.csv line 2"
    ):
        ProductFolder(write_folder(tmp_path, [("0.png", "a", "-1")]))
    with pytest.raises(ValueError, match=r"has no usable row in metadata.csv$"):
        ProductFolder(write_folder(tmp_path, []))


def test_missing_folder_and_missing_metadata_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist, expected a folder with "):
        ProductFolder(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"got none of the known files, expected a folder with "):
        ProductFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            r"got a header line without file_name, text, label: nothing, expected a header",
        ),
        (b"file_name,label\n0.png,0\n", r"got a header line without text: file_name, label"),
        (
            b"file_name,text,label\n0.png,\xff\xfe,0\n",
            r"line 2 \(0.png\): it holds bytes that are not UTF-8",
        ),
        (
            b"file_name,text,label\n0.png," + b"a" * 200_000 + b",0\n",
            r"line 2 \(0.png\): it cannot be read: field larger than",
        ),
    ],
)
def test_unreadable_metadata_raises(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ProductFolder(tmp_path)


def test_folder_reads_metadata_with_a_byte_order_mark_and_quoted_line_breaks(tmp_path):
    write_folder(tmp_path, [])
    (tmp_path / "metadata.csv").write_text(
        'file_name,text,label\n0.png,"two\nlines, one text",0\n', encoding="utf-8-sig"
    )
    assert ProductFolder(tmp_path).texts == ["two\nlines, one text"]


@needs_grocery
def test_grocery_test_photos_load():
    data = ProductFolder(GROCERY / "test", strict=True)
    assert (len(data), data.num_classes, data[0]["image"].shape) == (486, 81, (3, 96, 96))


# Swapped texts


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_swap_gives_texts_of_other_labels_to_the_given_fraction_of_rows(products, fraction):
    swapped = swap_texts(products, fraction, seed=3)
    assert len(swapped.swapped) == len(set(swapped.swapped)) == round(fraction * 600)
    for row, donor in zip(swapped.swapped, swapped.donors, strict=True):
        assert products.labels[row] != products.labels[donor]
        assert swapped.texts[row] == swapped[row]["text"] == products.texts[donor] != ""
    kept = set(range(600)) - set(swapped.swapped)
    assert all(swapped.texts[row] == swapped[row]["text"] == products.texts[row] for row in kept)
    assert swapped.labels == products.labels and torch.equal(
        swapped[5]["image"], products[5]["image"]
    )


def test_swap_depends_on_the_seed_and_mixes_all_pairs_of_common_labels(products):
    swapped = swap_texts(products, 1.0, seed=3)
    assert (
        swapped.texts
        == swap_texts(products, 1.0, seed=3).texts
        != swap_texts(products, 1.0, seed=4).texts
    )
    pairs = {
        (products.labels[r], products.labels[d])
        for r, d in zip(swapped.swapped, swapped.donors, strict=True)
    }
    common = [label for label, count in Counter(products.labels).most_common(3)]
    assert all((a, b) in pairs for a in common for b in common if a != b)


def test_swap_needs_two_labels(tmp_path):
    data = ProductFolder(write_folder(tmp_path, [("0.png", "a", 1), ("1.png", "b", 1)]))
    with pytest.raises(
        ValueError,
        match="dataset: got only texts of label 1, expected texts of at least two labels",
    ):
        swap_texts(data, 0.5, 0)
    with pytest.raises(ValueError, match="fraction: got -0.1, expected a number from 0 to 1"):
        swap_texts(data, -0.1, 0)
