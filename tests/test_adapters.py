"""Adapter folders: written as peft writes them, read as peft reads them, or refused."""

import copy
import json
import re

import pytest
import torch
from lora_models import NAMES, dropping_model, randomise

from mmfused.models.adapters import merge_adapter, save_adapter
from mmfused.models.lora import adapted_layers, add_lora, merge_lora, root_of

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

LANGUAGE = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LAYERS = "language_model.layers.0."


def host_of(model):
    """Return a copy of the model's host in float32, as `mmfused train --host` loads it."""
    return copy.deepcopy(root_of(model)).float().eval()


def full(host):
    """Return a model with a language-model head, which shares the weights of ``host``."""
    model = transformers.Qwen2VLForConditionalGeneration(host.config)
    model.model = host
    return model.eval()


def peft_folder(folder, module, **options):
    """Write a random adapter of a module of transformers with peft; return the merged module."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": LANGUAGE, **options}
    wrapped = randomise(peft.get_peft_model(module, peft.LoraConfig(**settings)))
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


def rewrite(folder, change=None, **settings):
    """Change the tensors by ``change``, and fields of adapter_config.json."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    safetensors.save_file(change(tensors) if change else tensors, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def same(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], tensor) for key, tensor in expected.items()
    )


def test_peft_loads_a_saved_adapter_with_the_same_hidden_states(tmp_path):
    host = host_of(dropping_model("unite"))
    model = dropping_model("unite").float()
    randomise(add_lora(model, rank=2)).eval()
    save_adapter(tmp_path / "adapter", model)
    loaded = peft.PeftModel.from_pretrained(host, tmp_path / "adapter").eval()
    ids = torch.randint(0, 20, (2, 5))
    expected = model.host(input_ids=ids).last_hidden_state
    assert torch.equal(loaded(input_ids=ids).last_hidden_state, expected)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(input_ids=ids).last_hidden_state, expected)
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["target_modules"] == LANGUAGE and saved["inference_mode"]
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (2, 64, 0.05)


@pytest.mark.parametrize("targets", [None, ["qkv", "proj", "q_proj"]], ids=["default", "vision"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_merges_into_a_model_without_adapters(name, targets, tmp_path):
    if targets and "host" not in dict(dropping_model(name).named_children()):
        targets = ["proj", "query"]
    model = randomise(add_lora(dropping_model(name), rank=2, alpha=3, targets=targets))
    save_adapter(tmp_path / "adapter", model)
    plain = dropping_model(name)
    trained = [parameter.requires_grad for parameter in plain.parameters()]
    assert merge_adapter(plain, str(tmp_path / "adapter")) is plain
    assert same(plain, merge_lora(model)) and not same(plain, dropping_model(name))
    assert [parameter.requires_grad for parameter in plain.parameters()] == trained


OLD = {"model.language_model.": "model.", "model.visual.": "visual."}


@pytest.mark.parametrize("named", [False, True], ids=["plain", "with adapter name"])
@pytest.mark.parametrize("layout", ["old", "new", "headless", "injected"])
def test_every_layout_of_the_names_is_read(layout, named, tmp_path):
    """ "old" is that of UNITE's authors, in transformers 4.47."""
    host = host_of(dropping_model("unite"))
    module = copy.deepcopy(host)
    targets = [*LANGUAGE, "qkv", "fc1"]
    module = module if layout == "headless" else full(module)
    merged = peft_folder(tmp_path, module, target_modules=targets)

    def change(tensors):
        changed = {}
        for key, tensor in tensors.items():
            for new, old in OLD.items() if layout == "old" else ():
                key = key.replace(f"base_model.model.{new}", f"base_model.model.{old}")
            if layout == "injected":
                key = key.removeprefix("base_model.model.")
            changed[key.replace(".weight", ".default.weight") if named else key] = tensor
        return changed

    rewrite(tmp_path, change)
    merge_adapter(host, tmp_path)
    assert same(host, merged if layout == "headless" else merged.model)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {"o_proj": 5}},
        {"target_modules": r"model\.language_model\..*\.(q|v)_proj"},
        {"exclude_modules": r".*\.layers\.0\..*"},
        {"exclude_modules": ["q_proj"], "use_rslora": True, "alpha_pattern": {"up_proj": 7}},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": 1},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5, "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_what_peft_merges_is_merged(options, tmp_path):
    host = host_of(dropping_model("unite"))
    merged = peft_folder(tmp_path, full(copy.deepcopy(host)), **options)
    assert same(merge_adapter(host, tmp_path), merged.model)


def test_a_16_bit_adapter_is_merged_in_the_dtype_of_the_host(tmp_path):
    host = host_of(dropping_model("unite"))
    peft_folder(tmp_path, copy.deepcopy(host))
    rewrite(tmp_path, lambda tensors: {key: x.bfloat16() for key, x in tensors.items()})
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(host), tmp_path).merge_and_unload()
    assert same(merge_adapter(host, tmp_path), expected)
    assert all(parameter.dtype == torch.float32 for parameter in host.parameters())


KEY = f"base_model.model.{LAYERS}self_attn.q_proj.lora_A.weight"


def without(tensors):
    return {key: tensor for key, tensor in tensors.items() if key != KEY}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, rf"{KEY}: got no tensor, expected shape \(2, 16\)"),
        (
            lambda t: {key: x for key, x in t.items() if "layers.1.mlp" not in key},
            r"layers\.1\.mlp\.gate_proj\.lora_A\.weight: got no tensor, expected shape \(2, 16\)",
        ),
        (lambda t: {**t, KEY: t[KEY][:1].clone()}, rf"{KEY}: got shape \(1, 16\), expected shape"),
        (
            lambda t: {**t, KEY.replace("q_proj", "x"): t[KEY].clone()},
            r"self_attn\.x\.lora_A\.weight: got shape \(2, 16\), expected no tensor: adapter_c",
        ),
        (
            lambda t: {**t, KEY.replace(".weight", ".default.weight"): t[KEY].clone()},
            r"q_proj\.lora_A\.(default\.)?weight: got shape \(2, 16\), expected no tensor",
        ),
        (
            lambda t: {**t, "base_model.model.embed_tokens.lora_embedding_A": t[KEY].clone()},
            r"embed_tokens\.lora_embedding_A: got shape \(2, 16\), expected no tensor",
        ),
        (lambda t: {}, r"layers\.0\..*: got no tensor, expected shape"),
        (lambda t: {**t, KEY: t[KEY] / 0}, rf"{KEY}: got torch.float32, not all finite, expected"),
        (lambda t: {**t, KEY: t[KEY].long()}, rf"{KEY}: got torch.int64, expected finite numbers"),
    ],
)
def test_unfit_tensors_are_refused_and_change_nothing(change, message, tmp_path):
    host = host_of(dropping_model("unite"))
    before = copy.deepcopy(host)
    peft_folder(tmp_path, copy.deepcopy(host))
    rewrite(tmp_path, change)
    where = re.escape(f"adapter: {tmp_path / 'adapter_model.safetensors'}: ")
    with pytest.raises(ValueError, match=f"{where}.*{message}") as error:
        merge_adapter(host, tmp_path)
    assert "\n" not in str(error.value)
    assert same(host, before) and not adapted_layers(host) and not hasattr(host, "peft_config")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save: got \['lm_head'\], expected none: only",
        ),
        ({"use_dora": True}, "use_dora: got True, expected none: only plain LoRA is read"),
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', expected 'LORA'"),
        ({"bias": "all"}, "bias: got 'all', expected 'none'"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: got 'pissa', expected True or False or",
        ),
        ({"target_parameters": ["x"]}, r"target_parameters: got \['x'\], expected none"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication: got \[\[0, 1\]\], expected none"),
        ({"something_new": 1}, "something_new: got 1, expected none"),
        ({"r": 0}, "r: got 0, expected an integer from 1"),
        ({"r": "8"}, "r: got '8', expected an integer"),
        ({"lora_alpha": None}, "lora_alpha: got None, expected a finite number"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern: got 'x', expected an integer"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: got 'x', expected a finite number"),
        ({"target_modules": "("}, "holds a pattern that peft cannot read: "),
        ({"rank_pattern": {"(": 1}}, "holds a pattern that peft cannot read: "),
        ({"target_modules": None}, "target_modules: got None, expected a list of strings"),
    ],
    ids=str,
)
def test_settings_beyond_plain_lora_are_refused(settings, message, tmp_path):
    host = host_of(dropping_model("unite"))
    peft_folder(tmp_path, copy.deepcopy(host))
    rewrite(tmp_path, **settings)
    where = re.escape(f"adapter: {tmp_path / 'adapter_config.json'}")
    with pytest.raises(ValueError, match=f"{where}:? {message}") as error:
        merge_adapter(host, tmp_path)
    assert "\n" not in str(error.value) and not adapted_layers(host)


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_missing_setting_is_named(name, tmp_path):
    host = host_of(dropping_model("unite"))
    peft_folder(tmp_path, copy.deepcopy(host))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in saved.items() if key != name}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {name}: got nothing, expected"):
        merge_adapter(host, tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    host = host_of(dropping_model("unite"))
    with pytest.raises(FileNotFoundError, match=r"adapter: .*adapter_config\.json is missing"):
        merge_adapter(host, tmp_path)
    peft_folder(tmp_path, copy.deepcopy(host))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter: .*adapter_model\.safetensors is truncated"):
        merge_adapter(host, tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"safetensors is missing; adapter_model\.bin is a"):
        merge_adapter(host, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_config\.json is truncated or corrupt"):
        merge_adapter(host, tmp_path)


def test_a_model_with_and_one_without_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: got a model without adapters, expected"):
        save_adapter(tmp_path / "adapter", dropping_model("unite"))
    assert not (tmp_path / "adapter").exists()
    model = add_lora(dropping_model("unite"))
    save_adapter(tmp_path / "adapter", model)
    with pytest.raises(ValueError, match="adapter: got a model with adapters, expected one"):
        merge_adapter(model, tmp_path / "adapter")
