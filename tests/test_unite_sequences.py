"""Complete sequences in UNITE, against transformers' processor and model."""

import pytest
import torch
import transformers
from torch.testing import assert_close
from unite_items import (
    CODES,
    END,
    ITEMS,
    PICTURE,
    START,
    TOKENIZER,
    double,
    make_config,
    make_model,
    make_tokenizer,
    picture,
    processor_of,
    video,
)

from mmfused.models import UNITE, UNITEProcessor
from mmfused.models.qwen_export import save_host
from mmfused.training.gradients import add_cached_gradients, add_gradients

# --- the model ---


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_embeddings_agree_with_the_hosts_own_forward(positions):
    model = make_model(positions=positions)
    batch = processor_of(model)(ITEMS)
    rows = model.embed_sequences(**{name: double(value) for name, value in batch.items()})
    for i, item in enumerate(ITEMS):
        alone = {name: double(value) for name, value in processor_of(model)([item]).items()}
        ids = alone["input_ids"]
        pictures = {
            name: alone[name] for name in alone if name.startswith(("pixel", "image", "vid"))
        }
        if positions == "1d":
            pictures["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
        types = (ids == 5).int() + 2 * (ids == 6).int()
        model.host.rope_deltas = None
        states = model.host(input_ids=ids, mm_token_type_ids=types, **pictures).last_hidden_state
        expected = torch.nn.functional.normalize(states[0, -1], dim=-1)
        assert_close(rows[i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_sequences_embed_like_pictures_of_one_size(positions):
    model = make_model(positions=positions)
    texts = ["red mug.", "plate"]
    pixels = torch.stack([picture(seed=1), picture(seed=2)])
    items = [{"text": t, "image": p} for t, p in zip(texts, pixels, strict=True)]
    batch = processor_of(model, picture_tokens=(4, 4))(items)
    rows = model.embed_sequences(**{name: double(value) for name, value in batch.items()})
    enclosed = TOKENIZER(
        [model.config.format_text(text) for text in texts], padding=True, return_tensors="pt"
    )
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (model.config.pixel_mean, model.config.pixel_std)
    )
    normalised = ((pixels.float() / 255 - mean) / std).double()
    expected = model.embed(pixel_values=normalised, **enclosed)["both"]
    assert_close(rows, expected, rtol=0, atol=1e-6)


def test_the_output_of_transformers_own_processor_is_accepted():
    model = make_model()
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 16 * 64}}
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
        tokenizer=make_tokenizer(),
    )
    text = START + PICTURE.format("<|image_pad|>") + f"red.\nSummary above sentence and image{END}"
    theirs = processor(text=[text], images=[picture(16, 32)], return_tensors="pt")
    own = processor_of(model)([{"text": "red.", "image": picture(16, 32)}])
    assert_close(model.embed_sequences(**theirs), model.embed_sequences(**own))


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_padding_may_be_on_the_right(positions):
    model = make_model(positions=positions)
    batch = processor_of(model)(ITEMS)
    lengths = batch["attention_mask"].sum(1)
    moved = {name: torch.zeros_like(batch[name]) for name in ("input_ids", "attention_mask")}
    for name, rows in moved.items():
        for row, full, length in zip(rows, batch[name], lengths.tolist(), strict=True):
            row[:length] = full[len(full) - length :]
    rows = model.embed_sequences(**{**batch, **moved})
    assert_close(rows, model.embed_sequences(**batch), rtol=0, atol=1e-10)


def test_an_exported_processor_makes_the_same_sequences(tmp_path):
    model = make_model()
    save_host(model, TOKENIZER, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    middles = [f"{PICTURE.format('<|image_pad|>')}red.\nSummary above sentence and image"]
    middles.append("mug\nSummary above sentence")
    texts = [START + middle + END for middle in middles]
    image = picture(200, 90)
    theirs = processor(text=texts, images=[image], padding=True, return_tensors="pt")
    own = UNITEProcessor(TOKENIZER, model.config)(
        [{"text": "red.", "image": image}, {"text": "mug"}]
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(theirs[name], own[name]), name
    assert TOKENIZER("mug")["input_ids"][0] == TOKENIZER.cls_token_id  # it still encloses texts


def test_parts_of_a_batch_have_their_own_pictures():
    model, batch = make_model(), processor_of(make_model())(ITEMS)
    expected = model.embed_sequences(**batch)
    for size in (1, 2, 3, 7):
        parts = model.split(batch, size)
        assert [len(part["input_ids"]) for part in parts] == [
            min(size, 5 - start) for start in range(0, 5, size)
        ]
        rows = torch.cat([model.embed_sequences(**part) for part in parts])
        assert_close(rows, expected, rtol=0, atol=1e-6)
    text_only = model.split(batch, 1)[0]
    assert text_only["pixel_values"] is None and text_only["image_grid_thw"] is None


def test_training_takes_sequences():
    model, processor = make_model(stage=2).train(), processor_of(make_model())
    items = [{"text": f"item {i}"} for i in range(3)] + ITEMS[1:3]
    labels = torch.arange(5)
    parts = {
        role: {**{k: double(v) for k, v in processor(x).items()}, "labels": labels}
        for role, x in (("query", items), ("candidate", ITEMS))
    }
    loss, _ = add_gradients(model, [parts], 1)
    rows = {
        role: model.embed_sequences(**{k: v for k, v in part.items() if k != "labels"})
        for role, part in parts.items()
    }
    same = torch.tensor(CODES)[:, None] == torch.tensor(CODES)
    scores = (rows["query"] @ rows["candidate"].T / 0.03).masked_fill(~same, float("-inf"))
    assert_close(loss, torch.nn.functional.cross_entropy(scores, labels))
    assert any(p.grad.any() for p in model.host.visual.parameters())


def test_cached_gradients_of_sequences_equal_plain_ones():
    model, processor = make_model(stage=1).train(), processor_of(make_model())
    parts = {
        role: {**{k: double(v) for k, v in processor(x).items()}, "labels": torch.arange(5)}
        for role, x in (("query", ITEMS[::-1]), ("candidate", ITEMS))
    }
    gradients = []
    for step in (
        lambda: add_gradients(model, [parts], 1),
        lambda: add_cached_gradients(model, parts, 2),
    ):
        model.zero_grad()
        loss, _ = step()
        gradients.append([loss, *(p.grad.clone() for p in model.parameters())])
    for plain, cached in zip(*gradients, strict=True):
        assert_close(cached, plain, rtol=0, atol=1e-12 * (1 + plain.abs().max().item()))


def test_a_blank_item_has_the_arguments_of_the_others():
    """A rank without rows encodes it, to take part in the others' exchanges."""
    model = make_model().train()
    batch = {**processor_of(model)(ITEMS), "labels": torch.arange(5)}
    batch = {name: double(value) for name, value in batch.items()}
    encoded = model.encode("query", **model.blank_item(batch))
    assert encoded["embedding"].shape == (1, 32)
    encoded["embedding"].sum().backward()
    assert all(p.grad is not None for p in model.host.visual.parameters())


def test_text_only_candidates_have_the_code_of_texts():
    """Views that show nothing of an item are not drawn."""
    model = make_model()
    ids = TOKENIZER([f"mug {i}\n" for i in range(60)], padding=True, return_tensors="pt")
    encoded = model.encode(
        "candidate",
        pixel_values=torch.zeros(60, 3, 16, 16, dtype=torch.float64),
        image_present=torch.zeros(60, dtype=torch.bool),
        labels=torch.arange(60),
        **ids,
    )
    assert encoded["code"].tolist() == [1] * 60
    assert len(encoded["embedding"].unique(dim=0)) == 60


# --- refusals ---


def test_sequences_without_their_pictures_are_refused():
    model = make_model()
    batch = processor_of(model)([{"image": picture()}])
    without = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pixel_values: got pictures of 0 tokens, expected 4"):
        model.embed_sequences(**without)
    with pytest.raises(ValueError, match="image_grid_thw: got None with pixel_values, expected b"):
        model.embed_sequences(**without, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="pixel: got an unknown argument, expected pixel_values, "):
        model.embed_sequences(**without, pixel=batch["pixel_values"])
    with pytest.raises(ValueError, match="image_grid_thw: got complete sequences, expected code"):
        model.encode("query", labels=torch.arange(1), **{**batch, "code": None})


def test_labels_of_another_number_are_refused():
    model = make_model()
    batch = processor_of(model)([{"text": "red"}, {"text": "blue"}])
    with pytest.raises(ValueError, match=r"labels: got torch.int64 \(3,\), expected int64 \(2,\)"):
        model.encode("query", labels=torch.arange(3), **batch)


def test_arguments_that_contradict_complete_sequences_are_refused():
    model = make_model()
    batch = {**processor_of(model)([{"image": picture()}]), "labels": torch.arange(1)}
    for change, message in (
        ({"code": torch.arange(2)}, "code: got 2 rows, expected 1"),
        ({"image_present": torch.tensor([True])}, "image_present and code: got both, expected ex"),
        ({"image_tokens": torch.zeros(1, 4, 32)}, "image_tokens and code: got both, expected ex"),
        ({"pixel_values": batch["pixel_values"][:-1]}, r"pixel_values: got shape \(15, 96\), exp"),
        (
            {"pixel_values": batch["pixel_values"][:, 1:]},
            r"got shape \(16, 95\), expected \(16, 9",
        ),
        ({"image_grid_thw": batch["image_grid_thw"].float()}, "image_grid_thw: got torch.float32"),
        (
            {"image_grid_thw": batch["image_grid_thw"][:, 1:]},
            r"image_grid_thw: got .* \(1, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode("query", **{**batch, **change})


def test_videos_are_refused_with_qwen2_5():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
    host = {**make_config().host, "model_type": "qwen2_5_vl", "vision_config": vision}
    model = UNITE(make_config(host=host))
    batch = processor_of(model)([{"video": video()}])
    with pytest.raises(ValueError, match="pixel_values: got videos with model_type 'qwen2_5_vl'"):
        model.embed_sequences(**batch)


def test_the_chat_prompt_needs_its_tokens():
    tokens = {k: v for k, v in make_config().tokens.items() if k != "chat"}
    with pytest.raises(ValueError, match="tokens: got a dict without chat, expected the result of"):
        make_config(tokens=tokens)
