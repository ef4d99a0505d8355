"""mmfused convert writes the tensors of a pickle unchanged, and runs and leaves nothing else."""

import json
import os
import pickle
import signal
import sys
import types
import zipfile
from collections import OrderedDict
from hashlib import sha256

import pytest
import safetensors.torch
import torch
from retrieval_models import TEXTS
from torch import nn

from mmfused.cli import convert, main, unpickle
from mmfused.data import load_tokenizer, train_tokenizer


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """The parts that the check of the new folder finds, and the folders that it gets."""
    checked = []

    def check_pretrained(folder, argument):
        checked.append(sorted(path.name for path in folder.iterdir()))
        held = safetensors.torch.load_file(folder / "model.safetensors")
        for name, error in (("refused", ValueError), ("absent", FileNotFoundError)):
            if name in held:
                raise error(f"{argument}: {folder}: got {name}, expected the weights of a model")
        return ("image_encoder", "text_encoder")

    module = types.ModuleType("mmfused.models.published")
    module.check_pretrained = check_pretrained  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmfused.models.published", module)
    return checked


@pytest.fixture
def in_this_process(monkeypatch):
    """Read pickles in this process, to save time."""
    monkeypatch.setattr(convert, "read_pickle", unpickle.convert)


def values():
    """Return tensors of several types, shapes and strides, of which two share numbers."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    return {
        "wide.weight": table,
        "tied.weight": table,
        "rows.weight": table[1:4],
        "turned.weight": table.T,
        "half.weight": torch.randn(3, 3, generator=draw).half(),
        "brain.weight": torch.randn(1, generator=draw).bfloat16(),
        "small": torch.tensor([1, -2, 3], dtype=torch.int8),
        "positions": torch.arange(6).expand((2, -1)),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "scale": torch.tensor(2.5),
        "strided": torch.arange(8.0)[::2],
        "negated": torch._neg_view(torch.arange(4.0)),
    }


def save(path, value, old=False):
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


def run(path, out, *options):
    return main(["convert", str(path), "--out", str(out), *options])


def refusal(capsys, path, out, *options):
    """Return the message of a refused conversion, which leaves nothing."""
    before = sorted(out.parent.iterdir())
    assert run(path, out, *options) == 2
    assert sorted(out.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert message.startswith("mmfused: error: ") and message.count("\n") == 1
    return message


def assert_written(out, expected):
    written = safetensors.torch.load_file(out / "model.safetensors")
    assert sorted(written) == sorted(expected)
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("wrap", "dropped"),
    [
        (lambda state: state, []),
        (lambda state: OrderedDict(state, epoch=3), ["epoch"]),
        (lambda state: {"epoch": 3, "name": "a", "state_dict": state}, ["epoch", "name"]),
        (lambda state: {"step": torch.tensor(1), "model": {"state_dict": state}}, ["step"]),
        (lambda state: {f"module._orig_mod.{name}": x for name, x in state.items()}, []),
    ],
)
def test_the_tensors_are_written_unchanged(tmp_path, wrap, dropped, old):
    source, out = save(tmp_path / "a.pt", wrap(values()), old), tmp_path / "model.safetensors"
    found = unpickle.convert(source, out)
    assert (found["tensors"], found["dropped"]) == (len(values()), dropped)
    assert_written(tmp_path, values())


def test_the_folder_of_a_checkpoint(tmp_path, capsys):
    value = {"epoch": 3, "a\x1b[2J": 1, "state_dict": values()}
    source = save(tmp_path / "a b.pt", value)
    out = tmp_path / "out dir"
    assert run(source, out) == 0
    assert_written(out, values())
    printed = capsys.readouterr().out
    assert f"13 tensors of {source} written to {out}: image_encoder, text_encoder" in printed
    assert "left out: epoch, a?[2J\n" in printed
    train = "next: mmfused train --model uniecs --preset code --init"
    assert f"{train} '{out}' --tokenizer NAME --data" in printed
    record = json.loads((out / "convert.json").read_text())
    assert record["source"] == "a b.pt" and record["files"] == ["model.safetensors"]
    assert record["sha256"] == sha256(source.read_bytes()).hexdigest()
    assert str(tmp_path) not in (out / "convert.json").read_text()
    assert (out / "model.safetensors").stat().st_mode == (out / "convert.json").stat().st_mode


def test_parameters_and_optimizers(tmp_path):
    layer = nn.DataParallel(nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"state_dict": dict(layer.named_parameters()), "optimizer": optimizer.state_dict()}
    found = unpickle.convert(save(tmp_path / "a.ckpt", state), tmp_path / "model.safetensors")
    assert_written(tmp_path, layer.module.state_dict())
    assert (found["prefix"], found["dropped"]) == ("module.", ["optimizer"])


def test_a_prefix_that_some_names_lack_is_kept(tmp_path):
    state = {"module.weight": torch.ones(2), "scale": torch.ones(())}
    unpickle.convert(save(tmp_path / "a.pt", state), tmp_path / "model.safetensors")
    assert_written(tmp_path, state)


def test_each_tensor_starts_at_a_multiple_of_its_numbers(tmp_path):
    """safetensors' readers view the bytes of a mapped file as numbers."""
    unpickle.convert(save(tmp_path / "a.pt", values()), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, tensor in values().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


@pytest.mark.parametrize("old", [False, True])
def test_tensors_of_another_device_are_read(tmp_path, monkeypatch, old):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        source = save(tmp_path / "a.pt", {"weight": torch.ones(2)}, old)
    given, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *x, **named: given.append(named) or load(*x, **named))
    unpickle.convert(source, tmp_path / "model.safetensors")
    assert_written(tmp_path, {"weight": torch.ones(2)})
    assert [named["mmap"] for named in given] == [not old]  # a zip is not held in memory


@pytest.mark.usefixtures("in_this_process")
def test_settings_and_tokenizer_beside_the_file_are_copied(tmp_path, parts):
    source, out = tmp_path / "source", tmp_path / "out"
    train_tokenizer(TEXTS).save_pretrained(source)
    (source / "stored").write_text('{"model_type": "bert"}')
    (source / "config.json").symlink_to("stored")  # as in the cache of the hub
    (source / "open_clip_config.json").write_text("{}")
    (source / "notes.txt").touch()
    (source / "vocab.txt").touch()
    save(source / "pytorch_model.bin", values())
    assert run(source / "pytorch_model.bin", out) == 0
    names = ["config.json", "model.safetensors", "open_clip_config.json"]
    names += ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert json.loads((out / "convert.json").read_text())["files"] == names
    assert parts == [sorted([*names, "convert.json"])]
    assert not (out / "config.json").is_symlink()
    assert (out / "config.json").read_text() == '{"model_type": "bert"}'
    own = train_tokenizer(["other words"])
    own.save_pretrained(tmp_path / "own")
    options = ("--tokenizer", str(tmp_path / "own"), "--overwrite")
    assert run(source / "pytorch_model.bin", out, *options) == 0
    assert not (out / "vocab.txt").exists()
    assert load_tokenizer(out)("words")["input_ids"] == own("words")["input_ids"]


class Runs:
    """A pickle of this runs a command of the shell."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["value", "beside"])
def test_code_is_refused_by_name_and_does_not_run(tmp_path, old, where):
    code = Runs(tmp_path / "ran")
    value = code if where == "value" else {**values(), "args": code}
    source = save(tmp_path / "a.pth", value, old)
    with pytest.raises(ValueError, match="its pickle would call posix.system, expected tensors"):
        unpickle.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_of_code_does_not_run(tmp_path, capsys):
    source = tmp_path / "a.bin"
    source.write_bytes(pickle.dumps(Runs(tmp_path / "ran"), 2))
    assert "would call posix.system" in refusal(capsys, source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_modules_beside_the_file_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("open('ran', 'w')")
    save(tmp_path / "a.pt", values())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")]))
    assert run("a.pt", "out") == 0
    assert not list(tmp_path.rglob("ran"))


def truncated(path, old=False):
    save(path, {"a": torch.ones(5000)}, old)
    path.write_bytes(path.read_bytes()[:9000])


def compressed(path):
    save(path.with_suffix(".zip"), values())
    with zipfile.ZipFile(path.with_suffix(".zip")) as read, zipfile.ZipFile(path, "w") as written:
        for entry in read.infolist():
            written.writestr(entry.filename, read.read(entry), zipfile.ZIP_DEFLATED)
    path.with_suffix(".zip").unlink()


def other_zip(path):
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("a.txt", "text")


def scripted(path):
    with zipfile.ZipFile(path, "w") as written:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            written.writestr(f"model/{name}", b"")


def in_a_circle(path):
    value: dict = {}
    value["model"] = value
    save(path, value)


def of_tensor(name, make):
    return lambda path: save(path, {"good": torch.ones(2), name: make()})


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def flipped(path):
    """Write a file in which one bit of a number is another."""
    save(path, {"a": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 99] ^= 4
    path.write_bytes(data)


BAD = {
    "flipped": (flipped, "it is corrupt: the checksum of .*data/0 is not that of its bytes"),
    "truncated": (truncated, "it is a truncated or corrupt archive"),
    "truncated, old": (lambda path: truncated(path, True), "truncated"),
    "empty": (lambda path: path.touch(), "it is truncated, corrupt, or no pickle"),
    "text": (lambda path: path.write_text("hello"), "it is truncated, corrupt, or no pickle"),
    "json": (lambda path: path.write_text('{"a": 1}'), "no pickle"),
    "zip": (other_zip, "it is an archive without data.pkl, expected a file of torch.save"),
    "compressed": (compressed, "expected a file of torch.save, which compresses nothing"),
    "TorchScript": (scripted, "it is a TorchScript archive, which holds a program"),
    "a number": (lambda path: save(path, 5), "it holds a int, expected a dict of tensors"),
    "a tensor": (lambda path: save(path, torch.ones(2)), "it holds a Tensor, expected a dict"),
    "no tensors": (lambda path: save(path, {"epoch": 1, "b": []}), "no tensors under epoch, b"),
    "nothing": (lambda path: save(path, {}), "it holds no tensors under any name"),
    "a circle": (in_a_circle, "it holds no tensors under model"),
    "numbered": (of_tensor(3, lambda: torch.ones(1)), "it holds a tensor under 3, expected a name"),
    "reserved": (of_tensor("__metadata__", lambda: torch.ones(1)), "expected a name"),
    "sparse": (of_tensor("s.weight", lambda: torch.eye(3).to_sparse()), "s.weight: got a tensor"),
    "complex": (of_tensor("c", lambda: torch.ones(2) * 1j), "c: got torch.complex64, expected"),
    "meta": (of_tensor("m", lambda: torch.ones(2, device="meta")), "m: got a tensor of meta"),
    "quantised": (of_tensor("q", quantised), "q: got torch.qint8, expected"),
    "a bomb": (of_tensor("x", lambda: torch.ones(1).expand(1 << 40)), "its tensors have 439804"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(tmp_path, kind):
    make, reason = BAD[kind]
    make(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"^it[^\n]*{reason}|^{reason}"):
        unpickle.convert(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["refused", "absent"])
def test_unknown_weights_are_refused_and_leave_nothing(tmp_path, capsys, name):
    source = save(tmp_path / "a.pth", {name: torch.ones(1)})
    message = refusal(capsys, source, tmp_path / "out")
    assert message.endswith(f"file: {source}: got {name}, expected the weights of a model\n")


def test_bad_arguments_are_refused_before_the_file_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "read_pickle", None)
    source, out = save(tmp_path / "a.pt", values()), tmp_path / "out"
    assert "expected a file" in refusal(capsys, tmp_path / "no.pt", out)
    assert "expected a file" in refusal(capsys, tmp_path, out)
    assert "tokenizer: got" in refusal(capsys, source, out, "--tokenizer", str(tmp_path))
    assert "mmfused convert did not write (a.pt)" in refusal(capsys, source, tmp_path)
    assert run(source, tmp_path / "no" / "out") == 2
    assert "expected a new folder in an existing one" in capsys.readouterr().err


def test_a_killed_process_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = save(tmp_path / "a.pt", values())
    killer = tmp_path / "killer"
    code = f"import os, signal; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    killer.write_text(f"#!{sys.executable}\n{code}\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    message = refusal(capsys, source, tmp_path / "out")
    assert "signal 9 ended the process that read it; is there enough memory?" in message
    killer.write_text("#!/bin/sh\necho 'no such module' >&2\nexit 1\n")
    assert "failed: no such module" in refusal(capsys, source, tmp_path / "out")


def test_a_full_disk_and_a_lack_of_memory_are_told(tmp_path, capsys, monkeypatch):
    load = torch.load
    for place, error, reason in (
        ((unpickle, "_write"), OSError(28, "No space left on device"), "No space left on device"),
        ((unpickle, "_write"), MemoryError(), "there is not enough memory"),
        ((torch, "load"), MemoryError(), "there is not enough memory"),
        ((torch, "load"), OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", load)
        monkeypatch.setattr(*place, fail)
        limits = []
        monkeypatch.setattr(unpickle.resource, "setrlimit", lambda *x, to=limits: to.append(x))
        monkeypatch.setattr(sys, "argv", ["", str(save(tmp_path / "a.pt", values())), "out"])
        unpickle.main()
        assert json.loads(capsys.readouterr().out)["error"].endswith(reason)
        assert limits == [(unpickle.resource.RLIMIT_CORE, (0, 0))]


@pytest.mark.usefixtures("in_this_process")
def test_only_converted_folders_are_replaced(tmp_path, capsys):
    source, out = save(tmp_path / "a.pt", values()), tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text('{"files": []}')  # of another command
    assert "mmfused convert did not write (export.json)" in refusal(capsys, source, out)
    (out / "export.json").unlink()
    assert run(source, out, "--overwrite") == 0
    assert_written(out, values())
    assert "already exists" in refusal(capsys, source, out)
