"""A folder of mmfused export gives transformers, and mmfused again, the same hidden states."""

import copy
import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from retrieval_models import TEXTS

from mmfused.cli import main, new_folder
from mmfused.data import train_tokenizer
from mmfused.models import MODELS, qwen
from mmfused.models.lora import adapted_layers, add_lora, merge_lora
from mmfused.models.qwen_export import make_processor, save_host
from mmfused.training.config import TrainConfig
from mmfused.training.files import model_tensors, save_tensors, write_json
from mmfused.training.folder_lock import temporary_path

TEXT = {
    "vocab_size": 200,  # more than the tokenizer has
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
VISION = {
    "qwen2_vl": {"depth": 1, "embed_dim": 8, "num_heads": 1, "mlp_ratio": 1, "patch_size": 4},
    "qwen2_5_vl": {
        "depth": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "intermediate_size": 8,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    },
}
MODEL_OPTIONS = {"unite": {}, "moon2": {"without": ["moe"]}}


def build(name="unite", kind="qwen2_vl", **options):
    """Return a model with a host of small sizes, and its tokenizer."""
    config = MODELS[name].config
    tokenizer = config.prepare_tokenizer(train_tokenizer(TEXTS, 100))
    host = {"model_type": kind, "text_config": TEXT, "vision_config": VISION[kind]}
    options = {"host": host, "image_size": 16, **MODEL_OPTIONS[name], **options}
    torch.manual_seed(0)
    fields = config.of_tokenizer(tokenizer)
    return MODELS[name].model(config.preset("tiny", **fields, **options)).eval(), tokenizer


def write_run(folder, name="unite", **options):
    """Write the files of a finished run that loading needs."""
    model, tokenizer = build(name, **options)
    training = TrainConfig(str(folder), model=name, amp="off", max_length=12)
    folder.mkdir()
    save_tensors(folder / "model.safetensors", model_tensors(model))
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = {"mmfused": "0.2.0", "model": model.config.to_dict(), "image_size": 16}
    write_json(folder / "config.json", {**settings, "training": training.to_dict()})
    return model


def sequences(model, tokenizer):
    """Return the sequences of two items with pictures, and the pictures' patches and grids."""
    words = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    pixels = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    pictures, grid = qwen.picture_tokens(model.host, pixels, None)
    ids, mask = words["input_ids"], words["attention_mask"]
    sequence = qwen.assemble(model.config.tokens, grid, ids, mask, None)
    patches, grid_thw = qwen.patches(pixels, 4, 2, 2)
    return sequence, qwen.hidden_states(model.host, sequence, pictures), patches, grid_thw


def states_of(loaded, sequence, patches, grid_thw):
    """Return the last hidden states that the forward of transformers computes."""
    return loaded(
        input_ids=sequence.input_ids,
        attention_mask=sequence.attention_mask,
        position_ids=sequence.position_ids,
        pixel_values=patches,
        image_grid_thw=grid_thw,
        output_hidden_states=True,
    ).hidden_states[-1]


AUTO = (transformers.AutoModel, transformers.AutoModelForImageTextToText)


@pytest.mark.parametrize("auto", AUTO)
@pytest.mark.parametrize(
    ("name", "kind"), [("unite", "qwen2_vl"), ("moon2", "qwen2_vl"), ("unite", "qwen2_5_vl")]
)
@torch.no_grad()
def test_transformers_computes_the_same_hidden_states(tmp_path, name, kind, auto):
    model, tokenizer = build(name, kind)
    assert TEXT["vocab_size"] > len(tokenizer)
    sequence, expected, patches, grid_thw = sequences(model, tokenizer)
    save_host(model, tokenizer, tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert torch.equal(states_of(loaded, sequence, patches, grid_thw), expected)


CHILD = """
import sys, safetensors.torch, torch, transformers
given = safetensors.torch.load_file(sys.argv[2])
expected = given.pop("expected")
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    states = model(**given).last_hidden_state
assert "mmfused" not in sys.modules
sys.exit(not torch.equal(states, expected))
"""


@torch.no_grad()
def test_a_fresh_process_without_this_library_computes_the_same(tmp_path):
    model = write_run(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    _, tokenizer = build()
    sequence, expected, patches, grid_thw = sequences(model, tokenizer)
    given = {
        "input_ids": sequence.input_ids,
        "attention_mask": sequence.attention_mask,
        "position_ids": sequence.position_ids,
        "pixel_values": patches,
        "image_grid_thw": grid_thw,
        "expected": expected,
    }
    given = {name: tensor.contiguous() for name, tensor in given.items()}
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    arguments = [str(tmp_path / "out"), str(tmp_path / "given.safetensors")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower() and "REPORT" not in done.stderr


def test_the_exported_tokenizer_and_processor_are_those_of_the_model(tmp_path):
    model, tokenizer = build()
    save_host(model, tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "", "x <|image_pad|> mug"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    for part in (processor.image_processor, processor.video_processor):
        assert (part.size["shortest_edge"], part.size["longest_edge"]) == (256 * 64, 1280 * 64)
        assert (part.patch_size, part.merge_size, part.temporal_patch_size) == (4, 2, 2)
        assert tuple(part.image_mean) == model.config.pixel_mean
    picture = np.random.default_rng(0).integers(0, 256, (64, 192, 3), np.uint8)
    batch = processor(images=[picture], text=["<|image_pad|> mug"], return_tensors="pt")
    rows, columns = batch["image_grid_thw"][0, 1:].tolist()
    assert 256 * 4 <= rows * columns <= 1280 * 4 and columns == pytest.approx(3 * rows, rel=0.1)
    image = model.config.tokens["image"]
    assert (batch["input_ids"] == image).sum() == rows * columns // 4
    squares, _ = build("moon2")
    assert make_processor(squares, tokenizer).image_processor.size["longest_edge"] == 16 * 16


@torch.no_grad()
def test_adapters_are_merged(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = build()
    add_lora(model, rank=2)
    for layer in adapted_layers(model.host).values():
        layer.lora_B["default"].weight.normal_()
    merged = merge_lora(copy.deepcopy(model)).host.state_dict()
    save_host(model, tokenizer, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())
    changed = "language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(loaded[changed], build()[0].host.state_dict()[changed])


def test_ids_outside_the_vocabulary_are_not_exported(tmp_path):
    model, tokenizer = build()
    assert model.host.config.text_config.eos_token_id == 151645  # transformers' default
    save_host(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["eos_token_id"] is None
    assert written["image_token_id"] == model.config.tokens["image"]
    assert written["architectures"] == ["Qwen2VLForConditionalGeneration"]


def test_export_converts_the_weights_to_bfloat16(tmp_path):
    model = write_run(tmp_path / "run")
    command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    name = "language_model.layers.1.mlp.up_proj.weight"
    expected = model.host.state_dict()[name].bfloat16()
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.state_dict()[name], expected)


def test_an_exported_folder_is_a_host_with_the_same_weights(tmp_path):
    model, tokenizer = build()
    save_host(model, tokenizer, tmp_path)
    fields, host = qwen.pretrained_qwen2_vl(str(tmp_path))
    rebuilt, _ = build(host=fields["host"])
    rebuilt.host.load_state_dict(host.state_dict())
    words = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = (
            each.embed(("image", "text", "both"), pixel_values=pixels, **words)
            for each in (model, rebuilt)
        )
    assert all(torch.equal(found[view], expected[view]) for view in expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moon2", {"without": []}, "export: got a moon2 with mixtures of experts, for which"),
        ("fluid", {}, "part: got None with model 'fluid', expected image or text"),
    ],
)
def test_models_without_a_class_in_transformers_are_refused(
    tmp_path, capsys, name, options, message
):
    if name == "fluid":
        (tmp_path / "run").mkdir()
        training = TrainConfig("x").to_dict()
        settings = {"mmfused": "0.2.0", "model": {}, "training": training, "image_size": 32}
        write_json(tmp_path / "run" / "config.json", settings)
    else:
        write_run(tmp_path / "run", name, **options)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_all_files_have_the_rights_of_new_files(tmp_path):
    write_run(tmp_path / "run")
    old = os.umask(0o027)
    try:
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_only_exported_folders_are_replaced(tmp_path, capsys):
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), "--out", str(out)]
    assert main(command) == 0
    assert main(command) == 2
    assert "already exists; choose another name or overwrite it" in capsys.readouterr().err
    (out / "model.safetensors").write_bytes(b"old")
    assert main([*command, "--overwrite"]) == 0
    assert (out / "model.safetensors").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    (out / "tokenizer.json").rename(out / "tokenizer")
    (out / "tokenizer.json").symlink_to("tokenizer")
    assert main([*command, "--overwrite"]) == 2
    assert "did not write (tokenizer, tokenizer.json)" in capsys.readouterr().err
    (out / "tokenizer").rename(out / "tokenizer.json")
    (out / "notes.txt").touch()
    (out / "NOTES.md").mkdir()
    assert main([*command, "--overwrite"]) == 2
    message = "holds files that mmfused export did not write (NOTES.md, notes.txt)"
    assert message in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "run"), "--overwrite"]) == 2
    assert "did not write" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").exists()
    (tmp_path / "empty").mkdir()
    assert main([*command[:-1], str(tmp_path / "empty")]) == 2
    assert "already exists; choose another name or overwrite it" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "empty"), "--overwrite"]) == 0
    assert main([*command[:-1], str(tmp_path / "no" / "out")]) == 2
    assert "expected a new folder in an existing one" in capsys.readouterr().err
    assert main([*command, "--dtype", "int8"]) == 2
    assert "dtype: got 'int8', expected float32 or bfloat16" in capsys.readouterr().err


def test_an_export_moves_back_what_a_killed_process_moved_aside(tmp_path, capsys):
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), "--out", str(out)]
    assert main(command) == 0
    out.rename(temporary_path(tmp_path / "out.old"))  # killed between its two renames
    assert main(command) == 2
    assert "already exists; choose another name or overwrite it" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()


def test_a_full_disk_ends_an_export_in_one_sentence(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run")

    def fail(*_, **__):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_exported_tokenizer_does_not_truncate_as_training_did(tmp_path):
    """A tokenizer that has truncated texts is saved with their largest length."""
    model, tokenizer = build()
    tokenizer(TEXTS, truncation=True, max_length=5, padding=True)
    save_host(model, tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded("red " * 40)["input_ids"]) > 40
    assert (loaded.padding_side, loaded.truncation_side) == ("left", "left")
    truncated = tokenizer("red " * 40, truncation=True, max_length=5)
    assert len(truncated["input_ids"]) == 5


def test_a_failed_export_leaves_nothing_and_loses_nothing(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), "--out", str(out), "--overwrite"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    processor = transformers.Qwen2VLProcessor
    monkeypatch.setattr(processor, "save_pretrained", lambda self, folder: full(self, folder))
    assert main(command) == 2 and "no space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), "--out", str(out), "--overwrite"]
    assert main(command) == 0
    before = (out / "model.safetensors").stat().st_ino
    moved, replace = [], os.replace

    def failing(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise OSError("input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert main(command) == 2 and len(moved) == 3
    assert (out / "model.safetensors").stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_folder_that_appears_during_the_export_is_kept(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "run")
    out, save = tmp_path / "out", transformers.Qwen2VLProcessor.save_pretrained

    def slow(self, folder):
        save(self, folder)
        out.mkdir()
        (out / "notes.txt").touch()

    monkeypatch.setattr(transformers.Qwen2VLProcessor, "save_pretrained", slow)
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "did not write (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_the_folder_of_a_running_export_is_not_removed(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    out, save = tmp_path / "out", transformers.Qwen2VLProcessor.save_pretrained

    def slow(self, folder):
        new_folder.remove_abandoned(out, "export")  # as another export to the same folder does
        save(self, folder)

    monkeypatch.setattr(transformers.Qwen2VLProcessor, "save_pretrained", slow)
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert (out / "model.safetensors").is_file()


def test_folders_of_killed_exports_are_removed_but_no_others(tmp_path):
    write_run(tmp_path / "run")
    killed, living, foreign, other = (
        tmp_path / name for name in (".out.1.tmp", ".out.2.tmp", ".out.3.tmp", ".other.1.tmp")
    )
    for folder in (killed, living, foreign, other):
        folder.mkdir()
        if folder != foreign:
            (folder / "export.json").write_text("{}")
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    finally:
        os.close(descriptor)
    assert not killed.exists() and living.exists() and foreign.exists() and other.exists()


KILLED = """
import os, signal, sys, transformers
from mmfused.cli import main
transformers.Qwen2VLProcessor.save_pretrained = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["export", sys.argv[1], "--out", sys.argv[2]])
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path):
    write_run(tmp_path / "run")
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", KILLED, run, out], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not os.path.exists(out) and main(["export", run, "--out", out]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
