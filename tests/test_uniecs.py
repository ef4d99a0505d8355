"""UniECS against an independent transcription of its equations in float64, and other properties."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from retrieval_models import device_for
from uniecs_equations import transcription

import mmfused
from mmfused.models.uniecs import COMPONENTS, UniECS, UniECSConfig
from mmfused.models.uniecs_losses import (
    LossOptions,
    adaptive_loss,
    adaptive_weights,
    group_losses,
    loss_terms,
)
from mmfused.training.gradients import to_device

VIEWS = ("image", "text", "both")
SMALL = {"dim": 8, "num_heads": 2, "cross_layers": 1, "image_dim": 6, "text_dim": 7, "nearest": 2}


def random_model(**options) -> UniECS:
    """Return a float64 model without encoders.

    All parameters are random, even those that are initialized to zeros or ones.
    """
    model = UniECS(UniECSConfig(**{**SMALL, **options})).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name != "log_scale":
            parameter.data = (
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6
            )
    return model


def token_items(seed: int, no_image=(), no_text=(), batch=4, length=4) -> dict:
    """Return precomputed tokens of pictures, and of texts with at most ``length`` tokens.

    Items 0 and 3 have the same label.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[list(no_text)] = 0
    return {
        "image_tokens": torch.randn(batch, 3, 6, generator=generator, dtype=torch.float64),
        "text_tokens": torch.randn(batch, length, 7, generator=generator, dtype=torch.float64),
        "text_padding_mask": torch.arange(length) >= lengths[:, None],
        "image_present": torch.tensor([i not in no_image for i in range(batch)]),
        "labels": torch.tensor([0, 1, 2, 0]),
    }


def token_pair() -> tuple[dict, dict]:
    """Return queries and candidates; some of the items lack a modality.

    Only one item lacks both, because two such items on one side would tie in top k.
    """
    return token_items(2, no_image=(1,), no_text=(1, 2)), token_items(
        3, no_image=(3,), no_text=(0,)
    )


def stacked_views(encoded: dict) -> torch.Tensor:
    return torch.stack([encoded[view] for view in VIEWS], 1)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


VARIANTS = [
    {"cross_layers": 2},
    {
        "cross_layers": 2,
        "placement": "after",
        "self_blocks": 2,
        "fusion_blocks": 2,
        "v2f": "f_to_v",
        "weighting": "static",
    },
    {"indicator": "batch", "text_mask": False, "text_length": 6, "v2f": "f_to_v"},
    {"indicator": "batch", "text_mask": False, "text_length": 6, "text_padding": "encoded"},
    {"text_mask": False, "text_length": 3, "text_padding": "encoded", "without": ("fusion",)},
    {"indicator": False, "missing": "zero", "text_length": 3, "beta": 1.0, "epsilon": 0.1},
    {
        "missing": "skip",
        "margins": (0.6, 0.1, 0.2, 0.4),
        "initial_scale": 4.0,
        "hard_fraction": 0.9,
        "temperature": 0.2,
    },
    {
        "missing": "zero",
        "temperature_v2v": 0.3,
        "temperature_t2t": 0.1,
        "text_mask": False,
        "text_length": 3,
    },
    *({"without": (name,)} for name in COMPONENTS),
    {"without": ("fusion", "cmal", "imcl", "adaptive"), "text_mask": False, "text_length": 5},
]


def zero_for_none(gradients, like):
    return [
        torch.zeros_like(x) if gradient is None else gradient
        for gradient, x in zip(gradients, like, strict=True)
    ]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_model_agrees_with_the_equations(options):
    model, (query, candidate) = random_model(**options), token_pair()
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    expected = transcription(leaves, query, candidate, model.config)
    inputs = list(leaves.values())
    gradients = zero_for_none(
        torch.autograd.grad(expected["loss"], inputs, allow_unused=True), inputs
    )
    for backend in ("reference", "composed"):
        model.zero_grad()
        with mmfused.backend(backend):
            encoded = model.encode("query", **query), model.encode("candidate", **candidate)
            output = model.compare(*encoded)
            output.loss.backward()
        got = {
            "query": stacked_views(encoded[0]),
            "candidate": stacked_views(encoded[1]),
            "loss": output.loss,
            **output.losses,
        }
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert relative_error(got[name], value) < 1e-10, name
        got_gradients = zero_for_none([parameter.grad for parameter in model.parameters()], inputs)
        for name, a, b in zip(leaves, got_gradients, gradients, strict=True):
            assert relative_error(a, b) < 1e-9, name


def test_self_attention_agrees_with_multihead_attention():
    """The block equals one with nn.MultiheadAttention and the same weights.

    The transcription reads the projections by name, so it cannot reveal swapped names.
    """
    block = random_model().stages[0].text_blocks[0]
    x, ignore = (
        torch.randn(3, 4, 8, dtype=torch.float64),
        torch.arange(4) >= torch.tensor([4, 2, 1])[:, None],
    )
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    projections = (block.q_proj, block.k_proj, block.v_proj)
    attention.in_proj_weight.data = torch.cat(
        [projection.weight for projection in projections]
    ).detach()
    attention.in_proj_bias.data = torch.cat(
        [projection.bias for projection in projections]
    ).detach()
    attention.out_proj.load_state_dict(block.out_proj.state_dict())
    normed = block.norm1(x)
    read = x + block.gamma1 * attention(normed, normed, normed, key_padding_mask=ignore)[0]
    assert (
        relative_error(block(x, ignore), read + block.gamma2 * block.ffn(block.norm2(read))) < 1e-12
    )


# --- the adaptive weights ---


def random_rows(batch=6):
    rows = F.normalize(torch.randn(batch, 6, 8, dtype=torch.float64), dim=-1).requires_grad_()
    ids = torch.ones(batch, 6, dtype=torch.int64)
    ids[:, 0] = ids[:, 3] = torch.arange(batch)
    return rows, torch.tensor(2.0, dtype=torch.float64, requires_grad=True), ids


def options_of(**changes) -> LossOptions:
    config = UniECSConfig(**{**SMALL, **changes})
    return LossOptions(*(getattr(config, name) for name in LossOptions._fields))


def adaptive_loss_by_definition(rows, log_scale, ids, options):
    losses = group_losses(loss_terms(rows, log_scale, ids, options), options)
    norms = [torch.autograd.grad(loss, rows, retain_graph=True)[0].norm() for loss in losses]
    powers = [(norm + options.epsilon) ** -options.beta for norm in norms]
    return sum(power / sum(powers) * loss for power, loss in zip(powers, losses, strict=True))


@pytest.mark.parametrize("changes", [{}, {"beta": 1.0}, {"without": ("clal",)}, {"v2f": "f_to_v"}])
def test_adaptive_loss_equals_its_definition(changes):
    rows, log_scale, ids = random_rows()
    options = options_of(**changes)
    expected = adaptive_loss_by_definition(rows, log_scale, ids, options)
    loss, values = adaptive_loss(rows, log_scale, ids, tuple(options))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        values, torch.stack(list(loss_terms(rows, log_scale, ids, options).values()))
    )
    assert not values.requires_grad
    wanted = torch.autograd.grad(
        3 * expected, (rows, log_scale), allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (rows, log_scale)), wanted)
    with torch.no_grad():
        assert torch.equal(adaptive_loss(rows, log_scale, ids, tuple(options))[0], loss)


def test_adaptive_weights():
    norms, eps = torch.tensor([1.0, 4.0, 0.25]), 1e-6
    equal, half, full = (
        adaptive_weights(norms, options_of(beta=beta, epsilon=eps)) for beta in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(equal, torch.full((3,), 1 / 3))
    torch.testing.assert_close(half, torch.tensor([2.0, 1.0, 4.0]) / 7)
    # At beta = 1, all weighted norms are equal.
    torch.testing.assert_close(full * norms, (full * norms)[:1].expand(3))
    one_zero = adaptive_weights(torch.tensor([0.0, 1.0, 1.0]), options_of())
    torch.testing.assert_close(one_zero, torch.tensor([0.0, 0.5, 0.5]))


# --- missing modalities ---


@pytest.mark.parametrize("absent", ["image", "text", "both"])
@pytest.mark.parametrize(
    "options", [{}, {"without": ("fusion",)}, {"text_mask": False, "text_length": 4}]
)
def test_loss_and_gradients_are_finite_if_no_item_has_the_modality(absent, options):
    everyone = range(4)
    lack = {
        "no_image": everyone if absent != "text" else (),
        "no_text": everyone if absent != "image" else (),
    }
    model = random_model(**options)
    parts = token_items(2, **lack), token_items(3, **lack)
    for part in parts:
        part["image_tokens"][~part["image_present"]] = float("nan")
        part["text_tokens"][part["text_padding_mask"]] = float("nan")
    output = model(*parts)
    output.loss.backward()
    assert output.loss.isfinite() and all(term.isfinite() for term in output.losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name in ("image", "text"):
        if absent in (name, "both"):
            assert not getattr(model, f"{name}_map").weight.grad.any()


def test_absent_modalities_do_not_affect_the_loss():
    model, (query, candidate) = random_model(), token_pair()
    expected = model(query, candidate).loss
    for part in (query, candidate):
        part["image_tokens"][~part["image_present"]] = float("nan")
        part["text_tokens"][part["text_padding_mask"]] = float("nan")
    output = model(query, candidate)
    output.loss.backward()
    assert torch.equal(output.loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"indicator": "batch"}, {"text_mask": False, "text_length": 4}]
)
def test_an_item_does_not_depend_on_its_batch(options):
    model, items = random_model(**options), token_pair()[0]
    together = model.embed(VIEWS, **{k: v for k, v in items.items() if k != "labels"})
    for i in range(4):
        alone = {name: value[i : i + 1] for name, value in items.items() if name != "labels"}
        alone["text_tokens"], alone["text_padding_mask"] = (
            F.pad(alone["text_tokens"], (0, 0, 0, 3)),
            F.pad(alone["text_padding_mask"], (0, 3), value=True),
        )
        for view in VIEWS:
            assert relative_error(model.embed((view,), **alone)[view][0], together[view][i]) < 1e-12


def test_a_view_depends_only_on_its_modalities():
    model, items = random_model(), token_pair()[0]
    del items["labels"]
    before = model.embed(VIEWS, **items)
    other = model.embed(VIEWS, **{**items, "image_tokens": items["image_tokens"] + 1})
    assert torch.equal(before["text"], other["text"])
    assert ((before["image"] - other["image"]).abs().amax(1) > 1e-3).tolist() == [
        True,
        False,
        True,
        True,
    ]
    assert ((before["both"] - other["both"]).abs().amax(1) > 1e-3).tolist() == [
        True,
        False,
        True,
        True,
    ]
    other = model.embed(VIEWS, **{**items, "text_tokens": items["text_tokens"].flip(0)})
    assert torch.equal(before["image"], other["image"]) and not torch.allclose(
        before["text"], other["text"]
    )
    # If an item has only one modality, "both" equals the view of that modality.
    assert torch.allclose(before["both"][2], before["image"][2]) and torch.allclose(
        before["both"][1], before["text"][1]
    )
    for rows in before.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4, dtype=torch.float64))


# --- parity of the backends, in training ---


def train(backend: str, steps: int, dtype=torch.float64, items=slice(None), **options):
    model = random_model(**options).to(device_for(dtype), dtype)
    parts = [
        {k: v[items].to(dtype) if v.is_floating_point() else v[items] for k, v in part.items()}
        for part in token_pair()
    ]
    parts = [to_device(part, device_for(dtype)) for part in parts]
    # A large eps, because the gradient of a key bias is only rounding error.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    trace = []
    with mmfused.backend(backend):
        for _ in range(steps):
            output = model(*parts)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            trace.append(torch.stack([output.loss.detach(), *output.losses.values()]).detach())
        embedded = stacked_views(model.encode("query", **parts[0])).detach()
    return [torch.stack(trace), embedded, *(parameter.detach() for parameter in model.parameters())]


def largest_error(a, b) -> float:
    return max(relative_error(x, y) for x, y in zip(a, b, strict=True))


def test_thirty_steps_agree_and_a_changed_loss_weight_does_not():
    expected = train("reference", 30)
    assert largest_error(train("composed", 30), expected) < 1e-9
    assert expected[0][-1, 0] < expected[0][0, 0]
    weights = (0.5, 1.0, 1.01, *UniECSConfig().loss_weights[3:])  # the weight of V2F changes by 1 %
    assert largest_error(train("composed", 3, loss_weights=weights), train("reference", 3)) > 1e-5


def test_two_steps_with_kernels_agree_with_the_reference():
    # One query has no text and one candidate no image.
    sizes = {"dim": 16, "num_heads": 1, "items": slice(2, 4)}
    assert (
        largest_error(
            train("fused", 2, torch.float32, **sizes), train("reference", 2, torch.float32, **sizes)
        )
        < 1e-3
    )


def test_dropout_acts_only_in_training():
    model, parts = random_model(dropout=0.3), token_pair()
    first, second = model(*parts).loss, model(*parts).loss
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(*parts).loss, model(*parts).loss)


# --- with the encoders ---


def tiny(**options) -> UniECS:
    torch.manual_seed(0)
    return UniECS(
        UniECSConfig.preset(
            "tiny", vocab_size=50, image_size=32, dim=32, image_dim=32, text_dim=32, **options
        )
    )


def pixel_items(seed=3, batch=4, length=8) -> dict:
    """Return pixels and token ids; item 1 has no image, and item 2 has no text."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (batch,), generator=generator)
    lengths[2] = 2
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(0, 50, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "image_present": torch.arange(batch) != 1,
        "labels": torch.arange(batch),
    }


def test_every_parameter_gets_a_gradient():
    model, parts = tiny(), (pixel_items(3), pixel_items(4))
    model(*parts).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Gradients may be 0: a key bias shifts all logits of a query equally, and attention over
        # one token is constant.
        one_token = "fusion_blocks" in name and ("q_proj" in name or "k_proj" in name)
        assert parameter.grad.any() or one_token or name.endswith(("k_proj.bias", "key.bias")), name


def test_absent_pixels_do_not_affect_the_loss():
    model, parts = tiny().eval(), (pixel_items(3), pixel_items(4))
    expected = model(*parts)
    parts[0]["pixel_values"][1] = float("nan")
    output = model(*parts)
    output.loss.backward()
    assert torch.equal(output.loss, expected.loss) and output.loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_keeps_embeddings_and_losses_in_float32():
    model, parts = tiny().eval(), (pixel_items(3), pixel_items(4))
    expected = model(*parts)
    with torch.autocast("cpu", torch.bfloat16):
        output, encoded = model(*parts), model.encode("query", **parts[0])
    assert output.loss.dtype == encoded["both"].dtype == torch.float32
    assert relative_error(output.loss, expected.loss) < 0.1


@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")])
def test_frozen_encoders_do_not_change(frozen):
    model = tiny(freeze=frozen).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(pixel_items(3), pixel_items(4)).loss.backward()
    optimizer.step()
    for part in ("image", "text"):
        encoder = getattr(model, f"{part}_encoder")
        assert (
            encoder.training
            == all(p.grad is not None for p in encoder.parameters())
            == (part not in frozen)
        )
        same = [
            torch.equal(value, before[f"{part}_encoder.{name}"])
            for name, value in encoder.state_dict().items()
        ]
        assert all(same) == (part in frozen)
    assert not torch.equal(model.image_map.weight, before["image_map.weight"])


def test_training_lowers_the_loss_and_keeps_the_scale_in_bounds():
    model, parts = tiny(initial_scale=20.0, weighting="static"), (pixel_items(3), pixel_items(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        with torch.no_grad():
            model.log_scale.add_(0.5)
        output = model(*parts)
        optimizer.zero_grad()
        output.loss.backward()
        assert model.log_scale.item() <= 3
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]


# --- components, configuration and errors ---


@pytest.mark.parametrize("name", COMPONENTS)
def test_removing_a_component_changes_the_loss(name):
    parts = token_pair()
    torch.manual_seed(5)
    whole = UniECS(UniECSConfig(**SMALL)).double()
    less = UniECS(UniECSConfig(**SMALL, without=(name,))).double()
    less.load_state_dict(
        {
            **less.state_dict(),
            **{k: v for k, v in whole.state_dict().items() if k in less.state_dict()},
        }
    )
    a, b = (stacked_views(model.encode("query", **parts[0])) for model in (whole, less))
    embeds = name in ("gate", "cross", "fusion")  # the other options only change the loss
    assert torch.allclose(a, b) != embeds
    first, second = whole(*parts), less(*parts)
    assert abs(first.loss.item() - second.loss.item()) > 1e-6
    remaining = {"cmal": 5, "clal": 6, "imcl": 7}
    assert len(second.losses) == remaining.get(name, 9)


@pytest.mark.parametrize("name", ["paper", "code", "tiny"])
def test_presets_build_models_and_round_trip_through_json(name):
    config = UniECSConfig.preset(name, loss_weights=(1.0,) * 9)
    copy = UniECSConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert copy == config and isinstance(copy.loss_weights, tuple)
    with torch.device("meta"):
        model = UniECS(config)
    tokens = model.image_encoder.patch_embed.num_patches + 1
    assert (tokens, len(model.stages)) == {"paper": (197, 4), "code": (50, 3), "tiny": (17, 2)}[
        name
    ]
    blocks = [len(stage.image_blocks) for stage in model.stages]
    assert blocks == {"paper": [1] * 4, "code": [0, 0, 2], "tiny": [1, 1]}[name]


@pytest.mark.parametrize("preset", ["tiny", "paper", "code"])
@pytest.mark.parametrize("missing", [None, "image", "text"])
def test_first_gradients_are_moderate(preset, missing):
    """A LayerNorm of zeros multiplies gradients by 316, so zeros must not pass many LayerNorms."""
    torch.manual_seed(0)
    model = UniECS(
        UniECSConfig.preset(preset, image=None, text=None, image_dim=24, text_dim=20, dropout=0.0)
    )
    present = {} if missing is None else {f"{missing}_present": torch.arange(4) % 2 == 0}
    items = {
        "image_tokens": torch.randn(4, 6, 24),
        "text_tokens": torch.randn(4, 5, 20),
        "labels": torch.arange(4),
        **present,
    }
    model(query=items, candidate=items).loss.backward()
    assert (
        torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None) < 30
    )


def test_initial_values_match_the_authors_code():
    model = UniECS(UniECSConfig(**{**SMALL, "dim": 64, "image_dim": 400}))
    assert abs(model.image_map.weight.std().item() - 400**-0.5) < 3e-3
    gate = model.stages[0].cross.to_a.gate_proj
    assert gate.weight.abs().max() <= math.sqrt(6 / (129 + 64)) and not gate.bias.any()
    assert (
        model.log_scale.item() == pytest.approx(math.log(10))
        and model.stages[0].text_blocks[0].gamma1 == 1
    )


BAD_CONFIGS = [
    ({"num_heads": 3}, "num_heads: got 3, expected a divisor of dim=8"),
    ({"placement": "before"}, "placement: got 'before', expected one of interleaved, after"),
    ({"without": ("gates",)}, "without: got 'gates', expected some of gate, cross"),
    (
        {"without": ("cmal", "clal", "imcl")},
        "without: got all of cmal, clal, imcl, which leaves no loss",
    ),
    (
        {"without": ("adaptive",), "weighting": "static"},
        "without: got 'adaptive' with weighting 'static'",
    ),
    ({"text_mask": False}, "text_length: got None without text_mask, expected a number"),
    (
        {"text_padding": "encoded"},
        "text_padding: got 'encoded' with text_mask, which leaves padded tokens out, expected 'z",
    ),
    (
        {"indicator": "batch", "missing": "skip"},
        "missing: got 'skip' with indicator 'batch', expected 'constant'",
    ),
    ({"margins": (0.3,)}, r"margins: got \(0.3,\), expected 4 finite numbers"),
    ({"loss_weights": (0.0,) * 9}, "loss_weights: got .*, expected 9 numbers above 0"),
    ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
    (
        {"freeze": ("text",)},
        "freeze: got 'text' with text None, expected encoders that the config has",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_a_bad_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniECSConfig(**{**SMALL, **options})


BAD_ITEMS = [
    ({"image_tokens": None}, "pixel_values and image_tokens: got neither, expected exactly one"),
    (
        {"text_tokens": None, "text_padding_mask": None},
        "input_ids and text_tokens: got neither, expected exactly one",
    ),
    ({"attention_mask": torch.ones(4, 4)}, "attention_mask: got a mask without input_ids"),
    (
        {"image_tokens": torch.zeros(4, 3, 9)},
        r"image_tokens: got shape \(4, 3, 9\), expected \(batch, tokens, 6\)",
    ),
    (
        {"image_tokens": torch.zeros(3, 3, 6), "image_present": None},
        "image and text: got batch sizes 3 and 4",
    ),
    ({"image_present": torch.ones(4)}, r"image_present: got .*, expected bool \(4,\)"),
    ({"labels": torch.zeros(4)}, r"labels: got torch.float32 .*, expected int64 \(4,\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ITEMS)
def test_bad_items_are_refused(changes, message):
    query, candidate = token_pair()
    with pytest.raises(ValueError, match=message):
        random_model()({**query, **changes}, candidate)


def test_unknown_views_and_hard_negatives_are_refused():
    model, (query, candidate) = random_model(), token_pair()
    with pytest.raises(ValueError, match="negative: got hard negatives, expected None"):
        model(query, candidate, candidate)
    del query["labels"]
    with pytest.raises(ValueError, match="views: got .*, expected some of"):
        model.embed(("sound",), **query)
