"""mmfused export --part: merged adapters, types, refusals, and folders within the folder."""

import json
import os

import pytest
import safetensors.torch
import torch
from test_exported_encoders import build, exported, write_run

from mmfused.models.lora import adapted_layers, add_lora, lora_of, merge_lora
from mmfused.training.config import TrainConfig
from mmfused.training.files import model_tensors, save_tensors, write_json


def test_adapters_are_merged(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = build("uniecs")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    add_lora(model, rank=2)
    for encoder in (model.image_encoder, model.text_encoder):
        for layer in adapted_layers(encoder).values():
            layer.lora_B["default"].weight.data.normal_()
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, "uniecs")
    save_tensors(run / "model.safetensors", model_tensors(model))
    settings = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", {**settings, "lora": lora_of(model)})
    merge_lora(model)
    for part in ("image", "text"):
        assert exported(run, out, "--part", part, "--overwrite") == 0
        written = safetensors.torch.load_file(out / "model.safetensors")
        own = {f"{part}_encoder.{name}": x for name, x in written.items()}
        assert all(torch.equal(model.state_dict()[name], x) for name, x in own.items())
        assert any(not torch.equal(before[name], x) for name, x in own.items())
        assert "* LoRA: rank `2`, alpha `" in (out / "README.md").read_text()


@pytest.mark.parametrize("part", ["image", "text"])
def test_bfloat16(tmp_path, part):
    model, _ = write_run(tmp_path / "run")
    assert exported(tmp_path / "run", tmp_path / "out", "--part", part, "--dtype", "bfloat16") == 0
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    encoder = getattr(model, f"{part}_encoder")
    assert written.keys() == encoder.state_dict().keys()
    assert all(torch.equal(x.bfloat16(), written[n]) for n, x in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "part", "options", "message"),
    [
        ("uniecs", None, {}, "part: got None with model 'uniecs', expected image or text"),
        ("unica", "both", {}, "part: got 'both' with model 'unica', expected image or text"),
        ("unica", "image", {"image": None}, "part: got 'image', expected a part that the model"),
        ("fluid", "text", {"modalities": "image"}, "part: got 'text', expected a part that the"),
        ("fluid", "image", {"image_stem": "conv"}, "of a model with image_stem 'conv', for which"),
        ("uniecs", "image", {"image_stem": "conv_group"}, "image_stem 'conv_group', for which"),
    ],
)
def test_parts_that_cannot_be_written_are_refused(tmp_path, capsys, name, part, options, message):
    write_run(tmp_path / "run", name, **options)
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")  # nothing is read
    arguments = () if part is None else ("--part", part)
    assert exported(tmp_path / "run", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_host_is_exported_whole(tmp_path, capsys):
    training = TrainConfig("x", model="unite").to_dict()
    settings = {"mmfused": "0.2.0", "model": {}, "training": training, "image_size": 32}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", settings)
    assert exported(tmp_path / "run", tmp_path / "out", "--part", "text") == 2
    message = "part: got 'text', expected no part with model 'unite', whose host is written"
    assert message in capsys.readouterr().err


def test_folders_in_an_exported_folder_are_listed_checked_and_replaced(tmp_path, capsys):
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    old = os.umask(0o027)
    try:
        assert exported(tmp_path / "run", out) == 0
    finally:
        os.umask(old)
    files = json.loads((out / "export.json").read_text())["files"]
    assert files == sorted(files) and {"1_Pooling/config.json", "README.md"} < set(files)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*.json")} == {0o640}
    assert exported(tmp_path / "run", out, "--part", "image", "--overwrite") == 0
    assert not (out / "1_Pooling").exists()
    assert exported(tmp_path / "run", out, "--overwrite") == 0
    for make, names in (
        (lambda: (out / "1_Pooling" / "notes.txt").touch(), "1_Pooling/notes.txt"),
        (lambda: (out / "2_Normalize" / "deep").mkdir(), "1_Pooling/notes.txt, 2_Normalize/deep"),
        (
            lambda: (
                (out / "1_Pooling").rename(tmp_path / "moved"),
                (out / "1_Pooling").symlink_to(tmp_path / "moved"),
            ),
            "1_Pooling, 2_Normalize/deep",
        ),
    ):
        make()
        assert exported(tmp_path / "run", out, "--overwrite") == 2
        assert f"mmfused export did not write ({names})" in capsys.readouterr().err
    assert (tmp_path / "moved" / "config.json").is_file()


def test_a_record_of_other_types_makes_all_files_foreign(tmp_path, capsys):
    write_run(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").touch()
    for files in ("notes", [3, None, ["notes"]], {"notes": 1}):
        (out / "export.json").write_text(json.dumps({"files": files}))
        assert exported(tmp_path / "run", out, "--overwrite") == 2
        assert "did not write (notes)" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["image", "text"])
def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch, part):
    write_run(tmp_path / "run")

    def fail(*_, **__):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert exported(tmp_path / "run", tmp_path / "out", "--part", part) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
