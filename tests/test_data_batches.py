from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from mmfused.data import (
    Batches,
    Collate,
    GeneratedProducts,
    ProductFolder,
    load_tokenizer,
    train_tokenizer,
)
from mmfused.data.augment import augment


@pytest.fixture(scope="module")
def products():
    return GeneratedProducts("train", size=600)


@pytest.fixture(scope="module")
def tokenizer(products):
    return train_tokenizer(products.texts, vocab_size=400)


# Tokenizers


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_tokenizer_round_trip(tmp_path, products, kind):
    tokenizer = train_tokenizer(products.texts, vocab_size=500, kind=kind)
    assert len(tokenizer) <= 500 and tokenizer.pad_token_id == 0
    text = next(filter(None, products.texts))
    ids = tokenizer(text.upper())["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert tokenizer("")["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert tokenizer.unk_token_id is not None and tokenizer.mask_token_id is not None
    assert (
        train_tokenizer(products.texts, vocab_size=500, kind=kind).get_vocab()
        == tokenizer.get_vocab()
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded(products.texts)["input_ids"] == tokenizer(products.texts)["input_ids"]
    assert loaded.pad_token_id == 0 and loaded("")["input_ids"] == tokenizer("")["input_ids"]


def test_generated_titles_fit_sixteen_tokens(products, tokenizer):
    assert max(map(len, tokenizer(products.texts)["input_ids"])) <= 16


def test_train_tokenizer_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="kind: got 'unigram', expected 'wordpiece' or 'bpe'"):
        train_tokenizer(["a"], kind="unigram")
    with pytest.raises(ValueError, match="vocab_size: got 3, expected an integer of at least 6"):
        train_tokenizer(["a"], vocab_size=3)
    with pytest.raises(ValueError, match="texts: got no non-empty text, expected at least one"):
        train_tokenizer(["", ""])
    with pytest.raises(TypeError, match="texts: got a string, expected a list of strings"):
        train_tokenizer("tea")


def test_load_tokenizer_raises_without_a_readable_tokenizer(tmp_path, monkeypatch):
    expected = "folder_or_hub_name: got .*, expected a tokenizer folder or a hub name"
    with pytest.raises(
        ValueError, match=r"got '.*gone', expected a tokenizer folder or a hub name$"
    ):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(ValueError, match=expected + ": the folder has no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(
        ValueError, match=expected + ": the folder has no readable tokenizer"
    ) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)

    def offline(name, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(
        ValueError,
        match=expected + r": it is not a folder and not available from the hub \(no network\)",
    ):
        load_tokenizer("some/name")


# Collation, augmentation, batches


def test_collate_shapes_and_missing_modalities(products, tokenizer):
    items = [products[row] for row in range(8)]
    items[0] = {**items[0], "text": "", "image_present": True}
    items[1] = {**items[1], "image_present": False}
    for augmented in (False, True):
        batch = Collate(tokenizer, 24, 12, augment=augmented)(items)
        assert (
            batch["pixel_values"].shape == (8, 3, 24, 24)
            and batch["pixel_values"].dtype == torch.float32
        )
        assert batch["image_present"].dtype == torch.bool and not batch["image_present"][1]
        assert not batch["pixel_values"][1].any() and batch["pixel_values"][0].any()
        length = batch["input_ids"].shape[1]
        assert (
            length <= 12
            and batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        )
        assert batch["input_ids"][0, :2].tolist() == [
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
        ]
        assert batch["attention_mask"][0].tolist() == [1, 1] + [0] * (length - 2)
        assert (
            batch["labels"].tolist() == products.labels[:8] and batch["labels"].dtype == torch.int64
        )


def test_collate_truncates_and_normalises(products, tokenizer):
    item = {
        "image": torch.full((3, 10, 20), 255, dtype=torch.uint8),
        "image_present": True,
        "label": 3,
    }
    collate = Collate(tokenizer, 10, 5, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    batch = collate([{**item, "text": "blue wool cushion " * 9}])
    assert (
        batch["input_ids"].shape == (1, 5) and batch["input_ids"][0, -1] == tokenizer.sep_token_id
    )
    assert batch["pixel_values"][0].mean(dim=(1, 2)).tolist() == [1.0, 3.0, 0.5]


def test_collate_accepts_images_of_different_sizes(tokenizer):
    shapes = [(3, 10, 40), (3, 64, 64), (3, 8, 8)]
    items = [
        {"image": torch.zeros(s, dtype=torch.uint8), "image_present": True, "text": "x", "label": 0}
        for s in shapes
    ]
    assert Collate(tokenizer, 16, 8, augment=True)(items)["pixel_values"].shape == (3, 3, 16, 16)


def test_collate_rejects_invalid_arguments(tokenizer):
    with pytest.raises(ValueError, match="image_size: got 0, expected an integer of at least 1"):
        Collate(tokenizer, 0, 8)
    with pytest.raises(ValueError, match="max_length: got 1, expected an integer of at least 2"):
        Collate(tokenizer, 8, 1)
    with pytest.raises(
        ValueError, match=r"mean and std: got .* \(1, 0, 1\), expected 3 numbers each, std above 0"
    ):
        Collate(tokenizer, 8, 8, std=(1, 0, 1))


def test_augmentation_depends_only_on_seed_and_epoch(products, tokenizer):
    def epochs(seed, disturb=False):
        collate = Collate(tokenizer, 32, 16, augment=True, seed=seed)
        batches = Batches(products, collate, 100, shuffle=True, seed=1, drop_last=True)
        out = []
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            for batch in batches:
                out.append(batch["pixel_values"])
                if disturb:
                    torch.rand(7), np.random.rand(3), collate([products[0]])
        return torch.stack(out).unflatten(0, (3, -1))

    first = epochs(0)
    assert torch.equal(first, epochs(0, disturb=True)) and torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, epochs(5))


def test_collate_set_epoch_repeats_the_augmentation(products, tokenizer):
    collate = Collate(tokenizer, 32, 16, augment=True)
    items = [products[row] for row in range(4)]
    collate.set_epoch(2)
    first, second = (collate(items)["pixel_values"] for _ in range(2))
    collate.set_epoch(2)
    assert torch.equal(collate(items)["pixel_values"], first) and not torch.equal(first, second)


def test_augmentation_crops_flips_recolours_and_erases():
    ramp = torch.linspace(0, 200, 48).expand(3, 48, 48).byte()
    out = augment(ramp.expand(400, 3, 48, 48), 48, torch.Generator().manual_seed(0))
    assert out.shape == (400, 3, 48, 48) and out.min() >= 0 and out.max() <= 1
    # ERASE_PROBABILITY is 0.1.
    erased = (out == 0.5).all(dim=1).flatten(1).float().mean(1)
    assert 0.07 < (erased > 0.01).float().mean() < 0.13 and erased.max() < 0.25
    intact = out[erased < 0.01]
    slope = intact[..., -1].mean((1, 2)) - intact[..., 0].mean((1, 2))
    assert 0.4 < (slope < 0).float().mean() < 0.6
    assert slope.abs().min() < 0.5 < slope.abs().max()
    # Changes of hue and saturation keep a grey picture grey and change the colour of a red picture.
    assert torch.allclose(intact[:, 0], intact[:, 1], atol=1e-3)
    red = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 150
    assert augment(red, 8, torch.Generator().manual_seed(0)).mean((2, 3)).std(0).min() > 0.01


def test_augmentation_of_strength_zero_only_flips(monkeypatch):
    import mmfused.data.augment as module

    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "ERASE_PROBABILITY"):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(module, "CROP_AREA", (1.0, 1.0))
    monkeypatch.setattr(module, "CROP_RATIO", (1.0, 1.0))
    images = torch.randint(
        0, 256, (16, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    out = (augment(images, 20, torch.Generator().manual_seed(0)) * 255).round().byte()
    flipped = [torch.equal(o, i.flip(-1)) for o, i in zip(out, images, strict=True)]
    same = [torch.equal(o, i) for o, i in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True)) and any(flipped) and any(same)


def test_augmentation_is_fast():
    images = torch.zeros(64, 3, 96, 96, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(7):
        start = time.process_time()  # CPU time of all threads of this process
        augment(images, 96, generator)
        samples.append(time.process_time() - start)
    # Usually about 45 ms on one core.
    assert min(samples) < 0.25


def test_batches_cover_the_dataset(products, tokenizer):
    collate = Collate(tokenizer, 32, 16)
    batches = Batches(products, collate, 64, shuffle=False, seed=0, drop_last=False)
    assert len(batches) == len(list(batches)) == 10
    joined = torch.cat([batch["labels"] for batch in batches])
    assert joined.tolist() == products.labels
    expected = collate([products[row] for row in range(64)])
    for key, value in next(iter(batches)).items():
        assert torch.equal(value, expected[key]), key
    assert len(Batches(products, collate, 64, shuffle=False, seed=0, drop_last=True)) == 9


def test_batches_reshuffle_by_epoch(products, tokenizer):
    batches = Batches(
        products, Collate(tokenizer, 32, 16), 64, shuffle=True, seed=0, drop_last=False
    )

    def order(epoch):
        batches.set_epoch(epoch)
        return torch.cat([batch["labels"] for batch in batches]).tolist()

    zero, one = order(0), order(1)
    assert zero != one != products.labels and zero == order(0)
    assert sorted(zero) == sorted(one) == sorted(products.labels)


def test_batches_accept_photos_of_different_sizes_and_missing_photos(tmp_path, tokenizer):
    for index, size in enumerate([(20, 10), (10, 20), (16, 16), (8, 8)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{index}.png")
    rows = "0.png,tea,0\n1.png,tea,1\n2.png,,2\n3.png,tea,3\n,tea,0\n"
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n" + rows)
    data = ProductFolder(tmp_path)
    batch = next(
        iter(Batches(data, Collate(tokenizer, 12, 8), 5, shuffle=False, seed=0, drop_last=False))
    )
    assert batch["pixel_values"].shape == (5, 3, 12, 12)
    assert (
        batch["image_present"].tolist() == [True] * 4 + [False]
        and not batch["pixel_values"][4].any()
    )


def test_batches_reject_invalid_batch_sizes(products, tokenizer):
    with pytest.raises(
        ValueError,
        match="dataset: got 600 rows for a batch_size of 601, expected at least 601",
    ):
        Batches(products, Collate(tokenizer, 32, 16), 601, shuffle=False, seed=0, drop_last=True)
    with pytest.raises(ValueError, match="batch_size: got 0, expected an integer of at least 1"):
        Batches(products, Collate(tokenizer, 32, 16), 0, shuffle=False, seed=0, drop_last=True)
