"""Published data sets train, evaluate and embed, each by one command."""

import json

import numpy as np
import pytest
from published_data import write_glami, write_mmeb, write_unite, write_webqa

from mmfused.cli import main

STEPS = ["--steps", "2", "--batch-size", "4", "--threads", "1"]


def run(*command):
    assert main([str(part) for part in command]) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def retrieval_run(root):
    run("train", "--model", "unica", "--data", "generated", *STEPS, "--out", root / "unica")
    return root / "unica"


def test_glami_trains_evaluates_and_embeds(root):
    data = write_glami(root / "glami")
    run("train", "--data", data, *STEPS, "--out", root / "fluid")
    config = json.loads((root / "fluid/config.json").read_text())
    assert config["model"]["num_classes"] == 3
    assert config["class_names"] == ["7", "1532", "20117"]
    scores = root / "glami.json"
    run("eval", "--checkpoint", root / "fluid", "--data", data, "--per-class", "--out", scores)
    result = json.loads(scores.read_text())
    assert result["rows"] == 6 and not result["skipped"]
    assert {entry["name"] for entry in result["classes"]} <= {"7", "1532", "20117"}
    run("train", "--model", "uniecs", "--data", data, *STEPS, "--out", root / "uniecs")
    run("embed", "--checkpoint", root / "uniecs", "--data", data, "--out", root / "glami.npz")
    found = np.load(root / "glami.npz")
    assert found["both"].shape[0] == 6 and found["has_image"].all() and found["has_text"].all()
    assert found["file_names"][0] == "images/100.jpg"


@pytest.mark.parametrize("write", [write_mmeb, write_unite], ids=["mmeb", "unite"])
def test_pairs_of_unite_train_and_embed(root, write):
    data = write(root / write.__name__)
    out = root / f"{write.__name__}-run"
    run("train", "--model", "unite", "--data", data, "--val", "0.25", *STEPS, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    rows = 16 if write is write_mmeb else 8
    assert summary["train_rows"] + summary["val_rows"] == rows and not summary["skipped"]
    assert 0 <= summary["recall_at_1"] <= 1
    run("embed", "--checkpoint", out, "--data", data, "--out", root / f"{write.__name__}.npz")
    found = np.load(root / f"{write.__name__}.npz")
    assert np.allclose(np.linalg.norm(found["embedding"], axis=1), 1, atol=1e-5)


def test_webqa_evaluates_and_embeds(root, retrieval_run):
    data = write_webqa(root / "webqa")
    scores = root / "webqa.json"
    run("eval", "--checkpoint", retrieval_run, "--data", data, "--out", scores)
    searches = json.loads(scores.read_text())["searches"]
    assert {"all", "mm_it->mm_it", "text->text"} <= searches.keys()
    assert searches["all"]["queries"] == 8 and searches["all"]["candidates"] == 16
    assert searches["text->text"]["queries"] == 4 and searches["text->text"]["candidates"] == 8
    assert searches["all"]["true_recall_at_10"] <= searches["all"]["recall_at_10"]
    run("embed", "--checkpoint", retrieval_run, "--data", data, "--out", root / "webqa.npz")
    found = np.load(root / "webqa.npz")
    assert found["is_query"].sum() == 8 and found["is_candidate"].sum() == 16
    again = root / "again.json"
    run("eval", "--embeddings", root / "webqa.npz", "--out", again)
    assert json.loads(again.read_text())["searches"] == searches
