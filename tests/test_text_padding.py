"""Padded text tokens that take part in FLUID and UniECS (presets "code").

The text encoder of transformers, called on ids padded by hand, is the oracle.
"""

import pytest
import torch
import torch.nn.functional as F

from mmfused.models import FLUID, FLUIDConfig, UniECS, UniECSConfig
from mmfused.models.text_padding import AFTER_PAD

LENGTH = 9
BERT = {
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,
}
TEXTS = {
    "bert": BERT,
    "another PAD": {**BERT, "pad_token_id": 7},
    "xlm-roberta": {**BERT, "model_type": "xlm-roberta", "pad_token_id": 3},
}
LENGTHS = torch.tensor([6, 4, 2, 5, 3])  # item 2 has [CLS] and [SEP] alone, so no text


def uniecs(text, **options) -> UniECS:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "image_dim": 6, "text_dim": 12, "text_length": LENGTH}
    config = UniECSConfig.preset("code", image=None, text=None, **{**sizes, **options})
    config = UniECSConfig.from_dict({**config.to_dict(), "text": text})
    return UniECS(config).double().eval()


def fluid(text, **options) -> FLUID:
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "dim": 12, "num_queries": 3, "num_heads": 2, "depth": 2}
    sizes |= {"gate_hidden": (6,), "expert_hidden": (8,), "image_dim": 6, "text_dim": 12}
    config = FLUIDConfig.preset(
        "code", image=None, text=None, **{**sizes, "text_length": LENGTH, **options}
    )
    config = FLUIDConfig.from_dict({**config.to_dict(), "text": text})
    return FLUID(config).double().eval()


MODELS = {"fluid": fluid, "uniecs": uniecs}


def items(pad: int, width: int = 6) -> dict:
    """Return image tokens, and texts padded to ``width`` with ids other than PAD."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 40, (5, 6), generator=generator)
    ids = F.pad(ids, (0, width - 6), value=9)
    mask = torch.arange(width) < LENGTHS[:, None]
    return {
        "image_tokens": torch.randn(5, 3, 6, dtype=torch.float64, generator=generator),
        "image_present": torch.arange(5) != 3,
        "input_ids": ids.where(mask, pad),
        "attention_mask": mask.long(),
    }


def encoded_by_hand(model, batch: dict, pad: int) -> dict:
    """Return the batch with the tokens of its texts, padded one by one to LENGTH."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = torch.full((1, LENGTH), pad)
        text[0, : mask.sum()] = ids[mask == 1]
        real = (torch.arange(LENGTH) < mask.sum()).long()[None]
        rows.append(model.text_encoder(input_ids=text, attention_mask=real).last_hidden_state[0])
    return {
        "image_tokens": batch["image_tokens"],
        "image_present": batch["image_present"],
        "text_tokens": torch.stack(rows),
        "text_padding_mask": torch.arange(LENGTH) >= LENGTHS[:, None],
        "text_present": LENGTHS > 2,
    }


def results(model, **batch) -> torch.Tensor:
    """Return what the model computes of each item, one row an item."""
    if isinstance(model, FLUID):
        return model(**batch).logits
    return torch.cat(list(model.embed(("image", "text", "both"), **batch).values()), 1)


def largest(a, b) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_texts_are_padded_to_text_length_before_the_encoder(name, text):
    model = MODELS[name](TEXTS[text])
    pad = model.text_encoder.config.pad_token_id
    expected = results(model, **encoded_by_hand(model, items(pad), pad))
    assert largest(results(model, **items(pad)), expected) < 1e-12
    # The padded rows take part: without a second text, they are all that differs.
    other = encoded_by_hand(model, items(pad), pad)
    other["text_tokens"] += other["text_padding_mask"][..., None]
    assert largest(results(model, **other)[0], expected[0]) > 1e-6


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_item_does_not_depend_on_its_batch_or_on_its_padding(name, text):
    model = MODELS[name](TEXTS[text])
    pad = model.text_encoder.config.pad_token_id
    together = results(model, **items(pad))
    # LENGTH is the most for FLUID. UniECS cuts longer texts, here only their padding.
    for width in (6, 8, LENGTH, *([12] if name == "uniecs" else [])):
        for filled in (pad, 5):  # the ids of padding do not count
            batch = items(filled, width)
            assert largest(results(model, **batch), together) < 1e-12
            for i in (0, 2):
                alone = {key: value[i : i + 1] for key, value in batch.items()}
                assert largest(results(model, **alone)[0], together[i]) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_missing_texts_are_equal_and_training_is_finite(name):
    model = MODELS[name](BERT)
    batch = items(0)
    batch["attention_mask"][0] = 0
    rows = model.embed(("text",), **batch)["text"] if name == "uniecs" else None
    if rows is None:
        output = model(**batch, labels=torch.arange(5))
        rows = output.text_embedding
    else:
        part = {**batch, "labels": torch.arange(5)}
        output = model(part, part)
    assert torch.equal(rows[0], rows[2]) and largest(rows[0], rows[1]) > 1e-3
    output.loss.backward()
    gradient = model.text_encoder.embeddings.position_embeddings.weight.grad
    assert gradient[LENGTH - 1].any() and not gradient[LENGTH].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_longer_text_is_cut_before_the_encoder_in_uniecs():
    model, batch = uniecs(BERT, text_length=4), items(0)
    cut = {**batch, "text_present": LENGTHS > 2}
    cut |= {name: batch[name][:, :4] for name in ("input_ids", "attention_mask")}
    assert largest(results(model, **batch), results(model, **cut)) < 1e-12


@torch.no_grad()
def test_given_tokens_are_padded_with_zeros_in_uniecs_and_refused_in_fluid():
    batch = encoded_by_hand(uniecs(BERT), items(0), 0)
    full, short = dict(batch), dict(batch)
    full["text_tokens"] = batch["text_tokens"] * (torch.arange(LENGTH) < 7)[:, None]
    for name in ("text_tokens", "text_padding_mask"):
        short[name] = batch[name][:, :7]
    model = uniecs(None)
    assert largest(results(model, **short), results(model, **full)) < 1e-12
    with pytest.raises(ValueError, match=r"text_tokens: got shape .*, expected text_length=9 tok"):
        fluid(None)(**short)
    assert fluid(None)(**full).logits.isfinite().all()


@torch.no_grad()
def test_a_saved_fluid_without_text_length_computes_as_before():
    values = fluid(BERT).config.to_dict()
    del values["text_length"]
    model, batch = FLUID(FLUIDConfig.from_dict(values)).double().eval(), items(0)
    tokens = model.text_encoder(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    given = {name: batch[name] for name in ("image_tokens", "image_present")}
    expected = model(**given, text_tokens=tokens, text_present=LENGTHS > 2).logits
    assert largest(model(**batch).logits, expected) < 1e-12


@torch.no_grad()
def test_saved_uniecs_without_text_padding_pads_with_zeros():
    values = uniecs(BERT).config.to_dict()
    del values["text_padding"]
    model, batch = UniECS(UniECSConfig.from_dict(values)).double().eval(), items(0)
    given = encoded_by_hand(model, batch, 0)
    given["text_tokens"][given["text_padding_mask"]] = 0
    assert largest(results(model, **batch), results(model, **given)) < 1e-12


@torch.no_grad()
def test_padding_with_zeros_cuts_a_longer_text_behind_the_encoder():
    model, batch = uniecs(BERT, text_padding="zeros", text_length=4), items(0)
    given = encoded_by_hand(model, batch, 0)
    for name in ("text_tokens", "text_padding_mask"):
        given[name] = given[name][:, :4]
    assert largest(results(model, **batch), results(model, **given)) < 1e-12


@pytest.mark.parametrize("build", [fluid, uniecs])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({**BERT, "max_position_embeddings": 8}, "text_length: got 9, expected at most 8, the num"),
        (
            {**TEXTS["xlm-roberta"], "max_position_embeddings": 12},
            "text_length: got 9, expected at most 8, the number of tokens that the text encoder re",
        ),
        ({**BERT, "pad_token_id": None}, "text.pad_token_id: got None, expected an id of PAD"),
        ({**BERT, "pad_token_id": -1}, "text.pad_token_id: got -1, expected an id of PAD from 0 t"),
        ({**BERT, "pad_token_id": 40}, "text.pad_token_id: got 40, expected an id of PAD from 0 t"),
    ],
)
def test_an_encoder_that_cannot_read_padded_texts_is_refused(build, text, message):
    with pytest.raises(ValueError, match=message):
        build(text)


def test_an_encoder_whose_positions_need_a_pad_is_refused_without():
    options = {"text_mask": True, "text_padding": "zeros", "text_length": None}
    assert uniecs({**BERT, "pad_token_id": None}, **options).text_encoder is not None
    with pytest.raises(ValueError, match="text.pad_token_id: got None, expected an id of PAD from"):
        uniecs({**TEXTS["xlm-roberta"], "pad_token_id": None}, **options)


def test_fluid_refuses_text_length_with_a_mask_and_longer_texts():
    with pytest.raises(ValueError, match="text_length: got 9 with text_mask, which leaves padded"):
        fluid(BERT, text_mask=True)
    batch = items(0, LENGTH + 1)
    with pytest.raises(
        ValueError, match=r"input_ids: got shape \(5, 10\), expected \(batch, at mo"
    ):
        fluid(BERT)(**batch)
    assert fluid(BERT, modalities="image")(**batch).logits.isfinite().all()


@pytest.mark.parametrize("pad", [1, 3])
@pytest.mark.parametrize("model_type", [*AFTER_PAD, "electra"])
def test_the_longest_text_is_the_longest_that_the_encoder_reads(model_type, pad):
    options = {**BERT, "model_type": model_type, "num_hidden_layers": 1, "pad_token_id": pad}
    model = uniecs(options, text_mask=True, text_padding="zeros", text_length=None)
    limit = {"electra": 16, "mpnet": 14}.get(model_type, 15 - pad)
    batch = {**items(pad, limit + 1), "attention_mask": None}
    with pytest.raises(ValueError, match=f"input_ids: got shape .*, at most {limit} tokens"):
        model.embed(**batch)
    batch["input_ids"] = batch["input_ids"][:, :limit]
    assert model.embed(**batch)["both"].isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):  # the encoder itself reads no more
        model.text_encoder(input_ids=torch.full((1, limit + 1), 9))
