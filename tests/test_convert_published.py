"""Pickles of published checkpoints become folders that training, embed and eval take."""

from __future__ import annotations

import pytest
import torch
import training_runs
from starting_parts import TEXTS, assert_equal, initial_weights, settings

from mmfused.cli import main, unpickle
from mmfused.data import train_tokenizer

transformers = pytest.importorskip("transformers")

from test_published_layouts import (  # noqa: E402
    chinese_clip,
    original_chinese_clip,
    visualized_bge,
    write_state,
)

few_products = training_runs.few_products


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=90).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Read pickles in this process, to save time; test_convert.py starts another."""
    monkeypatch.setattr("mmfused.cli.convert.read_pickle", unpickle.convert)


def state_of(name):
    if name == "vista":
        return visualized_bge("bert")[0]
    state = original_chinese_clip(chinese_clip())
    return {f"module.{key}": value for key, value in state.items()}


def convert(path, out, *options):
    return main(["convert", str(path), "--out", str(out), *options])


@pytest.mark.parametrize(("name", "model"), [("vista", "unica"), ("clip", "uniecs")])
def test_a_converted_file_starts_a_training(tmp_path, tokenizer, capsys, name, model):
    state = {key: value.float() for key, value in state_of(name).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "out", "--tokenizer", tokenizer) == 0
    printed = capsys.readouterr().out
    assert (
        f"next: mmfused train --model {model} --preset code --init {tmp_path / 'out'} --data"
        in printed
    )
    plain = write_state(tmp_path / "plain", state)
    found, expected = (
        initial_weights(settings(model, tmp_path / "run", init=str(folder), tokenizer=tokenizer))
        for folder in (tmp_path / "out", plain)
    )
    assert_equal(found, expected)
    again = settings(model, tmp_path / "run", init=str(tmp_path / "out"))
    assert_equal(initial_weights(again), expected)  # with the tokenizer in the folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual_proj.bias", torch.ones(3), "folder: {file} holds weights of another model: visua"),
        ("head.weight", torch.ones(3), "file: {file}: got head.weight, expected only names with"),
        (
            "bge_embeddings.word_embeddings.weight",
            None,
            "file: got '{file}' with bge_embeddings.",
        ),
    ],
)
def test_wrong_keys_and_shapes_leave_nothing(tmp_path, capsys, key, value, message):
    state = {key: value.float() for key, value in state_of("vista").items()}
    state[key] = value
    torch.save({name: x for name, x in state.items() if x is not None}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message.format(file=tmp_path / "a.pth") in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


def test_a_pickle_is_no_start_of_a_training(tmp_path, capsys):
    """The message names the command that reads it."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    given = ["--model", "unica", "--data", "generated", "--out", str(tmp_path / "run")]
    for source in (["--init", str(tmp_path)], ["--text-encoder", str(tmp_path)]):
        assert main(["train", *given, *source]) == 2
        assert "a.pth is a pickle, which can run any code when it is loaded; mmfused convert" in (
            capsys.readouterr().err
        )
    assert main(["train", *given, "--init", str(tmp_path / "a.pth")]) == 2
    assert "and mmfused convert writes them" in capsys.readouterr().err
