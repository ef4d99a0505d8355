"""A second run continues a first one: its model, weights and tokenizer, unless told otherwise."""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import training_runs
from starting_parts import (
    HOSTED,
    TEXTS,
    assert_equal,
    initial_weights,
    save_encoders,
    save_host,
    save_parts,
    settings,
)
from training_runs import assert_resumes

from mmfused.cli import main
from mmfused.cli.train import add_arguments
from mmfused.cli.train_options import config_options
from mmfused.data import train_tokenizer
from mmfused.models import MODELS, qwen
from mmfused.training.files import read_json, read_tensors
from mmfused.training.resume import find_start
from mmfused.training.run import prepare, train

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

few_products = training_runs.few_products
# Sizes that no preset has.
FIRST = {
    "fluid": {"dim": 24, "num_queries": 3, "num_heads": 2, "gate_hidden": (8,), "num_experts": 3},
    "uniecs": {"dim": 24, "num_heads": 2, "cross_layers": 1},
    "unica": {"num_heads": 2, "ffn": 20},
    "moon2": {"num_experts": 3},
    "unite": {"stage": 1},
}
SECOND = {
    "fluid": {"top_k": 1},
    "uniecs": {"temperature": 0.1},
    "unica": {"temperature": 0.1},
    "moon2": {"temperature": 0.1},
    "unite": {"stage": 2},
}


@pytest.fixture(scope="module", params=MODELS)
def first(request, tmp_path_factory):
    """Return the name of a model and the folder of a run from pretrained parts of odd sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    parts = save_parts(request.param, folder / "parts")
    changes = {"model_options": FIRST[request.param], **parts}
    train(settings(request.param, folder / "one", image_size=32, **changes))
    shutil.rmtree(folder / "parts")
    return request.param, folder / "one"


@pytest.fixture
def unite_run(tmp_path):
    train(settings("unite", tmp_path / "one", **save_host(tmp_path / "host"), steps=1))
    return tmp_path / "one"


def test_the_second_run_starts_with_the_last_weights_of_the_first(first, tmp_path):
    model, one = first
    two = settings(model, tmp_path / "two", init=str(one), model_options=SECOND[model])
    trained = safetensors.torch.load_file(one / "model.safetensors")
    assert_equal(initial_weights(two), trained)
    train(two)
    saved = [read_json(out / "config.json")["model"] for out in (one, tmp_path / "two")]
    assert saved[1] == {**saved[0], **SECOND[model]} and saved[1] != saved[0]
    moved = safetensors.torch.load_file(tmp_path / "two" / "model.safetensors")
    assert any(not torch.equal(moved[name], tensor) for name, tensor in trained.items())


def test_the_second_run_resumes_bit_for_bit(first, tmp_path, monkeypatch):
    model, one = first
    changes = {"model_options": SECOND[model]}
    assert_resumes(partial(settings, model), one, tmp_path, monkeypatch, **changes)


def test_a_part_beside_init_replaces_that_part_alone(first, tmp_path):
    model, one = first
    parts = save_parts(model, tmp_path / "parts", hidden=28)
    if model not in HOSTED:
        del parts["image_encoder"]
    (name, source), *_ = parts.items()
    built = prepare(settings(model, tmp_path / "two", init=str(one), **parts), None).model
    start = built.state_dict()
    assert built.picture_size == 32  # as in the first run
    trained = safetensors.torch.load_file(one / "model.safetensors")
    kept = {key for key in trained if not key.startswith(f"{name}.")}
    assert all(torch.equal(start[key], trained[key]) for key in kept)
    assert bool(kept) == (model != "unite")
    weights = safetensors.torch.load_file(f"{source}/model.safetensors")
    key = "embed_tokens.weight" if name == "host" else "embeddings.word_embeddings.weight"
    (given,) = [tensor for found, tensor in weights.items() if found.endswith(key)]
    (loaded,) = [start[found] for found in start if found.endswith(key)]
    assert torch.equal(loaded, given)


def test_the_tokenizer_is_that_of_the_newest_part(unite_run, tmp_path):
    def tokens(**changes):
        config = settings("unite", tmp_path / "two", init=str(unite_run), **changes)
        training = prepare(config, None)
        return training.model.config.tokens, training.tokenizer.get_vocab()

    other = qwen.add_vision_tokens(qwen.enclose_texts(train_tokenizer(["no thing"])))
    other.save_pretrained(tmp_path / "words")
    own, replaced = tokens(), tokens(tokenizer=str(tmp_path / "words"))
    assert own[0] == read_json(unite_run / "config.json")["model"]["tokens"]
    assert replaced == (MODELS["unite"].config.of_tokenizer(other)["tokens"], other.get_vocab())
    assert tokens(**save_host(tmp_path / "host")) == own and replaced != own


def test_a_checkpoint_of_another_picture_size_of_the_host_continues(unite_run, tmp_path):
    (checkpoint,) = (unite_run / "checkpoints").iterdir()
    changes = {"init": str(checkpoint), "model_options": {"same_id": "sum"}}
    assert prepare(settings("unite", tmp_path, **changes), None).model.picture_size == 128
    training = prepare(settings("unite", tmp_path, **changes, image_size=48), None)
    assert training.model.picture_size == 48
    assert_equal(training.model.state_dict(), read_tensors(checkpoint / "model.safetensors"))


UNFIT = [
    (
        {"model_options": {"host": {"text_config": {"intermediate_size": 20}}}},
        "mlp.gate_proj.weight",
    ),
    ({"model_options": {"host": {"vision_config": {"embed_dim": 12}}}}, "visual.patch_embed"),
    ({"model_options": {"host": {"text_config": {"vocab_size": 500}}}}, "embed_tokens.weight"),
    ({"model_options": {"stage": 3}}, "stage: got 3, expected one of 1, 2"),
    ({"image_size": 20}, "image_size: got 20, expected a multiple of 8"),
    ({"preset": "big"}, "preset: got 'big', expected one of paper, code, tiny"),
]


@pytest.mark.parametrize(("changes", "message"), UNFIT, ids=[message for _, message in UNFIT])
def test_what_does_not_fit_the_run_is_refused_before_data_is_read(
    unite_run, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("mmfused.training.run.load_data", None)
    with pytest.raises(ValueError, match=message) as caught:
        train(settings("unite", tmp_path / "two", init=str(unite_run), **changes))
    assert "\n" not in str(caught.value)
    if "host" in changes.get("model_options", {}):
        assert f"init: {unite_run / 'model.safetensors'} holds" in str(caught.value)
    assert not (tmp_path / "two").exists()


def test_a_tokenizer_that_is_too_large_for_the_run_is_refused(unite_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmfused.training.run.load_data", None)
    train_tokenizer(TEXTS, vocab_size=400).save_pretrained(tmp_path / "words")
    changes = {"init": str(unite_run), "tokenizer": str(tmp_path / "words")}
    message = rf"tokenizer: got \d+ tokens, expected at most \d+, the vocabulary of {unite_run}"
    with pytest.raises(ValueError, match=message):
        train(settings("unite", tmp_path / "two", **changes))


def test_a_part_of_another_width_and_a_run_of_another_model_are_refused(tmp_path, monkeypatch):
    train(settings("uniecs", tmp_path / "one", **save_encoders(tmp_path / "parts"), steps=1))
    monkeypatch.setattr("mmfused.training.run.load_data", None)
    wide = save_encoders(tmp_path / "wide", width=20)["text_encoder"]
    init = {"init": str(tmp_path / "one")}
    message = (
        r"init: .*one/model.safetensors holds .*text_map.weight: got .* 16\), expected .* 20\)"
    )
    with pytest.raises(ValueError, match=message):
        train(settings("uniecs", tmp_path / "two", **init, text_encoder=wide))
    with pytest.raises(ValueError, match="a run of 'uniecs', expected a run of 'unica'"):
        train(settings("unica", tmp_path / "two", **init))
    with pytest.raises(ValueError, match=r"holds .*image_encoder.pos_embed: got .*, expected"):
        train(settings("uniecs", tmp_path / "two", **init, image_size=64))
    with pytest.raises(ValueError, match="patch_size: got 8 with init, expected no patch_size"):
        settings("uniecs", tmp_path / "two", **init, patch_size=8)


def test_a_classifier_keeps_its_classes(tmp_path):
    def data(labels):
        folder = tmp_path / str(max(labels))
        folder.mkdir()
        rows = "".join(f",thing {label},{label}\n" for label in labels)
        (folder / "metadata.csv").write_text(f"file_name,text,label\n{rows}")
        return str(folder)

    one, two, three = data([0, 1, 2]), data([0, 0, 1]), data([0, 1, 3])
    options = {"modalities": "text", "batch_size": 2, "steps": 1}
    train(settings("fluid", tmp_path / "one", data=one, val=one, **options))
    options["init"] = str(tmp_path / "one")
    again = settings("fluid", tmp_path / "two", data=two, val=one, **options)
    train(again)
    assert read_json(tmp_path / "two" / "config.json")["model"]["num_classes"] == 3
    again.resume = True
    assert train(again)["val_rows"] == 3
    for sets, name in (((three, one), "data"), ((two, three), "val")):
        with pytest.raises(
            ValueError, match=f"{name}: got the label 3, expected labels from 0 to 2"
        ):
            train(settings("fluid", tmp_path / "x", data=sets[0], val=sets[1], **options))
    with pytest.raises(ValueError, match="data: got the label 2, expected labels from 0 to 1"):
        changes = {**options, "init": None, "model_options": {"num_classes": 2}}
        train(settings("fluid", tmp_path / "x", data=one, val=one, **changes))


def test_the_command_takes_preset_and_modalities_of_the_run(tmp_path):
    run = settings("fluid", tmp_path / "one", preset="code", modalities="text")
    run.preset, values = "code", MODELS["fluid"].config.preset("tiny", num_classes=2).to_dict()
    (tmp_path / "one").mkdir()
    contents = {"mmfused": "0", "training": run.to_dict(), "model": values, "image_size": 32}
    (tmp_path / "one" / "config.json").write_text(json.dumps(contents))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--data", "x", "--out", "y", "--init", str(tmp_path / "one")]
    options = config_options(parser.parse_args(given))
    assert (options["preset"], options["modalities"], options["lr"]) == ("code", "text", 2e-5)
    options = config_options(
        parser.parse_args([*given, "--preset", "tiny", "--modalities", "both"])
    )
    assert (options["preset"], options["modalities"], "lr" in options) == ("tiny", "both", False)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "option", ["name=x", "preset=x", "cls=1", "values=1", "vocab_size=5", "patch_size=16"]
)
def test_an_option_that_is_no_field_is_refused_by_name(tmp_path, capsys, model, option):
    command = ["train", "--data", "generated", "--model", model, "--option", option]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    name = option.partition("=")[0]
    assert f"Config: got a field '{name}', expected " in capsys.readouterr().err


@pytest.mark.parametrize("model", ["fluid", "uniecs", "unica"])
@pytest.mark.parametrize("part", ["image", "text"])
def test_training_needs_the_encoders_of_its_modalities(tmp_path, capsys, model, part):
    command = ["train", "--data", "generated", "--model", model, "--option", f"{part}=null"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert f"{part}: got None, expected " in capsys.readouterr().err


def test_an_option_changes_a_pretrained_encoder_within_its_weights(tmp_path, monkeypatch):
    parts = save_encoders(tmp_path / "parts")
    config = settings(
        "uniecs", tmp_path / "run", model_options={"text": {"hidden_dropout_prob": 0.4}}, **parts
    )
    text = prepare(config, None).model.config.text
    assert (text["hidden_dropout_prob"], text["intermediate_size"]) == (0.4, 24)
    monkeypatch.setattr("mmfused.training.run.load_data", None)
    message = "text_encoder: the model's options change its weights: .*intermediate.dense.weight"
    with pytest.raises(ValueError, match=message) as caught:
        wide = {"model_options": {"text": {"intermediate_size": 20}}}
        train(settings("uniecs", tmp_path / "run", **wide, **parts))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_transformers_default_is_checked(tmp_path, monkeypatch):
    """A config.json need not have the fields with transformers' default values."""
    monkeypatch.setattr("mmfused.training.run.load_data", None)
    words = [f"word{number}" for number in range(31000)]
    tokenizer = train_tokenizer(words, vocab_size=31000)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(tmp_path / "words")
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8)).save_pretrained(
        tmp_path / "bert"
    )
    given = {"text_encoder": str(tmp_path / "bert"), "tokenizer": str(tmp_path / "words")}
    with pytest.raises(ValueError, match="expected at most 30522, the vocabulary of .*bert"):
        train(settings("uniecs", tmp_path / "run", **given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 1}, "UNITEConfig: got a field 'stages', expected host, tokens, "),
        ({"stage": 3}, "stage: got 3, expected one of 1, 2"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a finite number"),
    ],
)
def test_options_of_wrong_names_and_types_are_refused_before_a_host_is_loaded(
    tmp_path, options, message
):
    damaged = tmp_path / "host"
    damaged.mkdir()
    config = settings("unite", tmp_path / "run", host=str(damaged), model_options=options)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_replace_the_run_that_it_starts_from(unite_run):
    before = sorted(path.name for path in unite_run.rglob("*"))
    options = {"overwrite": True, "model_options": {"stage": 2}}
    for init in (unite_run, *unite_run.glob("checkpoints/step-*")):
        config = settings("unite", unite_run, init=str(init), **options)
        with pytest.raises(ValueError, match="init: got .* which overwrite removes, expected anot"):
            train(config)
    assert sorted(path.name for path in unite_run.rglob("*")) == before


def test_a_hub_name_is_no_folder_in_the_run_that_is_replaced(unite_run, monkeypatch):
    monkeypatch.chdir(unite_run)
    config = settings("unite", ".", host="Qwen/Qwen2-VL-2B-Instruct", overwrite=True)
    assert find_start(config, Path(".")) is None
