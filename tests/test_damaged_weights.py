"""Damaged folders of hosts and encoders are refused in one sentence with the file and the key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from test_exported_folders import TEXT, build

from mmfused.models.pretrained import pretrained_text, pretrained_vit
from mmfused.models.qwen import build_qwen2_vl, pretrained_qwen2_vl
from mmfused.models.qwen_export import save_host

INDEX = "model.safetensors.index.json"
BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 90}
LOADERS = {"host": pretrained_qwen2_vl, "text encoder": pretrained_text}
LAST = {
    "host": "model.layers.1.mlp.up_proj.weight",
    "text encoder": "bert.encoder.layer.1.output.dense.weight",
}


@pytest.fixture
def folders(tmp_path):
    """Return a folder for each argument. The host has the layout of transformers 4."""
    save_host(*build(), tmp_path / "host")
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**BERT, hidden_size=16))
    bert.save_pretrained(tmp_path / "text encoder")
    return {name: tmp_path / name for name in LOADERS}


def read(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def write(folder, weights, name="model.safetensors"):
    safetensors.torch.save_file(weights, folder / name, {"format": "pt"})


def split(folder):
    """Split the weights into two files with an index; return the names of the files."""
    weights, names = read(folder), ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    keys = sorted(weights)
    for place, name in enumerate(names):
        write(folder, {key: weights[key] for key in keys[place::2]}, name)
    (folder / "model.safetensors").unlink()
    index = {key: names[place % 2] for place, key in enumerate(keys)}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return names


def change(folder, **fields):
    """Change fields of config.json; a dict updates the field."""
    values = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(values))


def cut(folder, key):
    os.truncate(folder / "model.safetensors", 500)


def cut_part(folder, key):
    os.truncate(folder / split(folder)[1], 500)


def lose_part(folder, key):
    (folder / split(folder)[1]).unlink()


def forget_part(folder, key):
    first, _ = split(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    kept = {name: part for name, part in index.items() if part == first and name != key}
    (folder / INDEX).write_text(json.dumps({"weight_map": kept}))


def cut_index(folder, key):
    split(folder)
    (folder / INDEX).write_text("{")


def drop(folder, key):
    weights = read(folder)
    del weights[key]
    write(folder, weights)


def reshape(folder, key):
    write(folder, {**read(folder), key: torch.zeros(3, 5)})


def quantise(folder, key):
    weights = read(folder)
    write(folder, {**weights, key: weights[key].to(torch.int8)})


def add_layer(folder, key):
    weights = read(folder)
    write(folder, {**weights, key.replace(".1.", ".2."): weights[key].clone()})


def prefix(folder, key):
    write(folder, {f"base_model.{name}": tensor for name, tensor in read(folder).items()})


def only_pickle(folder, key):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_adapter(folder, key):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


DAMAGE = {
    cut: "{folder}/model.safetensors is truncated, corrupt or not a safetensors file",
    cut_part: "{folder}/model-2-of-2.safetensors is truncated, corrupt or not a safetensors file",
    lose_part: "{folder}/model-2-of-2.safetensors is missing",
    forget_part: "{folder}/model.safetensors.index.json lacks",
    cut_index: "{folder}/model.safetensors.index.json is truncated or corrupt",
    drop: "{folder}/model.safetensors lacks 1 weights of {type}: {key}, expected all",
    reshape: "{folder}/model.safetensors holds the weights of another model: {key}: "
    "got shape (3, 5), expected {shape}, as in its config.json",
    quantise: "{folder}/model.safetensors: {key}: got torch.int8, expected floating-point numbers",
    add_layer: "{folder}/model.safetensors holds 1 weights that a {type} with its config.json does "
    "not have: {added}, expected as many layers as in config.json",
    prefix: "{folder}/model.safetensors lacks",
    only_pickle: "{folder} lacks a file, expected config.json and *.safetensors; pytorch_model.bin "
    "is a pickle, which can run any code when it is loaded",
    only_adapter: "{folder} lacks a file, expected config.json and *.safetensors; "
    "adapter_model.safetensors is an adapter",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", LOADERS)
def test_damaged_weights_are_refused_with_the_file_and_the_key(folders, capfd, name, damage):
    folder, key = folders[name], LAST[name]
    shape = tuple(read(folder)[key].shape)
    # A missing key is reported by its name in the model.
    renamed = key.replace("model.layers", "model.language_model.layers").removeprefix("bert.")
    damage(folder, key)
    capfd.readouterr()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        LOADERS[name](str(folder))
    expected = DAMAGE[damage].format(
        folder=folder,
        key=renamed if damage is drop else key,
        added=key.replace(".1.", ".2."),
        type="qwen2_vl" if name == "host" else "bert",
        shape=shape,
    )
    assert str(caught.value).startswith(f"{name}: {expected}")
    assert capfd.readouterr() == ("", "")


CONFIGS = [
    ({"text_config": {"num_attention_heads": 0}}, "text_config.num_attention_heads: got 0, "),
    ({"text_config": {"num_hidden_layers": "2"}}, "text_config.num_hidden_layers: got '2', "),
    ({"text_config": {"hidden_act": "relu7"}}, "text_config.hidden_act: got 'relu7', expected the"),
    (
        {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [9, 9, 9]}}},
        "text_config.rope_parameters.mrope_section: got [9, 9, 9], expected numbers with the sum 4",
    ),
    (
        {"text_config": {"rope_parameters": {"rope_type": "default"}}},
        "text_config.rope_parameters.mrope_section: got (16, 24, 24), expected numbers",
    ),
    ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size: got 0, expected an integer"),
    ({"text_config": {"num_attention_heads": 3}}, "text_config.num_attention_heads: got 3, expec"),
    ({"vision_config": {"num_heads": 3}}, "vision_config.num_heads: got 3, expected a divisor of"),
    ({"vision_config": None}, "vision_config: got None, expected an object"),
    ({"image_token_id": "x"}, "image_token_id: got 'x', expected an integer"),
    ({"model_type": "llama"}, "model_type: got 'llama', expected one of qwen2_vl, qwen2_5_vl"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS, ids=[message for _, message in CONFIGS])
def test_invalid_fields_of_a_host_are_named_with_their_file(folders, fields, message):
    folder = folders["host"]
    change(folder, **fields)
    with pytest.raises(ValueError) as caught:
        pretrained_qwen2_vl(str(folder))
    assert str(caught.value).startswith(f"host: {folder / 'config.json'}: {message}")


def test_a_size_that_the_weights_do_not_have_is_refused_before_it_is_allocated(folders):
    folder = folders["host"]
    change(folder, text_config={"vocab_size": 10**7})
    with pytest.raises(ValueError) as caught:
        pretrained_qwen2_vl(str(folder))
    message = "model.embed_tokens.weight has shape (200, 16), not (10000000, 16)"
    assert message in str(caught.value)


def layouts(weights):
    """Return the weights with the names of transformers 4 and 5, and with and without a head."""

    def rename(model, visual):
        return {
            key.replace("model.", model, 1) if key.startswith("model.") else visual + key: tensor
            for key, tensor in weights.items()
        }

    head = {"lm_head.weight": torch.randn(200, 16)}
    other_head = {"lm_head.weight": torch.zeros(3, 3)}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    return {
        "transformers 4": weights,
        "transformers 5": rename("model.language_model.", "model."),
        "without a head": rename("language_model.", ""),
        "a head of its own": {**weights, **head},
        "an unused head of another shape": {**weights, **other_head},
        "frequencies": {**weights, **frequencies},
    }


LAYOUTS = tuple(layouts({}))


def test_ids_outside_the_vocabulary_are_left_out(folders):
    change(folders["host"], text_config={"pad_token_id": 10**6, "eos_token_id": [3, 10**6]})
    fields, host = pretrained_qwen2_vl(str(folders["host"]))
    assert fields["host"]["text_config"]["eos_token_id"] is None
    assert host.config.text_config.pad_token_id is None


def test_loading_a_host_without_a_head_draws_no_numbers(folders):
    before = torch.get_rng_state()
    pretrained_qwen2_vl(str(folders["host"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_host_loads_without_a_message(folders, capfd, layout):
    folder = folders["host"]
    weights = read(folder)
    write(folder, layouts(weights)[layout])
    change(folder, model_type="unite_qwen2_vl", architectures=["UniteQwen2VL"])
    capfd.readouterr()
    fields, host = pretrained_qwen2_vl(str(folder))
    assert fields["host"]["model_type"] == "qwen2_vl" and capfd.readouterr() == ("", "")
    assert len(host.state_dict()) == len(weights)
    for key, tensor in weights.items():
        mine = key.replace("model.", "language_model.", 1) if key.startswith("model.") else key
        assert torch.equal(host.state_dict()[mine], tensor), key


QUIET = """
import sys
from mmfused.models.qwen import build_qwen2_vl, pretrained_qwen2_vl
from mmfused.models.pretrained import pretrained_text
pretrained_qwen2_vl(sys.argv[1])
pretrained_text(sys.argv[2])
"""


def test_good_folders_load_without_a_message_in_a_fresh_process(folders):
    """The config of the host has no ids of its own; transformers' defaults lie outside."""
    for name in ("bos_token_id", "eos_token_id"):
        values = json.loads((folders["host"] / "config.json").read_text())
        values["text_config"].pop(name)
        (folders["host"] / "config.json").write_text(json.dumps(values))
    arguments = [str(folders["host"]), str(folders["text encoder"])]
    done = subprocess.run(
        [sys.executable, "-c", QUIET, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_damaged_weights_of_a_vit_are_refused_with_the_file(tmp_path):
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 32, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    weights, key = read(tmp_path), "blocks.1.mlp.fc1.weight"
    path = f"image encoder: {tmp_path / 'model.safetensors'}"
    drop(tmp_path, key)
    with pytest.raises(ValueError) as caught:
        pretrained_vit(str(tmp_path))
    expected = f"{path} lacks 1 weights of vit_tiny_patch16_224: {key}, expected all"
    assert str(caught.value).startswith(expected)
    write(tmp_path, {**weights, key.replace(".1.", ".2."): weights[key].clone()})
    with pytest.raises(ValueError) as caught:
        pretrained_vit(str(tmp_path))
    assert str(caught.value).startswith(f"{path} holds 1 weights that a vit_tiny_patch16_224")
    reshape(tmp_path, key)
    with pytest.raises(ValueError) as caught:
        pretrained_vit(str(tmp_path))
    assert key in str(caught.value) and str(caught.value).startswith(path)


def test_options_of_a_host_that_cannot_run_are_refused():
    """A run's config.json may have them too."""
    config = build()[0].config
    for part, field, value, message in (
        ("vision_config", "num_heads", 3, "vision_config.num_heads: got 3, expected a divisor of"),
        ("text_config", "rope_parameters", None, "mrope_section: got (16, 24, 24), expected"),
    ):
        changed = {**config.host, part: {**config.host[part], field: value}}
        with pytest.raises(ValueError) as caught:
            build_qwen2_vl(changed)
        assert str(caught.value).startswith("host: ") and message in str(caught.value)
    changed = {**config.host, "text_config": {**TEXT, "hidden_act": "relu7"}}
    with pytest.raises(ValueError, match="host.text_config.hidden_act: got 'relu7', expected"):
        type(config)(**{**config.to_dict(), "host": changed})
