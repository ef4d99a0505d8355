"""`mmfused train` with LoRA and gradient checkpointing: saving, resuming, continuing, merging."""

import argparse
import json
import shutil
from functools import partial

import pytest
import torch
import training_runs
from retrieval_models import LANGUAGE
from training_runs import assert_resumes, assert_same_run, fail_in_step, records

from mmfused.cli import main
from mmfused.cli.train import add_arguments
from mmfused.cli.train_options import config_options
from mmfused.data import GeneratedProducts, train_tokenizer
from mmfused.models import MODELS, qwen
from mmfused.models.adapters import merge_adapter
from mmfused.models.lora import adapted_layers, lora_of, merge_lora, root_of
from mmfused.training.files import read_json, read_tensors
from mmfused.training.run import TrainConfig, load_run, prepare, train

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

few_products = training_runs.few_products
LORA = {"rank": 2, "alpha": 4, "dropout": 0.3}
NEW = {"rank": 3, "targets": ["q_proj", "query"]}
FROM_HOST = ("unite",)  # the other models have the preset "tiny"


def settings(model, out, **changes) -> TrainConfig:
    common = {"steps": 2, "batch_size": 4, "max_length": 24, "lr": 1e-2, "threads": 1}
    common |= {"device": "cpu", "backend": "composed", "progress": False, "save_every": 1}
    return TrainConfig(str(out), model=model, **{"val_every": 3, **common, **changes})


def save_host(folder):
    """Write a host with patches of 4 pixels, and more rows of words than the tokenizer has."""
    texts = [text for text in GeneratedProducts("train", size=60).texts if text]
    tokenizer = qwen.add_vision_tokens(qwen.enclose_texts(train_tokenizer(texts, vocab_size=200)))
    torch.manual_seed(4)
    sizes = {"text_config": {**LANGUAGE, "vocab_size": len(tokenizer) + 37}}
    sizes["vision_config"] = {"depth": 1, "embed_dim": 8, "num_heads": 1, "patch_size": 4}
    qwen.build_qwen2_vl(sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=MODELS)
def first(request, tmp_path_factory):
    """Return the name of a model and the folder of a run with LoRA."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    part = {"host": save_host(folder / "host"), "image_size": 32} if name in FROM_HOST else {}
    train(
        settings(
            name, folder / "one", lora=LORA, model_options=stage(name, 1) | sizes_of(name), **part
        )
    )
    if part:
        shutil.rmtree(folder / "host")
    return name, folder / "one"


def stage(name, number):
    return {"stage": number} if name == "unite" else {}


def sizes_of(name):
    if name in ("moon2", "unite"):
        return {}
    small = {"dim": 16, "num_heads": 2, "cross_layers": 1} if name == "uniecs" else {}
    return {**training_runs.ENCODERS, **small}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def targets_of(name):
    return {**NEW, "targets": ["q_proj"] if name in ("moon2", "unite") else ["query"]}


# --- the folder of a run ---


def test_a_run_saves_its_adapters_and_loads_without_its_source(first):
    name, one = first
    saved = read_json(one / "config.json")
    assert saved["lora"] == {**LORA, "targets": None} and saved["training"]["lora"] == LORA
    model, _ = load_run(one)
    weights = read_tensors(one / "model.safetensors")
    assert lora_of(model) == saved["lora"] and same(model.state_dict(), weights)
    adapter = read_tensors(one / "adapter/adapter_model.safetensors")
    layers = adapted_layers(root_of(model))
    assert len(adapter) == 2 * len(layers) > 0
    for key, tensor in adapter.items():
        key = key.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(root_of(model).state_dict()[f"{key}.default.weight"], tensor)
    checkpoint, _ = load_run(one / "checkpoints/step-00000002")
    assert same(checkpoint.state_dict(), weights)


def test_training_moves_the_adapters_and_what_is_outside_the_transformers(first, tmp_path):
    name, one = first
    two = settings(name, tmp_path / "two", init=str(one), lora=LORA)
    before = prepare(two, None).model
    names = {key for key, parameter in before.named_parameters() if parameter.requires_grad}
    train(two)
    after = load_run(two.out)[0].state_dict()
    moved = {key for key, x in before.named_parameters() if not torch.equal(after[key], x)}
    assert moved <= names and any("lora_B" in key for key in moved)
    state = read_tensors(tmp_path / "two/checkpoints/step-00000002/optimizer.safetensors")
    assert {key.rpartition(".")[0] for key in state} <= names


@pytest.mark.parametrize("first", ["uniecs", "unite"], indirect=True)
def test_a_run_with_lora_resumes_bit_for_bit(first, tmp_path, monkeypatch):
    name, one = first
    lora = {**LORA, "dropout": 0.5}
    assert_resumes(partial(settings, name), one, tmp_path, monkeypatch, lora=lora)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        one_file, other = (tmp_path / run / "adapter" / file for run in ("whole", "resumed"))
        assert one_file.read_bytes() == other.read_bytes()
    plain = settings(name, tmp_path / "plain", init=str(one), lora=LORA, steps=3)
    train(plain)
    assert records(plain.out) != records(tmp_path / "whole")  # dropout has an effect


def test_a_plain_run_in_the_same_folder_removes_the_adapters(tmp_path):
    out = tmp_path / "run"
    train(settings("uniecs", out, lora=LORA, steps=1, model_options=sizes_of("uniecs")))
    (out / "adapter/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds files that no run made \(adapter/notes\.txt"):
        train(settings("uniecs", out, steps=1, overwrite=True))
    (out / "adapter/notes.txt").unlink()
    train(settings("uniecs", out, steps=1, overwrite=True))
    assert not (out / "adapter").exists() and read_json(out / "config.json")["lora"] is None
    assert lora_of(load_run(out)[0]) is None


def test_a_missing_adapter_folder_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mmfused.training.run_folder.save_adapter", lambda path, model: path.mkdir()
    )
    inner = shutil.rmtree
    monkeypatch.setattr(
        "mmfused.training.run_folder.draw_curves",
        lambda *args: (inner(tmp_path / "run/adapter"), args[1].write_bytes(b""))[1],
    )
    with pytest.raises(RuntimeError, match="lacks adapter, which the run wrote"):
        train(settings("uniecs", tmp_path / "run", lora=LORA, steps=1))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, r"config\.json is corrupt: lora\.rank: got 0, expected an integer from 1"),
        ([], r"config\.json is corrupt: lora: got \[\], expected an object"),
        ({"targets": ["x"]}, r"holds model settings that .* cannot use: lora\.targets: got 'x'"),
        ({"rank": 3}, r"holds the weights of another model: .*: got shape \(2, .*expected shape"),
        (None, r"holds the weights of another model: .*got no tensor, expected shape"),
    ],
)
@pytest.mark.parametrize("first", ["uniecs"], indirect=True)
def test_damaged_options_of_a_run_are_refused(first, tmp_path, lora, message):
    _, one = first
    shutil.copytree(one, tmp_path / "copy")
    saved = read_json(one / "config.json")
    (tmp_path / "copy/config.json").write_text(json.dumps({**saved, "lora": lora}))
    with pytest.raises(ValueError, match=message) as error:
        load_run(tmp_path / "copy")
    assert "\n" not in str(error.value)


# --- continuing ---


def test_the_adapters_of_a_run_go_on(first, tmp_path):
    name, one = first
    two = settings(name, tmp_path / "two", init=str(one), model_options=stage(name, 2))
    model = prepare(two, None).model
    assert same(model.state_dict(), read_tensors(one / "model.safetensors"))
    assert all(
        parameter.requires_grad == ("lora_" in key)
        for key, parameter in model.named_parameters()
        if key.startswith(("image_encoder.", "text_encoder.", "host.visual"))
    )
    train(two)
    assert read_json(tmp_path / "two/config.json")["lora"] == {**LORA, "targets": None}


def test_new_adapters_start_from_the_merged_weights(first, tmp_path):
    name, one = first
    lora = targets_of(name)
    two = settings(name, tmp_path / "two", init=str(one), lora=lora, model_options=stage(name, 2))
    model = prepare(two, None).model
    alpha = 64 if name == "unite" else 16
    assert lora_of(model) == {"rank": 3, "alpha": alpha, "dropout": 0.05, **lora}
    expected = merge_lora(load_run(one)[0])
    for layer in adapted_layers(root_of(model)).values():
        assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()
    found = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in model.state_dict().items()
        if ".lora_" not in key
    }
    assert same(found, expected.state_dict())


def test_a_whole_training_starts_from_the_merged_weights(first, tmp_path):
    name, one = first
    two = settings(name, tmp_path / "two", init=str(one), lora="none", model_options=stage(name, 2))
    model = prepare(two, None).model
    assert lora_of(model) is None and not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(model.state_dict(), merge_lora(load_run(one)[0]).state_dict())
    train(two)
    assert not (tmp_path / "two/adapter").exists()
    three = settings(name, tmp_path / "three", init=str(tmp_path / "two"), lora=targets_of(name))
    plain = read_tensors(tmp_path / "two/model.safetensors")
    found = merge_lora(prepare(three, None).model).state_dict()  # B = 0
    assert same(found, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"host": "host"},
            "lora: got nothing with host in place of a part of .*, which has adapters",
        ),
        ({"lora": {"targets": ["x"]}}, r"lora\.targets: got 'x', expected some of "),
        (
            {"model_options": {"host": {"text_config": {"intermediate_size": 8}}}},
            "init: .*got shape",
        ),
    ],
    ids=["host", "targets", "sizes"],
)
def test_what_does_not_fit_the_run_is_refused_before_data_is_read(
    tmp_path, monkeypatch, changes, message
):
    host = save_host(tmp_path / "host")
    train(settings("unite", tmp_path / "one", host=host, image_size=32, lora=LORA, steps=1))
    changes = {**changes, "host": host} if "host" in changes else changes
    two = settings("unite", tmp_path / "two", init=str(tmp_path / "one"), **changes)
    monkeypatch.setattr("mmfused.training.run.load_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=message) as error:
        train(two)
    assert "\n" not in str(error.value) and not (tmp_path / "two").exists()


def test_a_new_host_beside_init_takes_new_adapters(tmp_path):
    host = save_host(tmp_path / "host")
    train(settings("unite", tmp_path / "one", host=host, image_size=32, lora=LORA, steps=1))
    two = settings(
        "unite",
        tmp_path / "two",
        init=str(tmp_path / "one"),
        host=host,
        lora=NEW | {"targets": ["q_proj"]},
    )
    found = merge_lora(prepare(two, None).model).host.state_dict()
    assert same(found, qwen.pretrained_qwen2_vl(host)[1].state_dict())


# --- an adapter of the host ---


def test_an_adapter_is_merged_into_the_host_before_training(tmp_path):
    source = save_host(tmp_path / "host")
    host = transformers.AutoModel.from_pretrained(source)
    wrapped = peft.get_peft_model(host, peft.LoraConfig(r=2, target_modules=["q_proj", "qkv"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    config = settings(
        "unite", tmp_path / "one", host=source, adapter=str(tmp_path / "adapter"), image_size=32
    )
    model = prepare(config, None).model
    assert same(model.host.state_dict(), wrapped.merge_and_unload().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain = prepare(settings("unite", tmp_path / "x", host=source, image_size=32), None).model
    merged = merge_adapter(plain, tmp_path / "adapter")
    assert same(merged.state_dict(), model.state_dict())


def test_a_damaged_adapter_is_refused_before_the_host_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfused.training.initial.pretrained_qwen2_vl", lambda _: pytest.fail())
    config = settings("unite", tmp_path / "x", host="host", adapter=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"adapter: .*adapter_config\.json is missing"):
        prepare(config, None)


# --- gradient checkpointing ---


@pytest.mark.parametrize("first", ["uniecs", "unite"], indirect=True)
def test_checkpointing_changes_nothing_but_memory(first, tmp_path, monkeypatch):
    name, one = first
    enabled = []
    inner = training_runs.training.Training.__init__

    def init(self, config, model, *args, **options):
        flags = [getattr(part, "gradient_checkpointing", False) for part in model.modules()]
        flags += [getattr(part, "grad_checkpointing", False) for part in model.modules()]
        enabled.append(any(flags))
        inner(self, config, model, *args, **options)

    monkeypatch.setattr(training_runs.training.Training, "__init__", init)
    changes = {"init": str(one), "lora": {**LORA, "dropout": 0.5}, "steps": 3, "grad_cache": 3}
    train(settings(name, tmp_path / "plain", **changes))
    with monkeypatch.context() as patch:
        fail_in_step(patch, 2)
        with pytest.raises(OSError, match="power failure"):
            train(settings(name, tmp_path / "other", **changes))
    train(settings(name, tmp_path / "other", **changes, grad_checkpointing=True, resume=True))
    assert enabled == [False, False, True]
    assert_same_run(tmp_path / "plain", tmp_path / "other")


def test_an_encoder_that_cannot_be_checkpointed_is_refused_before_data_is_read(
    tmp_path, monkeypatch
):
    text = {"model_type": "mpnet", "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"text": {**text, "intermediate_size": 16, "vocab_size": 3000}}
    monkeypatch.setattr("mmfused.training.run.load_data", lambda *_: pytest.fail("data was read"))
    config = settings("uniecs", tmp_path / "x", model_options=options, grad_checkpointing=True)
    with pytest.raises(ValueError, match="grad_checkpointing: got a text_encoder of type 'mpnet'"):
        train(config)


# --- settings and command line ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, r"lora\.rank: got 0, expected an integer from 1"),
        ({"lora": {"r": 8}}, "lora: got a field 'r', expected rank, alpha, dropout, targets"),
        ({"lora": 8}, "lora: got 8, expected an object or 'none' or None"),
        ({"lora": "all"}, "lora: got 'all', expected an object or 'none' or None"),
        (
            {"adapter": "x"},
            "adapter: got 'x' without host, expected a host, into which the adapter",
        ),
        ({"adapter": " ", "host": "x"}, "adapter: got ' ', expected a non-empty string"),
        ({"grad_checkpointing": 1}, "grad_checkpointing: got 1, expected True or False"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("x", model="unite", **changes)


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = parser.parse_args(["--data", "d", "--out", "o", "--model", "unite", *flags])
    return TrainConfig(**config_options(given))


def test_the_flags_set_the_settings():
    options = "rank=2,alpha=8.5,dropout=0.1,targets=q_proj+v_proj"
    flags = ("--host", "h", "--adapter", "a", "--grad-checkpointing")
    config = parsed("--lora", options, *flags)
    wanted = {"rank": 2, "alpha": 8.5, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
    assert config.lora == wanted and config.adapter == "a" and config.grad_checkpointing
    assert TrainConfig.from_dict(config.to_dict()) == config
    config = parsed("--lora", "none", "--no-grad-checkpointing")
    assert config.lora is None and not config.grad_checkpointing
    assert TrainConfig("x", init="y", lora="none").lora == "none"
    config = parsed()
    assert config.lora is None and config.adapter is None and not config.grad_checkpointing


@pytest.mark.parametrize("given", ["8", "rank", "rank=8,", "=8", ""])
def test_a_malformed_flag_is_refused(given):
    with pytest.raises(ValueError, match=r"lora: got .*, expected NAME=VALUE,\.\. or none"):
        parsed("--lora", given)


def test_a_name_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match="lora: got targets twice in 'targets=a,targets=b', expec"):
        parsed("--lora", "targets=a,targets=b")


@pytest.mark.parametrize("first", ["uniecs", "unite"], indirect=True)
def test_the_command_embeds_with_a_run_that_has_adapters(first, tmp_path, capsys):
    _, one = first
    out = str(tmp_path / "items.npz")
    flags = ["--checkpoint", str(one), "--data", "generated", "--out", out, "--device", "cpu"]
    assert main(["embed", *flags]) == 0
