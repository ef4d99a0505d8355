"""FLUID against an independent transcription of its equations in float64, and other properties."""

import json
import sys

import pytest
import torch
from fluid_equations import transcription

import mmfused
from mmfused.models import FLUID, FLUIDConfig
from mmfused.models.fluid import COMPONENTS

SMALL = {
    "num_classes": 7,
    "dim": 12,
    "num_queries": 4,
    "num_heads": 3,
    "dropout": 0.0,
    "head_dropout": 0.0,
    "gate_hidden": (11, 8),
    "num_experts": 5,
    "expert_hidden": (14, 9),
    "image_dim": 10,
    "text_dim": 12,
}


def random_model(**options) -> FLUID:
    """Return a float64 model without encoders.

    All parameters are random, even those that are initialized to zeros or ones.
    """
    model = FLUID(FLUIDConfig(**{**SMALL, **options})).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        )
    return model


def token_batch(batch=6, image_tokens=9, text_tokens=7) -> dict:
    """Return precomputed tokens with texts of unequal lengths.

    Sample 1 has no image and sample 2 no text.
    """
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([7, 3, 0, 5, 1, 6])[:batch]
    return {
        "image_tokens": torch.randn(
            batch, image_tokens, 10, generator=generator, dtype=torch.float64
        ),
        "text_tokens": torch.randn(
            batch, text_tokens, 12, generator=generator, dtype=torch.float64
        ),
        "text_padding_mask": torch.arange(text_tokens) >= lengths[:, None],
        "image_present": torch.arange(batch) != 1,
        "labels": torch.randint(0, 7, (batch,), generator=generator),
    }


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


VARIANTS = [
    {},
    {"depth": 2, "balance": "gshard", "loss_weights": (0.5, 0.2, 0.3)},
    {"router": "linear", "top_k": 1, "gate_hidden": (6,), "temperature": 0.2},
    {
        "top_k": 3,
        "bottleneck_queries": 3,
        "balance_weight": 0.7,
        "z_weight": 0.05,
        "expert_hidden": (8,),
    },
    {"modalities": "image"},
    {"modalities": "text", "balance": "gshard"},
    {"text_mask": False, "text_length": 7, "depth": 2},
    *({"without": (name,)} for name in COMPONENTS),
    {"without": COMPONENTS},
    {"without": ("q_transform", "moe"), "modalities": "image"},
]


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "default"
)
def test_model_agrees_with_the_equations(options, backend):
    model, batch = random_model(**options), token_batch()
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    expected = transcription(leaves, batch, model.config)
    with mmfused.backend(backend):
        output = model(**batch)
        output.loss.backward()
    got = {"logits": output.logits, "loss": output.loss, "gate": output.gate, **output.losses}
    for name, value in expected.items():
        assert relative_error(got[name], value) < 1e-12, name
    gradients = torch.autograd.grad(expected["loss"], list(leaves.values()), allow_unused=True)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert (
            relative_error(
                parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient
            )
            < 1e-11
        ), name


def test_q_transform_agrees_with_multihead_attention():
    """With the same weights, pool and nn.MultiheadAttention have equal outputs.

    The transcription reads the projections by name, so it cannot reveal swapped names.
    """
    model, x = random_model(), token_batch()["text_tokens"]
    pool = model.text_transform.blocks[0].pool
    attention = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    projections = (pool.q_proj, pool.k_proj, pool.v_proj)
    attention.in_proj_weight.data = torch.cat(
        [projection.weight for projection in projections]
    ).detach()
    attention.in_proj_bias.data = torch.cat(
        [projection.bias for projection in projections]
    ).detach()
    attention.out_proj.load_state_dict(pool.out_proj.state_dict())
    queries = model.text_transform.queries.expand(len(x), -1, -1)
    assert relative_error(pool(x, None, queries), attention(queries, x, x)[0]) < 1e-12


def test_the_output_reports_the_routing():
    model, batch = random_model(top_k=3), token_batch()
    indices, weights = model(**batch).routing
    assert indices.shape == weights.shape == (6, 2, 3)
    assert torch.allclose(weights.sum(-1), torch.ones(6, 2, dtype=torch.float64))
    assert (weights.diff(dim=-1) <= 0).all()
    assert all(len(set(row.tolist())) == 3 for row in indices.flatten(0, 1))


# --- with the encoders ---


def tiny(**options) -> FLUID:
    torch.manual_seed(0)
    sizes = {
        "num_classes": 5,
        "vocab_size": 50,
        "dim": 48,
        "image_dim": 64,
        "text_dim": 48,
        "image": {"depth": 2},
    }
    return FLUID(FLUIDConfig.preset("tiny", **sizes, **options))


def pixel_batch(batch=8, length=10) -> dict:
    """Return pixels and token ids.

    Sample 1 has no image. The text of sample 2 has two tokens and counts as empty.
    """
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, length + 1, (batch,), generator=generator)
    lengths[2] = 2
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(0, 50, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "image_present": torch.arange(batch) != 1,
        "labels": torch.randint(0, 5, (batch,), generator=generator),
    }


@pytest.mark.parametrize("modalities", ["both", "image", "text"])
def test_every_parameter_gets_a_gradient(modalities):
    model, batch = tiny(modalities=modalities), pixel_batch()
    output = model(**batch)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key bias shifts all logits of a query equally, so softmax cancels it.
        assert parameter.grad.any() or name.endswith(("k_proj.bias", "key.bias")), name
    assert (output.gate is None) == (modalities != "both")
    assert (output.image_embedding is None) == (modalities == "text")
    assert (output.text_embedding is None) == (modalities == "image")
    if modalities != "both":
        assert output.losses["contrastive"].item() == 0
        other = "text" if modalities == "image" else "image"
        assert not any(name.startswith((other, "gate")) for name, _ in model.named_parameters())


def test_precomputed_tokens_give_the_same_output_as_the_encoders():
    model, batch = tiny().eval(), pixel_batch()
    expected = model(**batch)
    pixels, ids, mask = (
        batch.pop(name) for name in ("pixel_values", "input_ids", "attention_mask")
    )
    output = model(
        image_tokens=model.image_encoder.forward_features(pixels),
        text_tokens=model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state,
        text_padding_mask=mask == 0,
        text_present=mask.sum(1) > 2,
        **batch,
    )
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.losses, expected.losses)


def test_backends_agree():
    model, batch = tiny().double().eval(), pixel_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    results = {}
    for backend in ("reference", "composed"):
        model.zero_grad()
        with mmfused.backend(backend):
            loss = model(**batch).loss
            loss.backward()
        results[backend] = [
            loss.detach(),
            *(parameter.grad.clone() for parameter in model.parameters()),
        ]
    for a, b in zip(results["reference"], results["composed"], strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("image_dim", [10, 12])
def test_tokens_of_an_absent_image_do_not_affect_the_output(image_dim):
    model, batch = random_model(image_dim=image_dim), token_batch()
    batch["image_tokens"] = torch.randn(
        6, 9, image_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    expected = model(**batch)
    batch["image_tokens"][1] = float("nan")
    batch["text_tokens"][batch["text_padding_mask"]] = float("nan")
    output = model(**batch)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_absent_pixels_do_not_affect_the_loss():
    model, batch = tiny().eval(), pixel_batch()
    expected = model(**batch).loss
    batch["pixel_values"][1] = float("nan")
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_all_missing_texts_have_the_same_embedding():
    """A text is missing if it is only [CLS][SEP], has no real token, or has text_present=False."""
    model, batch = tiny().eval(), pixel_batch()
    batch["attention_mask"][3] = 0
    output = model(
        **batch, text_present=(batch["attention_mask"].sum(1) > 2) & (torch.arange(8) != 4)
    )
    assert torch.equal(output.text_embedding[2], output.text_embedding[3])
    assert torch.equal(output.text_embedding[2], output.text_embedding[4])
    assert not torch.allclose(output.text_embedding[2], output.text_embedding[5])
    derived = model(**batch)
    assert torch.equal(derived.text_embedding[2], derived.text_embedding[3])
    assert not torch.allclose(derived.text_embedding[2], derived.text_embedding[4])
    derived.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_samples_without_both_modalities_are_left_out_of_the_contrastive_loss():
    model, batch = random_model(), token_batch()
    complete = torch.tensor([0, 3, 4, 5])  # sample 1 has no image, and sample 2 has no text
    expected = model(**{name: value[complete] for name, value in batch.items()}).losses[
        "contrastive"
    ]
    assert relative_error(model(**batch).losses["contrastive"], expected) < 1e-12
    batch["image_present"] = torch.arange(6) == 0
    loss = model(**batch).losses["contrastive"]
    assert loss.item() == 0
    loss.backward()
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()
    )


def test_padding_of_texts_is_attended_to_only_without_the_text_mask():
    batch, changed = token_batch(), token_batch()
    changed["text_tokens"][changed["text_padding_mask"]] += 1
    for text_mask in (True, False):
        model = random_model(text_mask=text_mask)
        a, b = model(**batch).text_embedding, model(**changed).text_embedding
        same = (a == b).all(1)
        # Text 0 has no padding; text 2 has only padding, so it is missing with and without a mask.
        assert same.tolist() == (
            [True] * 6 if text_mask else [True, False, True, False, False, False]
        )


def test_more_padding_does_not_change_the_loss():
    model, batch = tiny().double().eval(), pixel_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    expected = model(**batch).loss
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 5))
    assert relative_error(model(**batch).loss, expected) < 1e-12


def test_without_labels_there_is_no_loss():
    model, batch = random_model(), token_batch()
    expected, labels = model(**batch).logits, batch.pop("labels")
    output = model(**batch)
    assert output.loss is None and output.losses == {} and len(labels) == len(output.logits)
    assert torch.equal(output.logits, expected)


def test_autocast_keeps_logits_and_losses_in_float32():
    model, batch = tiny().eval(), pixel_batch()
    expected = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    assert (
        output.logits.dtype
        == output.loss.dtype
        == output.losses["contrastive"].dtype
        == torch.float32
    )
    assert relative_error(output.loss, expected.loss) < 0.05


@pytest.mark.parametrize("modalities", ["both", "image", "text"])
def test_training_lowers_the_loss_and_is_reproducible(modalities):
    batch, runs = pixel_batch(batch=16), []
    for _ in range(2):
        model = tiny(modalities=modalities)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(20):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == runs[1]
    assert sum(runs[0][-3:]) < 0.75 * sum(runs[0][:3])


def test_query_std_is_the_standard_deviation_of_the_initial_queries():
    model = tiny(query_std=0.05)
    for transform in (model.image_transform, model.text_transform, model.bottleneck):
        assert 0.03 < transform.queries.std() < 0.07


def test_tiny_accepts_other_image_sizes():
    for image_size, patch_size in ((96, 16), (64, 8)):
        config = FLUIDConfig.preset(
            "tiny", num_classes=81, vocab_size=60, image_size=image_size, patch_size=patch_size
        )
        pixels, ids = torch.randn(2, 3, image_size, image_size), torch.arange(8).expand(2, -1)
        assert FLUID(config)(pixels, ids).logits.shape == (2, 81)


# --- configuration and errors ---


def test_config_round_trips_through_json():
    config = FLUIDConfig.preset(
        "tiny", num_classes=9, vocab_size=70, image_size=96, patch_size=16, top_k=1, ffn=32
    )
    copy = FLUIDConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert copy == config and isinstance(copy.gate_hidden, tuple)
    assert (
        copy.image["img_size"] == 96
        and copy.image["patch_size"] == 16
        and copy.text["vocab_size"] == 70
    )
    model, other = FLUID(config), FLUID(copy)
    other.load_state_dict(model.state_dict())


def test_preset_overrides_update_the_encoders():
    config = FLUIDConfig.preset("tiny", num_classes=9, image={"depth": 1}, text=None)
    untouched = FLUIDConfig.preset("tiny", num_classes=9)
    assert config.image == {**untouched.image, "depth": 1} and config.text is None
    assert untouched.image["depth"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": "audio"}, "modalities: got 'audio', expected one of both, image, text"),
        ({"balance": "none"}, "balance: got 'none', expected one of mse, gshard"),
        ({"router": "hash"}, "router: got 'hash', expected one of mlp, linear"),
        ({"num_heads": 5}, "num_heads: got 5, expected a divisor of dim=12"),
        ({"top_k": 6}, "top_k: got 6, expected at most num_experts=5"),
        ({"num_classes": 0}, "num_classes: got 0, expected an integer from 1 to 1000000"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        (
            {"loss_weights": (1.0, 1.0)},
            r"loss_weights: got \(1.0, 1.0\), expected 3 finite numbers",
        ),
        ({"pixel_std": (1.0,)}, r"pixel_std: got \(1.0,\), expected 3 finite numbers"),
        (
            {"without": ("gates",)},
            "without: got 'gates', expected some of contrastive, q_transform, gate, bottleneck",
        ),
        (
            {"without": ("gate",), "modalities": "text"},
            "without: got 'gate' with modalities 'text', which already excludes it",
        ),
    ],
)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FLUIDConfig(**{**SMALL, **options})


def test_an_unknown_preset_and_an_unknown_field_are_refused():
    with pytest.raises(ValueError, match="preset: got 'huge', expected one of paper, code, tiny"):
        FLUIDConfig.preset("huge", num_classes=2)
    with pytest.raises(
        ValueError, match="FLUIDConfig: got a field 'depht', expected num_classes, modalities, dim"
    ):
        FLUIDConfig.from_dict({"num_classes": 2, "depht": 1})
    with pytest.raises(
        ValueError, match="num_classes: got None with preset 'tiny', expected a number of classes"
    ):
        FLUIDConfig.preset("tiny")


IDS, PIXELS = torch.zeros(6, 7, dtype=torch.long), torch.zeros(6, 3, 32, 32)
NO_TEXT = {"text_tokens": None, "text_padding_mask": None}
TOKEN_ERRORS = [
    ({"image_tokens": None}, "pixel_values and image_tokens: got neither, expected exactly one"),
    ({"pixel_values": PIXELS}, "pixel_values and image_tokens: got both, expected exactly one"),
    (NO_TEXT, "input_ids and text_tokens: got neither, expected exactly one"),
    ({"input_ids": IDS}, "input_ids and text_tokens: got both, expected exactly one"),
    (
        {"attention_mask": torch.ones(6, 7)},
        "attention_mask: got a mask without input_ids",
    ),
    (
        {"image_tokens": torch.zeros(6, 9, 11)},
        r"image_tokens: got shape \(6, 9, 11\), expected \(batch, tokens, 10\)",
    ),
    (
        {"text_tokens": torch.zeros(6, 7, 3)},
        r"text_tokens: got shape \(6, 7, 3\), expected \(batch, tokens, 12\)",
    ),
    (
        {"text_padding_mask": torch.zeros(6, 7)},
        r"text_padding_mask: got torch.float32 .*, expected bool \(6, 7\)",
    ),
    (
        {"image_present": torch.ones(5, dtype=torch.bool)},
        r"image_present: got torch.bool \(5,\), expected bool \(6,\)",
    ),
    ({"text_present": torch.ones(6)}, r"text_present: got torch.float32 .*, expected bool \(6,\)"),
    (
        {"image_tokens": torch.zeros(5, 9, 10).double(), "image_present": None},
        "image and text: got batch sizes 5 and 6",
    ),
    ({"labels": torch.tensor([0, 1, 2, 3, 4, 7])}, r"labels: got .*, expected values in \[0, 6\]"),
    ({"labels": torch.tensor([0, 1, 2, 3, 4, -1])}, r"labels: got .*, expected values in \[0, 6\]"),
    ({"labels": torch.zeros(6)}, r"labels: got torch.float32 .*, expected int64 \(6,\)"),
    (
        {"image_tokens": None, "pixel_values": PIXELS},
        "with the config's image None, expected image_tokens",
    ),
    ({**NO_TEXT, "input_ids": IDS}, "with the config's text None, expected text_tokens"),
]


@pytest.mark.parametrize(("changes", "message"), TOKEN_ERRORS)
def test_bad_tokens_are_refused(changes, message):
    model, batch = random_model(), {**token_batch(), **changes}
    with pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pixel_values": torch.zeros(8, 3, 30, 32)},
            r"pixel_values: got shape \(8, 3, 30, 32\), expected \(batch, 3, 32, 32\)",
        ),
        (
            {"input_ids": torch.full((8, 10), 50)},
            r"input_ids: got .*, expected values in \[0, 49\]",
        ),
        (
            {"attention_mask": torch.ones(8, 9)},
            r"attention_mask: got shape \(8, 9\), expected \(8, 10\)",
        ),
        (
            {"input_ids": torch.zeros(8, 129, dtype=torch.long), "attention_mask": None},
            r"input_ids: got shape \(8, 129\), expected \(batch, at most 128 tokens\)",
        ),
    ],
)
def test_bad_pixels_and_ids_are_refused(changes, message):
    model, batch = tiny(), {**pixel_batch(), **changes}
    with pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize(
    ("module", "package"), [("timm.models", "timm"), ("transformers", "transformers")]
)
def test_the_error_names_a_missing_encoder_package(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{package} is not installed: pip install 'mmfused\[models\]'"
    ):
        tiny()
    # Without encoders, neither package is needed.
    assert FLUID(FLUIDConfig(**SMALL)).image_encoder is None
