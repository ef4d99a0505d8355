"""MOON2.0 against an independent float64 transcription of its equations, and other properties."""

import json

import moon2_equations as equations
import pytest
import torch
from moon2_equations import HOST, TOKENS, batch, exact, random_model, tiny, x64
from retrieval_models import check_given_tokens, device_for

import mmfused
from mmfused.models import qwen
from mmfused.models.moon2 import COMPONENTS, MOON2, MOON2Config
from mmfused.models.moon2_losses import reliability
from mmfused.models.retrieval import VIEWS
from mmfused.training.gradients import add_cached_gradients, add_gradients, to_device

SHALLOW = {**HOST, "text_config": {**HOST["text_config"], "num_hidden_layers": 1}}


def in_float32(parts: dict) -> dict:
    """Return the parts with float32 pixels, as the trainer passes them."""
    return {
        role: {**part, "pixel_values": part["pixel_values"].float()} for role, part in parts.items()
    }


def without_labels(part: dict) -> dict:
    return {name: value for name, value in part.items() if name != "labels"}


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# --- equations ---

MODEL_OPTIONS = [
    {},
    {"top_k": 3, "balance": "gshard", "moe_every": 2, "normalise": 5.0},
    {"top_k": 1, "without": ("fusion",)},
    {"without": ("moe",)},
]


@pytest.mark.parametrize(
    "options", MODEL_OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default"
)
def test_model_agrees_with_the_equations(options):
    model, parts = random_model(**options), batch()
    with torch.no_grad():
        rounded = model.encode("query", **parts["query"])
    model = exact(model)
    rows = {role: equations.encoded(model, part) for role, part in parts.items()}
    assert all(
        relative_error(rounded[name].double(), value.double()) < 1e-6
        for name, value in rows["query"].items()
    )
    expected = equations.losses(**rows, alignment=model.alignment, margin=0.15, c=model.config)
    wanted = torch.autograd.grad(expected["loss"], list(model.parameters()), allow_unused=True)
    for backend in ("reference", "composed"):
        model.zero_grad()
        with mmfused.backend(backend):
            encoded = {role: model.encode(role, **part) for role, part in parts.items()}
            output = model.compare(**encoded)
            output.loss.backward()
        for role, row in rows.items():
            assert row.keys() == encoded[role].keys()
            assert all(
                relative_error(encoded[role][name].double(), value.double()) < 1e-11
                for name, value in row.items()
            ), role
        assert {*output.losses, "loss"} == expected.keys()
        for name, value in {**output.losses, "loss": output.loss}.items():
            assert relative_error(value, expected[name]) < 1e-10, name
        for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
            assert (
                relative_error(
                    parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient
                )
                < 1e-9
            ), name


def random_rows(model) -> dict:
    """Return random results of encode, as leaves.

    Queries, candidates and negatives are similar, so that some triplets are filtered.
    """
    generator, rows = torch.Generator().manual_seed(5), {}
    base = torch.randn(6, 8, generator=generator, dtype=x64)
    for role, part in batch().items():
        image, text = part["image_present"], (part["attention_mask"].sum(1) > 2)
        row = {"labels": part["labels"], "has_image": image, "has_text": text}
        for view in VIEWS:
            noise = torch.randn(6, 8, generator=generator, dtype=x64)
            row[view] = torch.nn.functional.normalize(base + noise, dim=1).requires_grad_()
        row["shares"] = (
            torch.rand(6, 3, model.config.num_experts, generator=generator, dtype=x64)
            .softmax(-1)
            .requires_grad_()
        )
        row["balance"] = torch.rand((), generator=generator, dtype=x64).requires_grad_()
        rows[role] = row
    return rows


LOSS_OPTIONS = [
    {},
    {"own_negative_only": True},
    {"roll": True, "temperature": 0.1, "intra_temperature": 0.2},
    {"own_negative_only": True, "roll": True, "detach_routing": True},
    {"normalise": 1.0, "balance_weight": 0.3, "sparsity_weight": 0.2},
    {"filter_threshold": 0.9, "filter_slope": 3.0, "filter_margin": 0.5},
    *({"without": (name,)} for name in COMPONENTS if name not in ("moe", "fusion")),
    {"without": ("dual_alignment", "intra"), "normalise": 3.0},
]


@pytest.mark.parametrize("negatives", [True, False], ids=["triplets", "pairs"])
@pytest.mark.parametrize(
    "options", LOSS_OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default"
)
def test_losses_agree_with_the_equations(options, negatives):
    if "own_negative_only" in options and not negatives:
        options = {**options, "own_negative_only": False}
    model = tiny(**options).double()
    model.set_progress(0.25)
    rows = random_rows(model)
    rows["negative"] = rows["negative"] if negatives else None
    alignment = None
    if model.alignment is not None:
        model.alignment.data.normal_()
        alignment = model.alignment
    margin = model.config.filter_margin * 0.75
    expected = equations.losses(**rows, alignment=alignment, margin=margin, c=model.config)
    leaves = [
        value for row in rows.values() if row for value in row.values() if value.requires_grad
    ]
    leaves += [] if alignment is None else [alignment]
    wanted = torch.autograd.grad(expected["loss"], leaves, allow_unused=True)
    for backend in ("reference", "composed"):
        with mmfused.backend(backend):
            output = model.compare(**rows)
        got = {**output.losses, "loss": output.loss}
        assert got.keys() == expected.keys()
        assert all(relative_error(got[name], value) < 1e-11 for name, value in expected.items())
        gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
        for a, b in zip(gradients, wanted, strict=True):
            assert (
                relative_error(*(torch.zeros((), dtype=x64) if x is None else x for x in (a, b)))
                < 1e-10
            )


def test_fewer_triplets_are_filtered_as_training_proceeds():
    model = tiny(filter_threshold=0.6).double()
    query = torch.eye(4, dtype=x64)[:1].expand(3, -1)
    positive = torch.tensor([[0.9, 0, 0, 0], [0.6, 0, 0, 0], [0.1, 0, 0, 0]], dtype=x64)
    negative, real = torch.full((3, 4), 0.5, dtype=x64), torch.tensor([True, True, True])
    early = reliability(query, positive, negative, real, model.config, model.margin)
    model.set_progress(1.0)
    late = reliability(query, positive, negative, real, model.config, model.margin)
    assert early[0] == late[0] == 1 and early[1] < 0.6 and late[1] == 1 and early[2] < late[2] < 0.6
    assert (
        reliability(query, positive, negative, ~real, model.config, model.margin).tolist()
        == [1] * 3
    )


def test_casts_and_older_states_do_not_change_the_margin():
    model = tiny()
    state = model.state_dict()
    assert "margin" not in state
    model.bfloat16().load_state_dict(state | {"margin": torch.tensor(0.7)})
    model.set_progress(0.25)
    assert model.margin == model.config.filter_margin * 0.75


# --- the mixture of experts in the host ---


def test_a_new_model_computes_the_same_as_its_host():
    """With expert noise, the outputs are only close to those of the host."""
    dense = tiny(without=("moe",)).double()
    part, rows = without_labels(batch()["query"]), []
    rows.append(dense.embed(VIEWS, **part))
    for noise in (0.0, 0.01):
        model = tiny(expert_noise=noise).double()
        before = model.host.language_model.layers[0].mlp.router.weight.clone()
        model.host.load_state_dict(dense.host.state_dict())
        mlp = model.host.language_model.layers[0].mlp
        assert torch.equal(mlp.router.weight, before) and (mlp.w_up[0] == mlp.w_up[1]).all() == (
            noise == 0
        )
        rows.append(model.embed(VIEWS, **part))
    for view in VIEWS:
        shown = part["image_present"] if view == "image" else (part["attention_mask"].sum(1) > 2)
        shown = part["image_present"] | shown if view == "both" else shown
        assert relative_error(rows[1][view][shown], rows[0][view][shown]) < 1e-12
        assert 1e-9 < relative_error(rows[2][view][shown], rows[0][view][shown]) < 0.01


def test_moe_every_chooses_the_layers_with_experts():
    kinds = [type(layer.mlp).__name__ for layer in tiny(moe_every=2).host.language_model.layers]
    assert kinds == ["Qwen2MLP", "Experts"]


def test_encode_keeps_no_state_and_rows_do_not_depend_on_other_rows():
    model, part = random_model(), batch()["query"]
    whole = model.encode("query", **part)
    experts = [layer.mlp for layer in model.host.language_model.layers]
    assert all(moe.padding is None and moe.reports is None for moe in experts)
    rows = torch.tensor([4, 0, 2])
    some = model.encode("query", **{name: value[rows] for name, value in part.items()})
    for name in set(whole) - {"balance"}:
        assert relative_error(some[name].double(), whole[name][rows].double()) < 1e-12, name
    assert whole["shares"].shape == (6, 3, 4)
    shown = torch.stack(
        [whole["has_image"], whole["has_text"], whole["has_image"] | whole["has_text"]], 1
    )
    assert relative_error(whole["shares"].sum(-1), shown.double()) < 1e-12


def test_checkpointing_does_not_change_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = random_model().train()
        if checkpointing:
            model.host.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        with mmfused.backend("composed"):
            model(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*gradients, strict=True))


def test_chunks_give_the_gradients_of_the_whole_batch():
    """GradCache changes only the balance loss, which is computed for each chunk."""
    losses, gradients = [], []
    for chunked in (False, True):
        model = random_model(without=("balance",))
        losses.append(
            (
                add_cached_gradients(model, batch(), 4)
                if chunked
                else add_gradients(model, [batch()], 1)
            )[0]
        )
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert relative_error(losses[1], losses[0]) < 1e-12
    assert all(relative_error(a, b) < 1e-11 for a, b in zip(*gradients, strict=True))
    model = random_model()
    chunked = add_cached_gradients(model, batch(), 4)[1]["balance"]
    assert 0 < abs(chunked - model(**batch()).losses["balance"]) < 0.5


def test_the_forward_pass_compiles_without_a_graph_break(monkeypatch):
    """The vision tower is left out, because its loop over pictures breaks the graph."""
    monkeypatch.undo()  # the compiler would trace into conftest's patched torch.empty
    model, parts = random_model(host=SHALLOW), batch()
    pictures = qwen.picture_tokens(
        model.host, parts["query"]["pixel_values"], parts["query"]["image_present"]
    )
    monkeypatch.setattr(qwen, "picture_tokens", lambda *_: pictures)
    compiled = torch.compile(lambda: model(**parts).loss, fullgraph=True, backend="eager")
    with mmfused.backend("composed"), torch.no_grad():
        for progress in (0.0, 0.5):
            model.set_progress(progress)
            with torch._dynamo.config.patch(error_on_recompile=progress > 0):
                assert relative_error(compiled(), model(**parts).loss) < 1e-12


def test_precomputed_picture_tokens_give_the_same_output():
    check_given_tokens(tiny(), in_float32(batch()))


# --- missing modalities ---


@pytest.mark.parametrize(
    "options",
    [{}, {"without": ("fusion",)}, {"without": ("moe",)}],
    ids=lambda o: str(o.get("without")),
)
@pytest.mark.parametrize("missing", [(), ("image",), ("text",), ("image", "text")], ids="-".join)
def test_gradients_are_finite_whatever_is_missing(options, missing):
    model, parts = tiny(**options), in_float32(batch())
    for part in parts.values():
        part["pixel_values"][~part["image_present"]] = float("nan")
        if "image" in missing:
            part["image_present"][:], part["pixel_values"][:] = False, float("nan")
        if "text" in missing:
            part["attention_mask"] = (torch.arange(7) < 2).long().expand(6, -1)
            part["input_ids"][:, 1] = 3
    output = model(**parts)
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(parameter.grad.any() for parameter in model.host.visual.parameters()) == (
        "image" not in missing
    )
    zero = {"image": ("inter_image", "inter_both"), "text": ("inter_text", "inter_both")}
    for name in {name for which in missing for name in zero[which]} | (
        {"intra_positive", "intra_negative"} if missing else set()
    ):
        assert output.losses[name].item() == 0, name


def test_a_view_depends_only_on_its_modalities():
    model, part = random_model(), without_labels(batch()["query"])
    before = model.embed(VIEWS, **part)
    assert all(
        relative_error(rows.square().sum(1), torch.ones(6, dtype=x64)) < 1e-12
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
    expected = model.encode("query", **part)
    for name in ("input_ids", "attention_mask"):
        part[name] = torch.nn.functional.pad(part[name], (0, 5))
    got = model.encode("query", **part)
    assert all(
        relative_error(got[name].double(), value.double()) < 1e-12
        for name, value in expected.items()
    )


# --- training ---


def train(backend, steps, dtype=x64, rows=6, negatives=True, **options) -> list[torch.Tensor]:
    """Train; return the losses of all steps, the final parameters and the final embeddings."""
    model, losses = tiny(host=SHALLOW, **options).to(device_for(dtype), dtype), []
    parts = {
        role: {name: value[:rows] for name, value in part.items()}
        for role, part in batch(negatives).items()
    }
    parts = to_device(parts if dtype == x64 else in_float32(parts), device_for(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    with mmfused.backend(backend):
        for step in range(steps):
            model.set_progress(step / 30)
            optimizer.zero_grad()
            output = model(**parts)
            output.loss.backward()
            optimizer.step()
            losses.append(torch.stack([output.loss, *output.losses.values()]).detach())
    embeddings = model.embed(VIEWS, **without_labels(parts["query"])).values()
    return [
        torch.stack(losses),
        *(parameter.detach() for parameter in model.parameters()),
        *embeddings,
    ]


def largest_error(a, b):
    return max(relative_error(x, y) for x, y in zip(a, b, strict=True))


def test_the_composed_backend_trains_like_the_reference():
    expected = train("reference", 30)
    assert largest_error(train("composed", 30), expected) < 1e-8
    assert expected[0][-5:, 0].mean() < 0.9 * expected[0][:5, 0].mean()
    for changed in (
        {"intra_temperature": 0.404},
        {"balance_weight": 0.0101},
        {"sparsity_weight": 0.0101},
    ):
        perturbed = train("composed", 3, **changed)[0]
        # A change of one setting by 1 % is detected.
        assert relative_error(perturbed, expected[0][:3]) > 1e-6, changed


def test_the_fused_backend_trains_like_the_reference():
    small = {"dtype": torch.float32, "rows": 2, "negatives": False}
    assert largest_error(train("fused", 2, **small), train("reference", 2, **small)) < 1e-4


def test_autocast_keeps_the_losses_in_float32():
    model, parts = tiny(), in_float32(batch())
    expected = model(**parts)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**parts)
    assert {loss.dtype for loss in (output.loss, *output.losses.values())} == {torch.float32}
    assert relative_error(output.loss, expected.loss) < 0.05


@pytest.mark.parametrize("part", ["vision", "language"])
def test_frozen_parts_do_not_change(part):
    model, parts = tiny(freeze=(part,)).train(), in_float32(batch())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**parts).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("host." + qwen.PARTS[part])
        assert (parameter.grad is None) == frozen and (
            not frozen or torch.equal(parameter, before[name])
        ), name
    assert not getattr(model.host, qwen.PARTS[part]).training


# --- components, configuration, errors ---


@pytest.mark.parametrize("name", COMPONENTS)
def test_removing_a_component_changes_the_loss(name):
    outputs, rows = [], []
    for without in ((), (name,)):
        model, parts = random_model(without=without, temperature=0.05), batch()
        outputs.append(model(**parts))
        rows.append(model.embed(VIEWS, **without_labels(parts["query"])))
    assert abs(outputs[0].loss - outputs[1].loss) > 1e-4
    changed = [view for view in VIEWS if relative_error(rows[1][view], rows[0][view]) > 1e-12]
    assert changed == {"moe": list(VIEWS), "fusion": ["both"]}.get(name, [])
    removed = {
        "moe": {"balance", "sparsity"},
        "dual_alignment": {"sparsity"},
        "filtering": set(),
        "fusion": set(),
    }
    removed = removed.get(name, {key for key in outputs[0].losses if key.startswith(name)})
    assert set(outputs[0].losses) - set(outputs[1].losses) == removed


def test_the_paper_preset_has_the_sizes_of_the_host():
    config = MOON2Config.preset("paper", tokens=TOKENS)
    with torch.device("meta"):
        model = MOON2(config)
    expert = 3 * 2048 * 11008
    dense = (
        sum(parameter.numel() for parameter in model.parameters())
        - 36 * (7 * expert + 8 * 2048)
        - 8 * 5
    )
    assert 3.7e9 < dense < 3.8e9  # Qwen2.5-VL-3B with a tied head
    assert (
        model.picture_size == 224
        and config.temperature == 0.05
        and (config.num_experts, config.top_k) == (8, 2)
    )


def test_config_round_trips_through_json_with_the_trainers_sizes():
    config = MOON2Config.preset(
        "tiny", tokens=TOKENS, vocab_size=70, image_size=96, patch_size=24, without=("balance",)
    )
    copy = MOON2Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (
        copy == config
        and copy.without == ("balance",)
        and copy.host["vision_config"]["patch_size"] == 12
    )
    model, other = MOON2(config), MOON2(copy)
    other.load_state_dict(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert model.picture_size == 96 and model.host.language_model.embed_tokens.num_embeddings == 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k: got 5, expected at most num_experts=4"),
        ({"num_experts": 0}, "num_experts: got 0, expected an integer from 1 to 100000"),
        ({"moe_every": 3}, "moe_every: got 3, expected at most the host's 2 layers"),
        ({"balance": "none"}, "balance: got 'none', expected one of switch, gshard"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        (
            {"without": ("gate",)},
            "without: got 'gate', expected some of moe, dual_alignment, sparsity",
        ),
        (
            {"without": ("intra", "inter")},
            "without: got 'inter' and 'intra', which leaves no objective",
        ),
        (
            {"host": {"text_config": {"hidden_act": "gelu"}}},
            "hidden_act: got 'gelu', expected 'silu', the experts' activation",
        ),
        ({"tokens": None}, "tokens: got None, expected the result"),
        ({"normalise": 0.0}, "normalise: got 0.0, expected a number above 0"),
    ],
)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_own_negative_only_without_negatives_is_refused():
    with pytest.raises(
        ValueError, match="negative: got None with own_negative_only, expected hard negatives"
    ):
        tiny(own_negative_only=True)(**in_float32(batch(negatives=False)))
