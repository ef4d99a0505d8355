"""UniCA against an independent transcription of its equations in float64, and other properties."""

import json

import pytest
import torch
from retrieval_models import device_for
from unica_equations import (
    BERT,
    SMALL,
    XLM_R,
    random_model,
    relative_error,
    token_batch,
    token_part,
    transcription,
    without_labels,
)

import mmfused
from mmfused.models.unica import COMPONENTS, UniCA, UniCAConfig
from mmfused.training.gradients import to_device

VIEWS = ("image", "text", "both")
VARIANTS = [
    {},
    {"blocks": 2, "share_weights": True, "positive_weight": 0.3},
    {
        "bica_norm": "pre",
        "blocks": 2,
        "temperature": 0.05,
        "text": {**BERT, "num_hidden_layers": 2},
    },
    {"bica_norm": "pre", "without": ("ffn",), "gather": "local"},
    *({"without": (name,)} for name in COMPONENTS),
    {"without": COMPONENTS},
    {"image_token_type": False, "same_id": "ignore"},
    {"text": XLM_R, "empty_text": (0, 2), "image_token_type": False},
    {"text": {**XLM_R, "pad_token_id": 0}, "without": ("fusion",)},
]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(map(str, o.values()))[:30] or "default"
)
def test_model_agrees_with_the_equations(options):
    model, batch = random_model(**options), token_batch()
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    expected, views = transcription(leaves, batch, model.config)
    gradients = torch.autograd.grad(expected["loss"], list(leaves.values()), allow_unused=True)
    for backend in ("reference", "composed"):
        model.zero_grad()
        with mmfused.backend(backend):
            output = model(**batch)
            output.loss.backward()
            embedded = model.embed(VIEWS, **without_labels(batch["query"]))
        assert relative_error(output.loss, expected["loss"]) < 1e-12
        assert output.losses.keys() == {"info_nce", "positive_similarity"}
        for name, value in output.losses.items():
            assert relative_error(value, expected[name]) < 1e-12, name
        for view in VIEWS:
            assert relative_error(embedded[view], views[view]) < 1e-12, view
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert (
                relative_error(
                    parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient
                )
                < 1e-10
            ), name


def test_the_terms_add_up_with_and_without_negatives():
    model, batch = random_model(positive_weight=0.5), token_batch()
    loss, terms = model(**batch)
    assert abs((terms["info_nce"] + 0.5 * terms["positive_similarity"] - loss).item()) < 1e-14
    del batch["negative"]
    expected, _ = transcription(dict(model.named_parameters()), batch, model.config)
    assert relative_error(model(**batch).loss, expected["loss"]) < 1e-12


def test_a_text_without_an_image_gets_plain_berts_embedding():
    model, items = random_model(), token_part()
    states = model.text_encoder(
        input_ids=items["input_ids"], attention_mask=items["attention_mask"]
    ).last_hidden_state
    plain = torch.nn.functional.normalize(states[:, 0], dim=-1)
    items["image_present"] = torch.arange(6) == 0
    views = model.embed(("text", "both"), **without_labels(items))
    assert relative_error(views["text"], plain) < 1e-12
    # An image in another item does not change the positions of these texts.
    assert relative_error(views["both"][1:], plain[1:]) < 1e-12
    assert relative_error(views["both"][0], plain[0]) > 1e-3


def test_a_new_pre_norm_model_computes_the_same_as_without_bica():
    torch.manual_seed(0)
    model = UniCA(UniCAConfig(**SMALL, bica_norm="pre", blocks=2)).double()
    without = UniCA(UniCAConfig(**SMALL, without=("bica",))).double()
    without.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("bica")}
    )
    batch = token_batch()
    assert relative_error(model(**batch).loss, without(**batch).loss) < 1e-12
    model(**batch).loss.backward()
    assert model.bica[0].attention.to_a.out_proj.weight.grad.any()


# --- parity ---


def trained(
    backend, steps, dtype, make_optimizer=torch.optim.AdamW, perturb=1.0, items=6, **options
):
    """Train; return the losses and terms of all steps, the parameters and the embeddings."""
    torch.manual_seed(5)  # for dropout
    # Random parameters, because a new model's output depends little on its items.
    model = random_model(**options).to(device_for(dtype), dtype)
    model.info_nce.options["positive_weight"] *= perturb
    batch = {
        role: {name: value[:items] for name, value in part.items()}
        for role, part in token_batch().items()
    }
    for part in batch.values():
        part["image_tokens"] = part["image_tokens"].to(dtype)
    batch = to_device(batch, device_for(dtype))
    optimizer, history = make_optimizer(model.parameters(), lr=3e-3), []
    with mmfused.backend(backend):
        for _ in range(steps):
            output = model(**batch)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            history += [output.loss.detach(), *output.losses.values()]
        views = model.eval().embed(VIEWS, **without_labels(batch["query"]))
    return (
        torch.stack(history),
        torch.cat([p.detach().flatten() for p in model.parameters()]),
        torch.cat([*views.values()]).detach(),
    )


def largest_error(first, second) -> float:
    return max(relative_error(a, b) for a, b in zip(first, second, strict=True))


def test_thirty_steps_agree_and_a_changed_loss_weight_does_not():
    expected = trained("reference", 30, torch.float64)
    assert largest_error(trained("composed", 30, torch.float64), expected) < 1e-9
    assert largest_error(trained("composed", 30, torch.float64, perturb=1.01), expected) > 1e-4
    assert expected[0][-3] < 0.8 * expected[0][0]  # the loss decreases


def test_training_with_dropout_is_the_same_on_both_backends():
    options = {
        "dropout": 0.1,
        "text": {**BERT, "hidden_dropout_prob": 0.1},
        "bica_norm": "pre",
        "share_weights": True,
    }
    assert (
        largest_error(
            trained("composed", 30, torch.float64, **options),
            trained("reference", 30, torch.float64, **options),
        )
        < 1e-9
    )


def test_the_fused_backend_trains_like_the_reference():
    """Train with SGD, because Adam's first steps amplify the rounding errors of zero gradients."""
    options = {
        "make_optimizer": torch.optim.SGD,
        "items": 3,
        "text_dim": 32,
        "num_heads": 2,
        "ffn": 32,
    }
    fused = trained("fused", 2, torch.float32, **options)
    assert largest_error(trained("reference", 2, torch.float32, **options), fused) < 1e-5
    assert (
        largest_error(trained("reference", 2, torch.float32, perturb=1.01, **options), fused) > 1e-4
    )


# --- missing modalities ---

CASES = {
    "no image": {"image_present": torch.zeros(6, dtype=torch.bool)},
    "no text": {"text_present": torch.zeros(6, dtype=torch.bool)},
    "nothing": {
        "image_present": torch.zeros(6, dtype=torch.bool),
        "attention_mask": torch.zeros(6, 6, dtype=torch.long),
    },
}


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_if_no_item_has_the_modality(case, backend):
    model, batch = (
        random_model(),
        {role: {**items, **CASES[case]} for role, items in token_batch().items()},
    )
    with mmfused.backend(backend):
        loss = model(**batch).loss
        loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not (name.startswith("bica") and parameter.grad.any()), name
        assert case == "no text" or not (name.startswith("visual_proj") and parameter.grad.any()), (
            name
        )


def test_absent_modalities_do_not_affect_the_loss():
    model, batch = random_model(), token_batch()
    expected = model(**batch).loss
    for items in batch.values():
        items["image_tokens"][~items["image_present"]] = float("nan")
        items["input_ids"] = items["input_ids"].masked_fill(items["attention_mask"] == 0, 19)
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_all_missing_texts_give_the_same_embedding():
    """A text is missing if it is only [CLS][SEP], has no real token, or has text_present=False."""
    model, items = random_model(), token_part()
    items["image_present"] = None
    items["image_tokens"] = items["image_tokens"][:1].expand(6, -1, -1)
    items["attention_mask"][3] = 0
    present = (items["attention_mask"].sum(1) > 2) & (torch.arange(6) != 4)
    both = model.embed(**without_labels(items), text_present=present)["both"]
    assert torch.equal(both[2], both[3]) and torch.equal(both[2], both[4])
    assert relative_error(both[2], both[5]) > 1e-3
    assert relative_error(model.embed(**without_labels(items))["both"][4], both[4]) > 1e-3


def test_items_do_not_depend_on_each_other_or_on_padding():
    model, items = random_model(), without_labels(token_part())
    whole = model.embed(VIEWS, **items)
    wider = {
        **items,
        **{
            name: torch.nn.functional.pad(items[name], (0, 4))
            for name in ("input_ids", "attention_mask")
        },
    }
    padded = model.embed(VIEWS, **wider)
    for row in range(6):
        alone = model.embed(VIEWS, **{name: value[row : row + 1] for name, value in items.items()})
        for view in VIEWS:
            assert (
                relative_error(alone[view][0], whole[view][row]) < 1e-12
                and relative_error(padded[view], whole[view]) < 1e-12
            )


def test_a_view_depends_only_on_its_modalities():
    model, items = random_model(), without_labels(token_part())
    expected = model.embed(VIEWS, **items)
    other = model.embed(VIEWS, **{**items, "image_tokens": items["image_tokens"] + 1})
    assert (
        torch.equal(other["text"], expected["text"])
        and relative_error(other["image"], expected["image"]) > 1e-3
    )
    other = model.embed(VIEWS, **{**items, "input_ids": token_part(7)["input_ids"]})
    assert (
        torch.equal(other["image"], expected["image"])
        and relative_error(other["text"], expected["text"]) > 1e-3
    )
    for view in VIEWS:
        assert expected[view].shape == (6, 12)
        assert (
            relative_error(expected[view].norm(dim=-1), torch.ones(6, dtype=torch.float64)) < 1e-12
        )
    assert relative_error(expected["both"][2], expected["image"][2]) < 1e-12  # item 2 has no text
    with pytest.raises(ValueError, match="views: got video, expected some of"):
        model.embed(("video",), **items)


# --- components ---


@pytest.mark.parametrize("name", COMPONENTS)
def test_removing_a_component_changes_the_loss(name):
    full, batch = random_model(), token_batch()
    ablated = UniCA(UniCAConfig(**SMALL, without=(name,))).double()
    ablated.load_state_dict(
        {key: value for key, value in full.state_dict().items() if key in ablated.state_dict()}
    )
    (a, terms), (b, ablated_terms) = full(**batch), ablated(**batch)
    assert abs(a - b).item() > 1e-3
    views, ablated_views = (
        model.embed(VIEWS, **without_labels(batch["query"])) for model in (full, ablated)
    )
    changed = [view for view in VIEWS if relative_error(views[view], ablated_views[view]) > 1e-6]
    assert changed == (["both"] if name in ("bica", "ffn", "fusion") else [])
    if name == "positive_similarity":
        assert relative_error(b, terms["info_nce"]) < 1e-12 and torch.equal(
            ablated_terms["info_nce"], b
        )
    if name == "fusion":
        late = torch.nn.functional.normalize(views["image"] + views["text"], dim=-1)
        assert relative_error(ablated_views["both"][[0, 4, 5]], late[[0, 4, 5]]) < 1e-12
        assert not ablated.bica


# --- with the encoders ---


def tiny(**options) -> UniCA:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "image_size": 32,
        "patch_size": 16,
        "text_dim": 32,
        "image_dim": 32,
        "ffn": 48,
    }
    return UniCA(UniCAConfig.preset("tiny", **sizes, **options))


def pixel_part(seed=3, batch=4, length=8) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([8, 5, 2, 4])
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(4, 50, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "image_present": torch.arange(batch) != 1,
        "labels": torch.arange(batch),
    }


def pixel_batch() -> dict:
    return {role: pixel_part(seed) for seed, role in enumerate(("query", "candidate", "negative"))}


def test_every_parameter_gets_a_gradient():
    model = tiny()
    model(**pixel_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key bias shifts all logits of a query equally, so softmax cancels it.
        assert parameter.grad.any() or name.endswith(("k_proj.bias", "key.bias")), name


def test_the_first_token_of_the_image_encoder_is_dropped():
    model, items = tiny().eval(), without_labels(pixel_part())
    expected = model.embed(VIEWS, **items)
    tokens = model.image_encoder.forward_features(items["pixel_values"])
    assert tokens.shape[1] == 5
    del items["pixel_values"]
    got = model.embed(VIEWS, image_tokens=tokens[:, 1:], **items)
    torch.testing.assert_close(got, expected)


def test_absent_pixels_do_not_affect_the_loss():
    model, batch = tiny().eval(), pixel_batch()
    expected = model(**batch).loss
    for items in batch.values():
        items["pixel_values"][1] = float("nan")
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("frozen", [("text",), ("image",), ("image", "text")])
def test_frozen_encoders_do_not_change_but_pass_gradients_on(frozen):
    model = tiny(freeze=frozen).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    frozen_names = tuple(f"{part}_encoder." for part in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**pixel_batch()).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name.startswith(frozen_names):
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
        elif not name.endswith(("k_proj.bias", "key.bias")):
            assert parameter.grad.any() and not torch.equal(parameter, before[name]), name
    assert not any(getattr(model, f"{part}_encoder").training for part in frozen) and model.training


def test_autocast_keeps_embeddings_and_losses_in_float32():
    model, batch = tiny().eval(), pixel_batch()
    expected = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        output, embedded = model(**batch), model.embed(**without_labels(batch["query"]))
    assert (
        output.loss.dtype
        == embedded["both"].dtype
        == output.losses["positive_similarity"].dtype
        == torch.float32
    )
    assert relative_error(output.loss, expected.loss) < 0.1


def test_training_learns_to_distinguish_items():
    model, part = tiny(), pixel_part()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(15):
        output = model(part, part)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.losses["info_nce"] < 0.5


# --- configuration and errors ---


def test_config_round_trips_through_json():
    config = UniCAConfig.preset(
        "tiny", vocab_size=70, image_size=96, freeze=("text",), without=("ffn",), gather="local"
    )
    copy = UniCAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert copy == config and isinstance(copy.freeze, tuple) and copy.text["vocab_size"] == 70
    UniCA(config).load_state_dict(UniCA(copy).state_dict())
    assert UniCA(copy).picture_size == 96 and UniCA(UniCAConfig(**SMALL)).picture_size == 16


def test_the_paper_preset_has_the_papers_sizes():
    with torch.device("meta"):
        model = UniCA(UniCAConfig.preset("paper"))
    assert (
        model.image_encoder.patch_embed.num_patches == 196
        and len(model.text_encoder.encoder.layer) == 12
    )
    assert not any(parameter.requires_grad for parameter in model.text_encoder.parameters())
    assert model.info_nce.temperature == model.config.temperature == 0.02
    assert model.bica[0].image_ffn.layers[0].out_features == 3072


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bica_norm": "none"}, "bica_norm: got 'none', expected one of post, pre"),
        ({"gather": "all"}, "gather: got 'all', expected one of global, local"),
        (
            {"without": ("gate",)},
            "without: got 'gate', expected some of bica, ffn, positive_similarity, hard_neg",
        ),
        ({"freeze": ("vision",)}, "freeze: got 'vision', expected some of image, text"),
        (
            {"freeze": ("image",)},
            "freeze: got 'image' with image None, expected encoders that the config has",
        ),
        ({"num_heads": 5}, "num_heads: got 5, expected a divisor of text_dim=12"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        ({"ffn": 0}, "ffn: got 0, expected an integer from 1 to 1048576 or None"),
        ({"positive_weight": -1.0}, "positive_weight: got -1.0, expected at least 0"),
        ({"pixel_mean": (0.5,)}, r"pixel_mean: got \(0.5,\), expected 3 finite numbers"),
        ({"text": None}, "text: got None, expected an object"),
        (
            {"text": {"model_type": "roberta"}},
            "text.model_type: got 'roberta', expected one of bert, xlm-roberta",
        ),
        (
            {"text": {**XLM_R, "pad_token_id": None}},
            "text.pad_token_id: got None, expected an id of PAD from 0 to 19",
        ),
        ({"same_id": "sum"}, "same_id: got 'sum', expected one of drop, ignore"),
        (
            {"empty_text": (101, 102)},
            r"empty_text: got \(101, 102\), expected ids below the host's vocab_size=20",
        ),
    ],
)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniCA(UniCAConfig(**{**SMALL, **options}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_tokens": None},
            "pixel_values and image_tokens: got neither, expected exactly one",
        ),
        (
            {"pixel_values": torch.zeros(6, 3, 32, 32)},
            "pixel_values and image_tokens: got both, expected exactly one",
        ),
        (
            {"image_tokens": torch.zeros(6, 3, 11)},
            r"image_tokens: got shape \(6, 3, 11\), expected \(batch, tokens, 10\)",
        ),
        (
            {"image_present": torch.ones(6)},
            r"image_present: got torch.float32 .*, expected bool \(6,\)",
        ),
        (
            {"text_present": torch.ones(5, dtype=torch.bool)},
            r"text_present: got torch.bool \(5,\), expected bool \(6,\)",
        ),
        (
            {"input_ids": None},
            r"input_ids: got None, expected .*, from 2 to 13 tokens beside 3",
        ),
        (
            {"input_ids": torch.zeros(6, 14).long()},
            r"input_ids: got shape \(6, 14\), expected .*, from 2 to 13 tokens beside 3",
        ),
        (
            {"input_ids": torch.zeros(6, 1).long()},
            r"input_ids: got shape \(6, 1\), expected .*, from 2 to 13 tokens beside 3",
        ),
        (
            {"input_ids": torch.zeros(5, 6).long()},
            "image and text: got batch sizes 6 and 5",
        ),
        (
            {"input_ids": torch.full((6, 6), 20)},
            r"input_ids: got a value out of range, expected values in \[0, 19\]",
        ),
        (
            {"attention_mask": torch.ones(6, 7)},
            r"attention_mask: got shape \(6, 7\), expected \(6, 6\)",
        ),
        ({"labels": torch.zeros(6)}, r"labels: got torch.float32 \(6,\), expected int64 \(6,\)"),
        (
            {"image_tokens": None, "pixel_values": torch.zeros(6, 3, 8, 8)},
            "with the config's image None, expected image_tokens",
        ),
    ],
)
def test_bad_items_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        random_model().encode("query", **{**token_part(), **changes})


def test_too_few_candidates_are_refused():
    batch = token_batch()
    batch["candidate"] = {name: value[:5] for name, value in batch["candidate"].items()}
    with pytest.raises(ValueError, match="candidate: got 5 rows, expected 6"):
        random_model()(**batch)
