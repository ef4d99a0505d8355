"""LoRA in the transformers of the five models: what is trained, where, and the merge."""

import copy
import sys

import pytest
import torch
from lora_models import NAMES, batch_of, dropping_model, randomise

import mmfused
from mmfused.models import qwen
from mmfused.models.lora import (
    adapted_layers,
    add_lora,
    check_lora,
    lora_of,
    merge_lora,
    resolve_lora,
    root_of,
)

peft = pytest.importorskip("peft")

LANGUAGE = {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}
VIT = {"qkv", "proj", "fc1", "fc2"}
BERT = {"query", "key", "value", "dense"}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_transformer(name):
    in_mixture = ".mlp.w_" in name or ".mlp.router." in name
    return name.startswith(("host.", "image_encoder.", "text_encoder.")) and not in_mixture


def last_parts(model):
    return {name.rpartition(".")[2] for name in adapted_layers(root_of(model))}


@pytest.mark.parametrize("name", NAMES)
def test_adapters_and_what_is_outside_the_transformers_are_trained(name):
    model = dropping_model(name)
    outside = {key for key in trained(model) if not in_transformer(key)}
    add_lora(model, rank=2)
    found = trained(model)
    assert outside <= found and all("lora_" in key for key in found - outside)
    if name == "moon2":
        assert any(".mlp.w_up" in key for key in found) and "alignment" in found
        assert sum(".router." in key for key in found) == 2
    wanted = {"moon2": LANGUAGE - {"down_proj", "gate_proj", "up_proj"}, "unite": LANGUAGE}
    assert last_parts(model) == wanted.get(name, VIT | BERT)
    assert not any(key.startswith("host.visual.") for key in found)
    model(**batch_of(name)).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, key
    layers = adapted_layers(root_of(model)).values()
    gradients = [layer.lora_B["default"].weight.grad for layer in layers]
    assert all(gradient is not None for gradient in gradients) and any(
        gradient.any() for gradient in gradients
    )
    settings = root_of(model).peft_config["default"]
    assert (settings.r, settings.bias, settings.lora_dropout) == (2, "none", 0.05)


@pytest.mark.parametrize("stem", ["conv", "conv_group"])
def test_the_statistics_of_a_convolutional_stem_are_frozen_too(stem):
    model = add_lora(dropping_model("uniecs", image_stem=stem)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**batch_of("uniecs"))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any("running_mean" in name for name in before) == (stem == "conv")


def test_mixtures_in_some_layers_leave_the_other_layers_to_the_adapters():
    model = add_lora(dropping_model("moon2", moe_every=2))
    names = [name for name in adapted_layers(root_of(model)) if ".mlp." in name]
    assert len(names) == 3 and all(name.startswith("language_model.layers.0.") for name in names)


@pytest.mark.parametrize(
    ("name", "changes", "targets", "expected"),
    [
        ("unite", {}, ["q_proj", "qkv"], {"q_proj", "qkv"}),
        ("unite", {"freeze": ("vision", "language")}, ["proj"], {"proj"}),
        ("unite", {"freeze": ("language",)}, None, LANGUAGE),
        ("uniecs", {"freeze": ("image",)}, None, BERT),
        ("uniecs", {"freeze": ("image",)}, ["fc1", "query"], {"fc1", "query"}),
        ("unica", {"freeze": ("text",)}, None, VIT),
        ("fluid", {"modalities": "text"}, None, BERT),
    ],
)
def test_targets_choose_linear_layers(name, changes, targets, expected):
    model = add_lora(dropping_model(name, **changes), targets=targets)
    layers = adapted_layers(root_of(model))
    assert {key.rpartition(".")[2] for key in layers} == expected
    assert all(isinstance(layer.get_base_layer(), torch.nn.Linear) for layer in layers.values())
    if name == "uniecs" and targets is None:
        assert all(key.startswith("text_encoder.") for key in layers)


def test_a_qwen2_5_vl_has_adapters_in_its_language_model_only():
    """Its vision tower has Linear layers of the same names."""
    host = {
        "model_type": "qwen2_5_vl",
        "text_config": dropping_model("unite").config.host["text_config"],
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "fullatt_block_indexes": [0],
        },
    }
    model = add_lora(dropping_model("unite", host=host, image_size=56))
    names = list(adapted_layers(root_of(model)))
    assert len(names) == 14 and all(name.startswith("language_model.") for name in names)


@pytest.mark.parametrize(
    ("name", "changes", "targets", "message"),
    [
        (
            "unite",
            {},
            ["q_proj", "query"],
            r"targets: got 'query', expected some of 0, 2, down_proj",
        ),
        ("moon2", {}, ["router"], r"lora\.targets: got 'router', expected some of 0, 2, fc1, fc2"),
        ("uniecs", {}, ["image_map"], r"lora\.targets: got 'image_map', expected some of dense"),
        (
            "uniecs",
            {"freeze": ("image", "text")},
            None,
            r"lora\.targets: got None, expected targets",
        ),
        ("uniecs", {"image": None, "text": None}, ["query"], r"got 'query', expected some of \(no"),
    ],
)
def test_targets_that_no_layer_has_are_refused(name, changes, targets, message):
    model = dropping_model(name, **changes)
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, targets=targets)
    assert trained(model) == before and not adapted_layers(model)


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="model: got a model with adapters, expected one without"):
        add_lora(add_lora(dropping_model("unite")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora\.rank: got 0, expected an integer from 1 to"),
        ({"rank": 2.5}, r"lora\.rank: got 2\.5, expected an integer"),
        ({"alpha": 0}, r"lora\.alpha: got 0, expected a number above 0"),
        ({"alpha": "x"}, r"lora\.alpha: got 'x', expected a finite number or None"),
        ({"dropout": 1.0}, r"lora\.dropout: got 1\.0, expected a number from 0 to below 1"),
        ({"dropout": -0.1}, r"lora\.dropout: got -0\.1, expected a number from 0 to below 1"),
        ({"dropout": None}, r"lora\.dropout: got None, expected a finite number"),
        ({"targets": []}, r"lora\.targets: got no names, expected names of Linear layers"),
        ({"targets": "q_proj"}, r"lora\.targets: got 'q_proj', expected a list of strings"),
        ({"targets": [1]}, r"lora\.targets: got \[1\], expected a list of strings"),
        ({"r": 8}, r"lora: got a field 'r', expected rank, alpha, dropout, targets"),
        ([], r"lora: got \[\], expected an object"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_lora(options)


@pytest.mark.parametrize(
    ("name", "changes", "alpha"),
    [
        ("unite", {"stage": 1}, 16),
        ("unite", {"stage": 2}, 64),
        ("moon2", {}, 16),
        ("fluid", {}, 16),
    ],
)
def test_the_default_alpha_is_that_of_the_paper(name, changes, alpha):
    model = dropping_model(name, **changes)
    expected = {"rank": 8, "alpha": alpha, "dropout": 0.05, "targets": None}
    assert resolve_lora({}, model.config) == expected
    given = {"rank": 2, "alpha": 3, "dropout": 0.0, "targets": ["q_proj"]}
    assert resolve_lora(given, model.config) == given
    layer = next(iter(adapted_layers(root_of(add_lora(model))).values()))
    assert layer.scaling == {"default": alpha / 8}


@pytest.mark.parametrize(("name", "part"), [("unite", "language"), ("uniecs", "text")])
def test_adapters_in_a_frozen_part_follow_the_mode_of_the_model(name, part):
    targets = {"language": ["q_proj"], "text": ["query"]}[part]
    model = add_lora(dropping_model(name, freeze=(part,)), dropout=0.5, targets=targets)
    frozen = model.text_encoder if part == "text" else model.host.language_model
    layers = list(adapted_layers(root_of(model)).values())
    for training in (True, False, True):
        model.train(training)
        assert all(layer.lora_dropout["default"].training == training for layer in layers)
        others = [part for part in frozen.modules() if "lora" not in type(part).__module__]
        inner = {id(part) for layer in layers for part in layer.modules()}
        assert not any(part.training for part in others if id(part) not in inner)
        assert not any(layer.get_base_layer().training for layer in layers)
    fresh = add_lora(dropping_model(name, freeze=(part,)).eval(), targets=targets)
    assert not any(module.training for module in fresh.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_merge_is_that_of_peft(name):
    model = dropping_model(name)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    add_lora(model, rank=2, alpha=3)
    randomise(model)
    settings = copy.deepcopy(root_of(model).peft_config["default"])
    wrapped = peft.get_peft_model(root_of(plain), settings)
    state = {f"base_model.model.{k}": v for k, v in root_of(model).state_dict().items()}
    assert not wrapped.load_state_dict(state, strict=False).unexpected_keys
    expected = wrapped.merge_and_unload().state_dict()
    before = model.eval()(**batch_of(name)).loss
    assert merge_lora(model) is model and list(model.state_dict()) == names
    found = root_of(model).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not adapted_layers(model) and not hasattr(root_of(model), "peft_config")
    assert lora_of(model) is None
    assert torch.allclose(model(**batch_of(name)).loss, before, rtol=1e-9)


def test_adapters_compile_without_a_graph_break(monkeypatch):
    """The vision tower is left out, because its loop over pictures breaks the graph."""
    monkeypatch.undo()  # the compiler would trace into conftest's patched torch.empty
    model = randomise(add_lora(dropping_model("unite"), dropout=0.5)).eval()
    parts = batch_of("unite")
    present = parts["query"]["image_present"]
    pictures = qwen.picture_tokens(model.host, parts["query"]["pixel_values"], present)
    monkeypatch.setattr(qwen, "picture_tokens", lambda *_: pictures)
    compiled = torch.compile(lambda: model(**parts).loss, fullgraph=True, backend="eager")
    with mmfused.backend("composed"), torch.no_grad():
        assert torch.allclose(compiled(), model(**parts).loss, rtol=1e-12)


def test_peft_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft is not installed: pip install 'mmfused\[lora\]'"):
        add_lora(dropping_model("unite"))
