"""embed and eval take a pretrained host in place of a run."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from retrieval_models import TEXTS
from test_exported_folders import build

from mmfused.cli import embed, main
from mmfused.models.adapters import save_adapter
from mmfused.models.lora import adapted_layers, add_lora
from mmfused.models.qwen_export import save_host
from mmfused.training.load import load_pretrained

SMALL = ["--image-size", "16", "--max-length", "12"]
MODELS = {"unite": [], "moon2": ["--option", "num_experts=3"]}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "host"
    save_host(*build(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder of six products with pictures of noise; the last has no picture."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = ["file_name,text,label"]
    for i in range(5):
        pixels = random.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f'{i}.png,"{TEXTS[i]}",{i // 2}')
    rows.append(",a mug,0")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


def command(name, data, out, *more):
    return [name, "--data", data, "--device", "cpu", "--out", str(out), *more]


def embeddings(data, out, *more):
    assert main(command("embed", data, out, *more)) == 0
    with np.load(out) as arrays:
        return {view: arrays[view] for view in ("image", "text", "both")}


def assert_equal(found, expected):
    for view, array in expected.items():
        assert np.array_equal(found[view], array), view


@pytest.mark.parametrize("model", MODELS)
def test_a_host_embeds_as_the_model_from_which_training_starts(tmp_path, host, data, model):
    """A learning rate of 1e-30 leaves the weights as they are."""
    named = ["--model", model, "--host", host, *SMALL, *MODELS[model]]
    preset = "code" if model == "unite" else "paper"
    steps = ["--steps", "1", "--lr", "1e-30", "--batch-size", "4", "--preset", preset]
    arguments = command("train", data, tmp_path / "run", "--val", data, *named, *steps)
    assert main(arguments) == 0
    expected = embeddings(data, tmp_path / "a.npz", "--checkpoint", str(tmp_path / "run"))
    assert_equal(embeddings(data, tmp_path / "b.npz", *named), expected)
    assert not np.allclose(expected["image"], expected["text"], atol=0.01)


def test_an_exported_run_is_a_host_with_the_same_embeddings(tmp_path, host, data):
    """The run is trained, with another tokenizer and picture size than the defaults."""
    named = ["--model", "unite", "--host", host, *SMALL]
    steps = ["--steps", "2", "--lr", "0.01", "--batch-size", "4", "--preset", "code"]
    steps += ["--lora", "none"]  # merged adapters would round differently
    arguments = command("train", data, tmp_path / "run", "--val", data, *named, *steps)
    assert main(arguments) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    expected = embeddings(data, tmp_path / "a.npz", "--checkpoint", str(tmp_path / "run"))
    again = ["--model", "unite", "--host", str(tmp_path / "out"), *SMALL]
    assert_equal(embeddings(data, tmp_path / "b.npz", *again), expected)
    before = embeddings(data, tmp_path / "c.npz", *named)
    assert not np.allclose(before["both"], expected["both"], atol=0.01)


@pytest.fixture(scope="module")
def adapted(host, tmp_path_factory):
    """Return an adapter folder, and a folder of the host with the adapters merged."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapted")
    model, tokenizer = build()
    add_lora(model, rank=2)
    with torch.no_grad():
        for layer in adapted_layers(model.host).values():
            layer.lora_B["default"].weight.normal_()
    save_adapter(root / "adapter", model)
    save_host(model, tokenizer, root / "merged")
    return str(root / "adapter"), str(root / "merged")


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_is_merged_into_the_host(tmp_path, host, adapted, data, model):
    """In a MOON2, the experts start as copies of the FFN with its adapters."""
    adapter, merged = adapted
    named = ["--model", model, *SMALL, *MODELS[model]]
    expected = embeddings(data, tmp_path / "a.npz", *named, "--host", merged)
    found = embeddings(data, tmp_path / "b.npz", *named, "--host", host, "--adapter", adapter)
    assert_equal(found, expected)
    before = embeddings(data, tmp_path / "c.npz", *named, "--host", host)
    assert not np.allclose(before["both"], expected["both"], atol=0.01)


def test_a_run_with_adapters_is_exported_with_them_merged(tmp_path, host, data):
    pytest.importorskip("peft")
    named, run = ["--model", "unite", *SMALL], tmp_path / "run"
    steps = ["--steps", "2", "--lr", "0.01", "--batch-size", "4", "--preset", "code"]
    steps += ["--lora", "rank=2", "--host", host]
    assert main(command("train", data, run, "--val", data, *named, *steps)) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    adapter = ["--host", host, "--adapter", str(run / "adapter")]
    expected = embeddings(data, tmp_path / "a.npz", *named, *adapter)
    out = ["--host", str(tmp_path / "out")]
    assert_equal(embeddings(data, tmp_path / "b.npz", *named, *out), expected)
    before = embeddings(data, tmp_path / "c.npz", *named, "--host", host)
    assert not np.allclose(before["both"], expected["both"], atol=0.01)


def test_a_missing_adapter_is_refused_before_the_host_is_loaded(tmp_path, data, capsys):
    named = ["--model", "unite", "--host", "./nowhere", "--adapter", str(tmp_path)]
    assert main(command("embed", data, tmp_path / "x.npz", *named)) == 2
    message = f"adapter: {tmp_path / 'adapter_config.json'} is missing"
    assert message in capsys.readouterr().err


def test_the_length_of_texts_is_that_of_the_preset(host):
    assert load_pretrained("unite", host, device="cpu").settings["training"]["max_length"] == 2048
    assert load_pretrained("moon2", host, device="cpu").settings["training"]["max_length"] == 64


def test_eval_measures_a_host(tmp_path, host, data, capsys):
    out = tmp_path / "scores.json"
    assert main(command("eval", data, out, "--model", "unite", "--host", host, *SMALL)) == 0
    scores = json.loads(out.read_text())
    assert scores["checkpoint"] is None and scores["host"] == host
    assert scores["pairs"]["both->both"]["queries"] == 5  # the sixth has no answer
    assert f"unite, both, from {host}" in capsys.readouterr().out


def other_weights(host, folder):
    shutil.copytree(host, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return ["--host", str(folder)]


def other_tokenizer(host, folder):
    shutil.copytree(host, folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    # No prompt has these letters, so that the config is the same.
    vocabulary["k"], vocabulary["j"] = vocabulary["j"], vocabulary["k"]
    path.write_text(json.dumps(values))
    return ["--tokenizer", str(folder)]


CHANGES = {
    "other weights": other_weights,
    "another tokenizer": other_tokenizer,
    "an adapter": lambda *_: ["--adapter"],
    "another option": lambda *_: ["--option", 'without=["fusion"]'],
    "another preset": lambda *_: ["--preset", "paper"],
    "another length": lambda *_: ["--max-length", "11"],
    "another size": lambda *_: ["--image-size", "24"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_another_host_or_option_are_refused(
    tmp_path, host, adapted, data, capsys, monkeypatch, change
):
    arguments = command("embed", data, tmp_path / "items.npz", "--model", "unite", *SMALL)
    arguments += ["--host", host]
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_join_parts", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    changed = CHANGES[change](host, tmp_path / "other")
    if changed == ["--adapter"]:
        changed.append(adapted[0])
    assert main([*arguments, *changed]) == 2
    assert "holds parts made with another checkpoint, host, option" in capsys.readouterr().err
    # The folder may have moved.
    moved = shutil.copytree(host, tmp_path / "moved")
    assert main([*arguments, "--host", str(moved)]) == 0


REFUSED = [
    ([], "checkpoint: got None without host, expected one of the two"),
    (["--model", "unite"], "checkpoint: got None without host, expected one of the two"),
    (
        ["--checkpoint", "run", "--host", "host", "--model", "unite"],
        "checkpoint: got 'run' with host, expected one of the two",
    ),
    (
        ["--checkpoint", "run", "--preset", "code"],
        "run holds no finished run: config.json is missing",
    ),
    (["--host", "host"], "model: got None with 'host', expected moon2, unite"),
    (["--host", "host", "--model", "x"], "model: got 'x' with 'host', expected moon2, unite"),
    (
        ["--host", "host", "--model", "fluid"],
        "model: got 'fluid' with 'host', expected moon2, unite",
    ),
    (
        ["--host", "./nowhere", "--model", "unite"],
        "host: got './nowhere', expected a folder, or the name of a hub model",
    ),
    (
        ["--host", "host", "--model", "unite", "--option", "stage"],
        "option: got 'stage', expected NAME=VALUE",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
@pytest.mark.parametrize("name", ["embed", "eval"])
def test_the_model_has_exactly_one_source(tmp_path, data, capsys, name, given, message):
    assert main(command(name, data, tmp_path / "x.npz", *given)) == 2
    captured = capsys.readouterr().err
    assert f"mmfused: error: {message}" in captured and captured.count("\n") == 1


def test_options_that_do_not_fit_the_host_are_refused(tmp_path, host, data, capsys):
    arguments = command("embed", data, tmp_path / "x.npz", "--model", "unite", "--host", host)
    assert main([*arguments, "--image-size", "17"]) == 2
    message = "image_size: got 17, expected a multiple of 8, the side of a token in pixels"
    assert message in capsys.readouterr().err
    assert main([*arguments, "--option", "stages=1"]) == 2
    assert "UNITEConfig: got a field 'stages', expected host" in capsys.readouterr().err
