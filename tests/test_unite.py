"""UNITE against an independent transcription of its equations in float64, and other properties."""

import json

import pytest
import torch
import unite_equations as equations
from retrieval_models import check_given_tokens, device_for

import mmfused
from mmfused.models import qwen
from mmfused.models.retrieval import VIEWS
from mmfused.models.unite import COMPONENTS, UNITE, UNITEConfig
from mmfused.training.gradients import add_cached_gradients, add_gradients, to_device

TOKENS = {"vision_start": 90, "vision_end": 91, "image": 92, "end": 93, "pad": 0, "drop": [2, 3]}
TOKENS["prompts"] = {kind: list(range(80, 83 + i)) for i, kind in enumerate(qwen.KINDS)}
TOKENS["chat"] = {
    "start": [70, 71, 72],
    "prompts": {kind: list(range(73, 75 + i)) for i, kind in enumerate(qwen.KINDS)},
}
HOST = {
    "text_config": {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "patch_size": 4},
}
ONE_LAYER = {"text_config": {**HOST["text_config"], "num_hidden_layers": 1}}
SPECIAL = {
    "image_token_id": 92,
    "video_token_id": 94,
    "vision_start_token_id": 90,
    "vision_end_token_id": 91,
}


def tiny(**options) -> UNITE:
    torch.manual_seed(0)
    host = {**HOST, **SPECIAL, **options.pop("host", {})}
    return UNITE(
        UNITEConfig.preset(
            "tiny",
            **{"tokens": TOKENS, "image_size": 16, "host": host, "temperature": 0.3, **options},
        )
    )


def random_model(**options) -> UNITE:
    """Return a float64 model in which all parameters are random."""
    model, generator = tiny(**options).double(), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        )
    return model


def items(seed: int, labels, frames=()) -> dict:
    """Return items; item 1 has no picture, item 2 no text, and item 3 neither."""
    generator, batch = torch.Generator().manual_seed(seed), len(labels)
    lengths = torch.randint(4, 8, (batch,), generator=generator)
    lengths[2:4] = 2
    ids = torch.randint(4, 80, (batch, 8), generator=generator)
    ids[:, 0] = 2
    ids[torch.arange(batch), lengths - 1] = 3
    present = (torch.arange(batch) != 1) & (torch.arange(batch) != 3)
    return {
        "pixel_values": torch.randn(
            batch, *frames, 3, 16, 16, generator=generator, dtype=torch.float64
        ),
        "input_ids": ids,
        "attention_mask": (torch.arange(8) < lengths[:, None]).long(),
        "image_present": present,
        "labels": torch.tensor(labels),
    }


def batch(frames=(), negatives=True) -> dict:
    """Return a batch; queries 0 and 4 have the same product, as do negative 5 and query 1."""
    parts = {
        "query": items(1, [7, 1, 2, 3, 7, 5], frames),
        "candidate": items(2, [7, 1, 2, 3, 7, 5], frames),
    }
    return {**parts, "negative": items(3, [8, 9, 8, 6, 6, 1], frames)} if negatives else parts


def in_float32(parts: dict) -> dict:
    """Return the parts with float32 pixels, as the trainer passes them."""
    return {
        role: {**part, "pixel_values": part["pixel_values"].float()} for role, part in parts.items()
    }


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


VARIANTS = [
    {},
    {"same_id": "sum", "temperature": 0.1},
    {"stage": 1},
    {"stage": 1, "same_id": "sum"},
    {"query_views": ("text",), "candidate_views": ("text", "image")},
    {"without": ("mamcl",)},
    {"without": ("negatives",)},
    {"without": ("mamcl", "negatives", "fusion")},
    {"stage": 1, "without": ("dual", "fusion")},
    {"prompt": "chat", "positions": "1d", "same_id": "sum", "same_id_with_negatives": "ignore"},
    {"stage": 1, "same_id": "ignore", "positions": "1d"},
    {"prompt": "chat", "same_id_with_negatives": "sum", "without": ("fusion",)},
]


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "default"
)
def test_model_agrees_with_the_equations(options, backend):
    model, parts = random_model(**options), batch()
    check_equations(model, parts, backend)


@pytest.mark.parametrize("options", [{}, {"prompt": "chat", "positions": "1d"}])
def test_videos_agree_with_the_equations(options):
    check_equations(random_model(**options), batch(frames=(4,)), "composed")


def test_a_batch_without_hard_negatives_agrees_with_the_equations():
    check_equations(random_model(), batch(negatives=False), "composed")


def check_equations(model, parts, backend):
    c = model.config
    torch.manual_seed(4)
    rows = {}
    for role, part in parts.items():
        views = c.query_views if role == "query" else c.candidate_views
        drawn = equations.drawn_views(part, views, c)
        rows[role] = equations.embeddings(model.host, part, drawn, c)
    labels = [part["labels"] for part in parts.values()]
    negative = rows["negative"][0] if "negative" in rows else None
    expected = equations.loss(
        rows["query"][0], rows["candidate"][0], negative, rows["candidate"][1], labels, c
    )
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    torch.manual_seed(4)
    encoded = {role: model.encode(role, **part) for role, part in parts.items()}
    for role, (row, codes) in rows.items():
        assert (
            relative_error(encoded[role]["embedding"], row) < 1e-11
            and encoded[role]["code"].tolist() == codes
        ), role
    torch.manual_seed(4)
    with mmfused.backend(backend):
        output = model(**parts)
        output.loss.backward()
    assert relative_error(output.loss, expected) < 1e-10 and output.losses == {
        "contrastive": output.loss
    }
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert (
            relative_error(
                parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient
            )
            < 1e-9
        ), name


def test_an_item_that_is_alone_in_its_modality_has_no_loss():
    """In stage 2 without hard negatives, such an item is compared only with its positive."""
    model, rows = (
        random_model(without=("negatives",)),
        torch.nn.functional.normalize(torch.randn(2, 4, 6, dtype=torch.float64), dim=-1),
    )
    query, candidate = (part.clone().requires_grad_() for part in rows)
    codes = torch.tensor([1, 1, 2, 1])
    part = {"code": codes, "labels": torch.arange(4)}
    model.compare({**part, "embedding": query}, {**part, "embedding": candidate}).loss.backward()
    assert not query.grad[2].any() and not candidate.grad[2].any() and query.grad[3].any()


# --- missing modalities ---


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("missing", [(), ("image",), ("text",), ("image", "text")], ids="-".join)
def test_gradients_are_finite_whatever_is_missing(stage, missing):
    model, parts = tiny(stage=stage), in_float32(batch())
    for part in parts.values():
        part["pixel_values"][~part["image_present"]] = float("nan")
        if "image" in missing:
            part["image_present"][:], part["pixel_values"][:] = False, float("nan")
        if "text" in missing:
            part["attention_mask"] = (torch.arange(8) < 2).long().expand(6, -1)
            part["input_ids"][:, 1] = 3
    loss = model(**parts).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    tower = [parameter.grad.any() for parameter in model.host.visual.parameters()]
    assert any(tower) == ("image" not in missing)


def test_a_view_depends_only_on_its_modalities():
    model, part = random_model(), batch()["query"]
    part.pop("labels")
    before = model.embed(VIEWS, **part)
    assert all(
        relative_error(rows.square().sum(1), torch.ones(6, dtype=torch.float64)) < 1e-12
        for rows in before.values()
    )
    other = {**part, "pixel_values": part["pixel_values"] + 1}
    assert torch.equal(model.embed(("text",), **other)["text"], before["text"])
    changed = (model.embed(("both",), **other)["both"] != before["both"]).any(1)
    assert changed.tolist() == part["image_present"].tolist()
    other = {**part, "input_ids": part["input_ids"].where(part["input_ids"] < 4, 5)}
    assert torch.equal(model.embed(("image",), **other)["image"], before["image"])
    assert (model.embed(("both",), **other)["both"] != before["both"]).any(1).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    for item, alone in ((1, "text"), (2, "image")):  # these items have one modality
        assert relative_error(before["both"][item], before[alone][item]) < 1e-12
    assert (
        tiny().embed(**{**part, "pixel_values": part["pixel_values"].float()})["both"].dtype
        == torch.float32
    )


def test_more_padding_does_not_change_the_embeddings():
    model, part = random_model(), batch()["query"]
    part.pop("labels")
    expected = model.embed(VIEWS, **part)
    for name in ("input_ids", "attention_mask"):
        part[name] = torch.nn.functional.pad(part[name], (0, 5))
    assert all(
        relative_error(rows, expected[view]) < 1e-12
        for view, rows in model.embed(VIEWS, **part).items()
    )


# --- training ---


def test_chunks_draw_the_same_views_as_the_whole_batch():
    model, parts, losses, gradients = tiny(), in_float32(batch()), [], []
    torch.manual_seed(3)
    whole = model.encode("query", **parts["query"])["code"]
    torch.manual_seed(3)
    halves = [
        {name: value[rows] for name, value in parts["query"].items()}
        for rows in (slice(0, 4), slice(4, 6))
    ]
    assert torch.equal(torch.cat([model.encode("query", **half)["code"] for half in halves]), whole)
    assert len(set(whole.tolist())) > 1
    for chunked in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        losses.append(
            (
                add_cached_gradients(model, parts, 4)
                if chunked
                else add_gradients(model, [parts], 1)
            )[0]
        )
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert relative_error(losses[1], losses[0]) < 1e-6
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*gradients[::-1], strict=True))


def train(backend, steps, dtype=torch.float64, **options) -> list[torch.Tensor]:
    """Train; return the losses of all steps, the parameters and the embeddings."""
    model, parts, losses = tiny(**options, host=ONE_LAYER).to(device_for(dtype), dtype), batch(), []
    parts = to_device(parts if dtype == torch.float64 else in_float32(parts), device_for(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    torch.manual_seed(2)
    with mmfused.backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(**parts)
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.detach())
    query = {name: value for name, value in parts["query"].items() if name != "labels"}
    return [
        torch.stack(losses),
        *(parameter.detach() for parameter in model.parameters()),
        *model.embed(VIEWS, **query).values(),
    ]


def largest_error(a, b):
    return max(relative_error(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_composed_backend_trains_like_the_reference(stage):
    expected = train("reference", 30, stage=stage)
    assert largest_error(train("composed", 30, stage=stage), expected) < 1e-8
    assert expected[0][-5:].mean() < 0.9 * expected[0][:5].mean()
    perturbed = train("composed", 3, stage=stage, temperature=0.303)[0]
    assert relative_error(perturbed, expected[0][:3]) > 1e-4  # a change by 1 % is detected


@pytest.mark.parametrize("stage", [1, 2])
def test_the_fused_backend_trains_like_the_reference(stage):
    expected = train("reference", 2, torch.float32, stage=stage)
    assert largest_error(train("fused", 2, torch.float32, stage=stage), expected) < 1e-4


def test_precomputed_picture_tokens_give_the_same_output():
    check_given_tokens(tiny(), in_float32(batch()))


def test_autocast_keeps_the_loss_in_float32():
    model, parts = tiny(), in_float32(batch())
    torch.manual_seed(1)
    expected = model(**parts).loss
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**parts).loss
    assert loss.dtype == torch.float32 and relative_error(loss, expected) < 0.05
    rows = tiny().bfloat16().encode("query", **parts["query"])["embedding"]
    assert rows.dtype == torch.bfloat16


def test_the_forward_pass_compiles_without_a_graph_break(monkeypatch):
    """The vision tower is left out, because its loop over pictures breaks the graph."""
    monkeypatch.undo()  # the compiler would trace into conftest's patched torch.empty
    model, parts = random_model(host=ONE_LAYER), batch(negatives=False)
    pictures = qwen.picture_tokens(
        model.host, parts["query"]["pixel_values"], parts["query"]["image_present"]
    )
    monkeypatch.setattr(qwen, "picture_tokens", lambda *_: pictures)
    compiled = torch.compile(lambda: model(**parts).loss, fullgraph=True, backend="eager")
    with mmfused.backend("composed"), torch.no_grad():
        torch.manual_seed(1)
        loss = compiled()
        torch.manual_seed(1)
        assert relative_error(loss, model(**parts).loss) < 1e-12


def test_frozen_parts_do_not_change():
    model, parts = tiny(freeze=("vision",)).train(), in_float32(batch())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**parts).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("host.visual")
        assert (parameter.grad is None) == frozen and (
            frozen <= torch.equal(parameter, before[name])
        ), name
    assert not model.host.visual.training and model.host.language_model.training


# --- components, configuration, errors ---


@pytest.mark.parametrize("name", COMPONENTS)
def test_removing_a_component_changes_the_loss(name):
    stage, losses, rows = 1 if name == "dual" else 2, [], []
    for without in ((), (name,)):
        model, parts = random_model(stage=stage, without=without), batch()
        torch.manual_seed(6)
        losses.append(model(**parts).loss)
        query = {key: value for key, value in parts["query"].items() if key != "labels"}
        rows.append(model.embed(VIEWS, **query))
    assert abs(losses[0] - losses[1]) > 1e-4
    changed = [view for view in VIEWS if relative_error(rows[1][view], rows[0][view]) > 1e-12]
    assert changed == (["both"] if name == "fusion" else [])


@pytest.mark.parametrize("name", ["paper", "code"])
def test_presets_have_the_sizes_of_the_host(name):
    config = UNITEConfig.preset(name, tokens=TOKENS)
    with torch.device("meta"):
        model = UNITE(config)
    # The size of Qwen2-VL-2B with a tied head.
    assert 2.1e9 < sum(parameter.numel() for parameter in model.parameters()) < 2.3e9
    assert model.picture_size == 448 and config.temperature == 0.03 and config.stage == 2
    released = (config.same_id, config.same_id_with_negatives, config.prompt, config.positions)
    of_code, of_paper = ("sum", "ignore", "chat", "1d"), ("drop", None, "plain", "mrope")
    assert released == (of_code if name == "code" else of_paper)
    assert {parameter.requires_grad for parameter in model.host.visual.parameters()} == {False}


def test_config_round_trips_through_json_with_the_trainers_sizes():
    config = UNITEConfig.preset(
        "tiny", tokens=TOKENS, vocab_size=70, image_size=96, patch_size=24, query_views=("text",)
    )
    copy = UNITEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (
        copy == config
        and copy.query_views == ("text",)
        and copy.host["vision_config"]["patch_size"] == 12
    )
    model, other = UNITE(config), UNITE(copy)
    other.load_state_dict(model.state_dict())
    assert model.picture_size == 96 and model.host.language_model.embed_tokens.num_embeddings == 70
    pretrained = {"model_type": "qwen2_vl", **HOST}
    config = UNITEConfig.preset("tiny", tokens=TOKENS, vocab_size=70, patch_size=8, host=pretrained)
    assert config.host == pretrained and config.image_size == 16 * 2 * 4
    with pytest.raises(ValueError, match="preset: got 'huge', expected one of paper, code, tiny"):
        UNITEConfig.preset("huge", tokens=TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, "stage: got 3, expected one of 1, 2"),
        ({"temperature": 0}, "temperature: got 0, expected a number above 0"),
        (
            {"tokens": None},
            r"tokens: got None, expected the result of mmfused.models.qwen.token_ids",
        ),
        (
            {"tokens": {**TOKENS, "chat": {"start": [1]}}},
            "tokens.chat: got a dict without prompts, expected start, prompts",
        ),
        (
            {"tokens": {**TOKENS, "chat": {"start": [1], "prompts": {"text": [2]}}}},
            "tokens.chat.prompts: got a dict without image, image and text, video, video and text",
        ),
        (
            {"image_size": 20},
            "image_size: got 20, expected a multiple of 8, the side of a token in pixels",
        ),
        (
            {"patch_size": 7},
            "patch_size: got 7, expected a multiple of 2, the number of patches on a token's side",
        ),
        ({"query_views": ()}, "views: got none, expected some of image, text, both"),
        (
            {"candidate_views": ("video",)},
            "candidate_views: got 'video', expected some of image, text, both",
        ),
        ({"same_id": "mean"}, "same_id: got 'mean', expected one of drop, sum"),
        ({"freeze": ("image",)}, "freeze: got 'image', expected some of vision, language"),
        (
            {"without": ("lora",)},
            "without: got 'lora', expected some of mamcl, negatives, dual, fusion",
        ),
        (
            {"without": ("dual",)},
            "without: got 'dual' with stage 2, which already excludes it, expected stage 1",
        ),
        (
            {"without": ("mamcl",), "stage": 1},
            "without: got 'mamcl' with stage 1, which already excludes it, expected stage 2",
        ),
    ],
)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
