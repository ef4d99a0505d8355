"""The same products give the same batches in every format, streamed and in memory."""

import json

import pytest
import torch
from format_folders import WRITERS, make_products, write_pictures

from mmfused.data import Batches, Collate, PairBatches, ProductFolder, open_pairs, train_tokenizer
from mmfused.data.items import make_items

PRODUCTS = make_products(23, size=30)
FORMATS = [name for name in WRITERS if name != "glami"]  # its labels are ids of categories


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The library datasets copies Parquet files here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def collate():
    texts = [product.text for product in PRODUCTS if product.text]
    return Collate(train_tokenizer(texts), 24, 16, augment="strong", seed=3)


def batches_of(products, collate):
    batches = Batches(
        products, collate, 5, shuffle=True, seed=1, drop_last=False, spread=True, workers=2
    )
    pairs = PairBatches(products, collate, 4, seed=2, workers=2)
    found = list(batches)
    for index in range(len(pairs)):
        found += pairs.batch(0, index).values()
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory, collate):
    folder = WRITERS["csv"](tmp_path_factory.mktemp("csv"), PRODUCTS)
    return batches_of(ProductFolder(folder, image_size=24, stream=False), collate)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in memory"])
@pytest.mark.parametrize("name", FORMATS)
def test_batches_are_equal_in_all_formats(tmp_path, collate, expected, name, stream):
    folder = WRITERS[name](tmp_path / "set", PRODUCTS)
    products = ProductFolder(folder, image_size=24, stream=stream)
    assert not products.skipped and products.streamed == stream
    found = batches_of(products, collate)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert sum(batch["image_present"].sum() for batch in found) > 40


def test_items_of_pairs_are_those_of_products(tmp_path, collate):
    """M-BEER's rows of two items, against a folder of the same pictures and texts."""
    folder = WRITERS["csv"](tmp_path, PRODUCTS)
    names = write_pictures(folder, PRODUCTS)
    whole = [row for row, product in enumerate(PRODUCTS) if names[row] and product.text]
    rows = []
    for first, second in zip(whole[::2], whole[1::2], strict=False):
        row = {"tag": 1}
        for number, item in ((1, first), (2, second)):
            row |= {f"item_id_{number}": item, f"item_title_{number}": PRODUCTS[item].text}
            row[f"item_image_{number}"] = names[item]
        rows.append(row)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    pairs = open_pairs(folder / "pairs.jsonl")
    assert len(pairs) == len(rows) > 5 and not pairs.skipped
    products = ProductFolder(folder, image_size=24, stream=True, resample="bilinear")
    mine = torch.tensor([list(pairs.items.texts).index(PRODUCTS[row].text) for row in whole[:2]])
    assert mine.tolist() == [0, 1]
    found = make_items(pairs.items, collate).batch(mine, torch.Generator().manual_seed(1))
    other = make_items(products, collate).batch(
        torch.tensor(whole[:2]), torch.Generator().manual_seed(1)
    )
    for key in ("pixel_values", "image_present", "input_ids", "attention_mask"):
        assert torch.equal(found[key], other[key]), key
