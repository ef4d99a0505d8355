"""The README.md of an exported folder tells what the training was, and no path of this machine."""

import json
from pathlib import Path

import pytest
import yaml
from test_exported_encoders import build, exported, write_run
from test_exported_folders import write_run as write_host_run

from mmfused.cli.model_card import base_model, model_card
from mmfused.training.files import write_json


def card_of(run, out, *options):
    """Export a run; return the fields of the front matter, and the rest of the card."""
    assert exported(run, out, "--overwrite", *options) == 0
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def change(run, name="config.json", **training):
    settings = json.loads((run / name).read_text())
    settings["training"].update(training)
    write_json(run / name, settings)


def finish(run):
    """Write the scores of a run of 20 steps."""
    write_json(run / "summary.json", {"steps": 20, "accuracy": 0.1})
    records = [
        {"step": 10, "accuracy": 0.25},
        {"step": 20, "val_loss": 1.25, "recall_at_1": 0.123456, "a](b": 1.0, "bad": float("nan")},
        {"step": 20, "loss": 1.5, "seconds": 1.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 2')


def test_the_card_of_a_text_encoder_of_unica(tmp_path):
    write_run(tmp_path / "my run")
    change(tmp_path / "my run", data=f"{tmp_path}/shop/train", val="rel/val", seed=7, epochs=3.0)
    finish(tmp_path / "my run")
    front, text = card_of(tmp_path / "my run", tmp_path / "out")
    assert front == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["mmfused", "unica", "feature-extraction", "sentence-transformers"],
    }
    for line in (
        "# UniCA: text encoder",
        'model = SentenceTransformer("FOLDER")',
        '`transformers.AutoModel.from_pretrained("FOLDER", add_pooling_layer=False)`',
        "are cut at 12 tokens",
        "* run: `my run`",
        "* trained with: mmfused `0.2.0`",
        "* preset: `tiny`",
        "* data: `train`",
        "* val: `val`",
        "* steps: `20`",
        "* epochs: `3.0`",
        "* seed: `7`",
        "* validation: `val_loss` 1.25, `recall_at_1` 0.1235\n",
    ):
        assert line in text, text
    assert str(tmp_path) not in text and "rel/" not in text and "LoRA" not in text
    assert "README.md" in json.loads((tmp_path / "out" / "export.json").read_text())["files"]


def test_texts_are_cut_at_what_the_encoder_reads(tmp_path):
    """A run of an earlier version may have a larger max_length."""
    write_run(tmp_path / "run")
    change(tmp_path / "run", max_length=5000)
    _, text = card_of(tmp_path / "run", tmp_path / "out")
    positions = json.loads((tmp_path / "out" / "config.json").read_text())[
        "max_position_embeddings"
    ]
    assert f"are cut at {positions} tokens" in text
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == positions < 5000


@pytest.mark.parametrize(
    ("name", "part", "library", "task", "phrase"),
    [
        ("fluid", "text", "transformers", "feature-extraction", "does not embed as FLUID does"),
        ("uniecs", "image", "timm", "image-feature-extraction", "does not embed as UniECS does"),
    ],
)
def test_the_cards_of_other_parts(tmp_path, name, part, library, task, phrase):
    write_run(tmp_path / "run", name)
    change(tmp_path / "run", steps=5)
    front, text = card_of(tmp_path / "run", tmp_path / "out", "--part", part)
    assert "epochs" not in text
    assert (front["library_name"], front["pipeline_tag"]) == (library, task)
    assert front["tags"] == ["mmfused", name, "feature-extraction"]
    assert phrase in " ".join(text.split())
    assert "validation" not in text and "steps" not in text


@pytest.mark.parametrize(("name", "pooled"), [("unite", "last token"), ("moon2", "their mean")])
def test_the_card_of_a_host(tmp_path, name, pooled):
    write_host_run(tmp_path / "run", name, **({"stage": 1} if name == "unite" else {}))
    front, text = card_of(tmp_path / "run", tmp_path / "out")
    assert front == {
        "library_name": "transformers",
        "tags": ["mmfused", name, "feature-extraction"],
    }
    assert pooled in text and f"`mmfused embed --model {name} --host FOLDER`" in text
    assert ("* stage: `1`" in text) == (name == "unite")


def test_the_card_of_a_checkpoint_names_its_run_and_step(tmp_path):
    model, _ = build()
    folder = tmp_path / "mine" / "checkpoints" / "step-00000010"
    write_run(tmp_path / "run")
    folder.mkdir(parents=True)
    finish(tmp_path / "mine")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    write_json(folder / "state.json", {"step": 10, "settings": settings})
    text = model_card(folder, settings, model, "text")
    for line in (
        "* run: `mine`",
        "* steps: checkpoint at step 10",
        "* validation: `accuracy` 0.25",
    ):
        assert line in text
    assert "* epochs" not in text


def test_hostile_names_stay_names(tmp_path):
    evil = "x`](mailto:a)\n# Title\u202e\x1b[31m"
    write_run(tmp_path / evil)
    change(tmp_path / evil, data=f"/data/{evil}", preset=f"{evil}\n---\nlicense: mit", init="a/..")
    front, text = card_of(tmp_path / evil, tmp_path / "out")
    assert "license" not in front
    assert "* run: `x'](mailto:a)?# Title??[31m`" in text
    assert "* data: `x'](mailto:a)?# Title??[31m`" in text
    assert text.count("\n# ") == 1 and "* init: `..`" in text


def test_the_run_has_the_name_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    run = tmp_path / "checkpoints" / "mine"
    model, _ = write_run(run)
    settings = json.loads((run / "config.json").read_text())
    assert "* run: `mine`" in model_card(run, settings, model, "text")
    monkeypatch.chdir(run)
    assert "* run: `mine`" in model_card(Path(), settings, model, "text")


def test_a_name_that_is_no_utf8_is_written(tmp_path):
    model, _ = write_run(tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings["training"]["data"] = "shop\udcff"
    assert "* data: `shop?`" in model_card(tmp_path / "run", settings, model, "text")


def cached(monkeypatch, names):
    def find(name, file):
        if ".." in name:
            raise ValueError("no name of the hub")
        return "/cache/config.json" if name in names and file == "config.json" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", find)


def test_only_hub_names_are_base_models(tmp_path, monkeypatch):
    cached(monkeypatch, ["Qwen/Qwen2-VL-2B-Instruct", "bert-base-uncased", "hosts/mine", "a\nb"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts" / "mine").mkdir(parents=True)
    for part, name, expected in (
        (None, "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
        (None, "hosts/mine", None),  # a folder
        (None, "hosts/gone", None),
        (None, "a..b", None),
        (None, "a\nb", None),
        (None, None, None),
        ("text", "bert-base-uncased", "bert-base-uncased"),
        ("image", "vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("image", "bert-base-uncased", None),
    ):
        setting = "host" if part is None else f"{part}_encoder"
        assert base_model({setting: name}, part) == expected, name


def test_the_base_model_is_in_the_front_matter(tmp_path, monkeypatch):
    cached(monkeypatch, ["bert-base-uncased"])
    write_run(tmp_path / "run")
    change(tmp_path / "run", text_encoder="bert-base-uncased")
    front, text = card_of(tmp_path / "run", tmp_path / "out")
    assert front["base_model"] == "bert-base-uncased"
    assert "* text encoder: `bert-base-uncased`" in text
