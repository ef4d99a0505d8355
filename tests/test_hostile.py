"""Tests of folders with malicious files: no code may run, and no outside file may be read.

A damaged run or metadata.csv gives a one-line error. A damaged picture is skipped and reported.
"""

import csv
import json
import os
import pickle
import re
import shutil
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from watching import Payload, watched

from mmfused.cli import main
from mmfused.training.files import read_json
from mmfused.training.folder_lock import MARKER


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a folder of products, and train a retrieval model on it for one step."""
    root = tmp_path_factory.mktemp("made")
    write_products(root / "data")
    sizes = "--steps 1 --batch-size 4 --image-size 32 --max-length 12 --save-every 1"
    sizes += " --backend composed --device cpu"
    options = [
        "--model",
        "uniecs",
        "--data",
        str(root / "data"),
        "--val",
        str(root / "data"),
        *sizes.split(),
    ]
    assert main(["train", *options, "--out", str(root / "run")]) == 0
    return root, options


def write_products(folder):
    folder.mkdir()
    noise = np.random.default_rng(0)
    rows = [(f"{row}.png", f"thing number {row}", row % 3) for row in range(9)]
    for name, _, _ in rows:
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
    write_rows(folder, rows)


def write_rows(folder, rows):
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "label"])
        writer.writerows(rows)


class Place:
    """Copies of a run and its data, which a test damages.

    The folder ``outside`` must not be read.
    """

    def __init__(self, root, made, options):
        self.root, self.options = root, options
        self.run, self.data, self.outside = root / "run", root / "data", root / "outside"
        shutil.copytree(made / "run", self.run)
        shutil.copytree(made / "data", self.data)
        self.outside.mkdir()
        self.marker = root / "code-has-run"
        shutil.copytree(made / "run" / "tokenizer", self.outside / "tokenizer")
        shutil.copytree(self.step(), self.outside / "step")
        shutil.copy(made / "run" / "model.safetensors", self.outside)
        shutil.copy(made / "data" / "0.png", self.outside / "secret.png")
        (self.outside / "secret.json").write_bytes((made / "run" / "config.json").read_bytes())
        (self.outside / "weights.pt").write_bytes(pickle.dumps(Payload(self.marker)))
        (self.outside / "code.py").write_text(f"import os; os.mkdir({str(self.marker)!r})")

    def step(self):
        return self.run / "checkpoints" / "step-00000001"

    def change(self, *names, file="config.json", **values):
        """Set values in a JSON file of the run, at the place given by the keys ``names``."""
        content = read_json(self.run / file)
        inner = content
        for name in names:
            inner = inner.setdefault(name, {})
        inner.update(values)
        (self.run / file).write_text(json.dumps(content).replace("OUTSIDE", str(self.outside)))

    def link(self, path, target):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(self.outside / target)


def eval_command(place):
    return ["eval", "--checkpoint", str(place.run), "--data", str(place.data), "--device", "cpu"]


def resume_command(place):
    """Delete the files of the finished model; return the command that resumes the run."""
    for name in ("config.json", "summary.json", "model.safetensors"):
        (place.run / name).unlink(missing_ok=True)
    return ["train", *place.options, "--out", str(place.run), "--resume"]


def embed_command(place):
    out = place.root / "items.npz"
    return [
        "embed",
        "--checkpoint",
        str(place.run),
        "--data",
        str(place.data),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]


def image(**values):
    return lambda place: place.change("model", "image", **values)


def text(**values):
    return lambda place: place.change("model", "text", **values)


def model(**values):
    return lambda place: place.change("model", **values)


def setting(**values):
    return lambda place: place.change("training", **values)


def tokenizer(**values):
    return lambda place: place.change(file="tokenizer/tokenizer_config.json", **values)


def remote_code(place):
    shutil.copy(place.outside / "code.py", place.run / "code.py")
    place.change("model", "text", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})


def remote_tokenizer(place):
    shutil.copy(place.outside / "code.py", place.run / "tokenizer" / "code.py")
    tokenizer(auto_map={"AutoTokenizer": ["code.Tokenizer", None]}, tokenizer_class="Tokenizer")(
        place
    )
    (place.run / "tokenizer" / "tokenizer.json").unlink()


def pickled_weights(place):
    (place.run / "model.safetensors").unlink()
    shutil.copy(place.outside / "weights.pt", place.run / "pytorch_model.bin")


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def encoded_length(number):
    return number.to_bytes(8, "little")


def shapes_beyond_the_file(place):
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    ).encode()
    (place.run / "model.safetensors").write_bytes(encoded_length(len(header)) + header)


def checksum_of_an_outside_file(place):
    place.change(
        file="checkpoints/step-00000001/state.json", sha256={"../../../outside/secret.json": "0"}
    )


# name -> (how the folder is damaged, the command that reads it, a pattern of the error)
RUNS = {
    "a checkpoint path for timm": (
        image(checkpoint_path="OUTSIDE/weights.pt"),
        eval_command,
        "checkpoint_path",
    ),
    "pretrained weights from timm": (
        image(name="vit_tiny_patch16_224", pretrained=True),
        eval_command,
        "pretrained",
    ),
    "an encoder from a hub": (
        image(name="hf-hub:somebody/vit"),
        eval_command,
        "hf-hub:somebody/vit",
    ),
    "an encoder from another folder": (image(name="local-dir:OUTSIDE"), eval_command, "local-dir:"),
    "another cache folder": (
        image(name="vit_tiny_patch16_224", cache_dir="OUTSIDE"),
        eval_command,
        "cache_dir",
    ),
    "code for transformers": (remote_code, eval_command, "auto_map"),
    "an attention kernel from a hub": (
        text(attn_implementation="somebody/kernel"),
        eval_command,
        "attn_implementation",
    ),
    "quantised by a plug-in": (
        text(quantization_config={"quant_method": "bitsandbytes"}),
        eval_command,
        "quantization_config",
    ),
    "another name or path": (text(_name_or_path="OUTSIDE"), eval_command, "_name_or_path"),
    "an unknown text model": (
        text(model_type="timm_backbone", backbone="hf-hub:x"),
        eval_command,
        "model_type",
    ),
    "an unknown model class": (setting(model="os.system"), eval_command, "model"),
    "a billion layers": (text(num_hidden_layers=10**9), eval_command, "num_hidden_layers"),
    "a width of a billion": (text(intermediate_size=10**9), eval_command, "intermediate_size"),
    "weights of a huge vocabulary": (text(vocab_size=10**8 - 1), eval_command, "another model"),
    "a picture of a billion pixels": (image(img_size=2**20), eval_command, "img_size"),
    "a string as width": (model(dim="128"), eval_command, "dim"),
    "a list as activation": (text(hidden_act=["gelu"]), eval_command, "hidden_act"),
    "an unknown field": (model(__class__="x"), eval_command, "__class__"),
    "a list as column name": (setting(text_column=["text"]), eval_command, "text_column"),
    "a huge text length": (setting(max_length=10**15), eval_command, "max_length"),
    "settings linked from outside": (
        lambda p: p.link(p.run / "config.json", "secret.json"),
        eval_command,
        "leads outside",
    ),
    "settings from a pipe": (
        lambda p: fifo(p.run / "config.json"),
        eval_command,
        "config.json is missing",
    ),
    "settings of 128 MiB": (
        lambda p: os.truncate(p.run / "config.json", 2**27),
        eval_command,
        "the largest size that is read",
    ),
    "deeply nested settings": (
        lambda p: (p.run / "config.json").write_text("[" * 10**6),
        eval_command,
        "truncated or corrupt",
    ),
    "weights linked from outside": (
        lambda p: p.link(p.run / "model.safetensors", "model.safetensors"),
        eval_command,
        "leads outside",
    ),
    "weights in a pickle": (pickled_weights, eval_command, "pickle|is missing"),
    "a pickle by another name": (
        lambda p: shutil.copy(p.outside / "weights.pt", p.run / "model.safetensors"),
        eval_command,
        "not a safetensors file",
    ),
    "a header of many terabytes": (
        lambda p: (p.run / "model.safetensors").write_bytes(encoded_length(2**60) + b"{}"),
        eval_command,
        "not a safetensors file",
    ),
    "tensors beyond the file": (shapes_beyond_the_file, eval_command, "not a safetensors file"),
    "a tokenizer linked from outside": (
        lambda p: p.link(p.run / "tokenizer", "tokenizer"),
        eval_command,
        "leads outside",
    ),
    "a tokenizer's file linked from outside": (
        lambda p: p.link(p.run / "tokenizer" / "tokenizer.json", "tokenizer/tokenizer.json"),
        eval_command,
        "leads outside",
    ),
    "code for a tokenizer": (remote_tokenizer, eval_command, "tokenizer"),
    "a truncated tokenizer": (
        lambda p: os.truncate(p.run / "tokenizer" / "tokenizer.json", 99),
        eval_command,
        "tokenizer",
    ),
    "a deeply nested tokenizer": (
        lambda p: (p.run / "tokenizer" / "tokenizer.json").write_text("[" * 10**5),
        eval_command,
        "tokenizer",
    ),
    "a checkpoint linked from outside": (
        lambda p: p.link(p.step(), "step"),
        resume_command,
        "no run made|holds only damaged checkpoints",
    ),
    "a checkpoint's weights linked from outside": (
        lambda p: p.link(p.step() / "model.safetensors", "step/model.safetensors"),
        resume_command,
        "leads outside",
    ),
    "a checksum of an outside file": (
        checksum_of_an_outside_file,
        resume_command,
        "leads outside|is not the one in state.json",
    ),
    "records linked from outside": (
        lambda p: p.link(p.run / "metrics.jsonl", "secret.json"),
        resume_command,
        "links, pipes or folders",
    ),
    "a random state in a pickle": (
        lambda p: shutil.copy(p.outside / "weights.pt", p.step() / "rng.safetensors"),
        resume_command,
        "SHA-256 is not the one",
    ),
}


def parts(place):
    folder = place.root / "items.npz.parts"
    folder.mkdir()
    (folder / MARKER).touch()
    return folder


def part_linked_from_outside(place):
    (parts(place) / "00000000.safetensors").symlink_to(place.outside / "model.safetensors")


def job_linked_from_outside(place):
    (parts(place) / "job.json").symlink_to(place.outside / "secret.json")


def pickled_part(place):
    shutil.copy(place.outside / "weights.pt", parts(place) / "00000000.npz")


RUNS |= {
    "a part linked from outside": (
        part_linked_from_outside,
        embed_command,
        "did not make .00000000.safetensors",
    ),
    "a job linked from outside": (job_linked_from_outside, embed_command, "did not make .job.json"),
    "a part in a pickle": (pickled_part, embed_command, "did not make .00000000.npz"),
}


@pytest.fixture
def place(tmp_path, made):
    return Place(tmp_path, *made)


def run_command(place, arguments, capsys):
    """Run the command and return (exit code, errors, output).

    Check that the command reads nothing outside the folder and runs no code.
    """
    capsys.readouterr()
    with watched(place.outside) as seen:
        code = main(arguments)
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("mmfused: ")]
    assert not place.marker.exists(), "code from the folder has run"
    assert seen == []
    return code, errors, printed.out + printed.err


@pytest.mark.parametrize("name", RUNS)
def test_hostile_run_gives_a_one_line_error(place, capsys, name):
    damage, command, pattern = RUNS[name]
    damage(place)
    code, errors, _ = run_command(place, command(place), capsys)
    assert code == 2 and len(errors) == 1
    assert re.search(pattern, errors[0]), errors[0]


# Folders of products


def png(width, height, *chunks):
    """Return a PNG with this size in its header and these chunks."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    head = chunk(
        b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    )
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in chunks) + chunk(b"IEND", b"")
    )


def postscript(place):
    code = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n"
    code += f"({place.marker}) (w) file closefile\n%%EOF\n"
    (place.data / "0.png").write_text(code)


def bomb(place):
    (place.data / "0.png").write_bytes(
        png(200_000, 200_000, (b"IDAT", zlib.compress(bytes(10**6))))
    )


def text_bomb(place):
    (place.data / "0.png").write_bytes(
        png(32, 32, (b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8), 9)))
    )


def tiff(place):
    Image.new("L", (32, 32)).save(place.data / "0.png", format="TIFF")
    content = bytearray((place.data / "0.png").read_bytes())
    place_of_width = content.index(bytes([0, 1, 4, 0, 1, 0, 0, 0, 32]))
    content[place_of_width + 8 : place_of_width + 12] = (2**31 - 1).to_bytes(4, "little")
    (place.data / "0.png").write_bytes(content)


def row(name):
    """Return a function that replaces the picture's name in the first row."""

    def damage(place):
        content = (
            (place.data / "metadata.csv")
            .read_text()
            .replace("\n0.png", "\n" + name.replace("OUTSIDE", str(place.outside)))
        )
        (place.data / "metadata.csv").write_text(content)

    return damage


def device(place):
    (place.data / "0.png").unlink()
    (place.data / "0.png").symlink_to("/dev/zero")


PICTURES = {
    "a path to an outside file": (row("../outside/secret.png"), "leads outside"),
    "an absolute path": (row("OUTSIDE/secret.png"), "leads outside"),
    "a link to an outside file": (
        lambda p: p.link(p.data / "0.png", "secret.png"),
        "leads outside",
    ),
    "a device": (device, "leads outside"),
    "a pipe": (lambda p: fifo(p.data / "0.png"), "not a regular file"),
    "a folder": (row("."), "not a regular file"),
    "a name with a zero byte": (row("0\0.png"), "line 2"),
    "a name of 5000 letters": (row("x" * 5000), "line 2"),
    "a program in PostScript": (postscript, "cannot be read"),
    "a picture of forty billion pixels": (bomb, "pixels"),
    "a text of a hundred million letters": (text_bomb, "cannot be read"),
    "a width of two billion": (tiff, "cannot be read|pixels"),
    "a pickle": (
        lambda p: shutil.copy(p.outside / "weights.pt", p.data / "0.png"),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_hostile_picture_is_reported_and_other_pictures_are_read(place, capsys, name):
    damage, pattern = PICTURES[name]
    damage(place)
    code, errors, output = run_command(place, embed_command(place), capsys)
    assert code == 0 and errors == []
    with np.load(place.root / "items.npz") as items:
        (skipped,) = json.loads(str(items["skipped"]))
        assert len(items["labels"]) == 8
    assert "8 items embedded, 1 rows skipped" in output
    assert "line 2" in skipped and re.search(pattern, skipped), skipped


def linked_rows(place):
    (place.data / "metadata.csv").rename(place.outside / "metadata.csv")
    (place.data / "metadata.csv").symlink_to(place.outside / "metadata.csv")


METADATA = {
    "rows from a pipe": (lambda p: fifo(p.data / "metadata.csv"), "metadata.csv"),
    "rows linked from outside": (linked_rows, "leads outside"),
    "rows that are a folder": (
        lambda p: ((p.data / "metadata.csv").unlink(), (p.data / "metadata.csv").mkdir()),
        "metadata.csv",
    ),
    "rows in another encoding": (
        lambda p: (p.data / "metadata.csv").write_bytes("file_name,text,label\n".encode("utf-16")),
        "UTF-8",
    ),
    "a column twice": (
        lambda p: (p.data / "metadata.csv").write_text("file_name,text,label,text\n0.png,a,0,b\n"),
        "text",
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_hostile_metadata_gives_a_one_line_error(place, capsys, name):
    damage, pattern = METADATA[name]
    damage(place)
    code, errors, _ = run_command(place, embed_command(place), capsys)
    assert code == 2 and len(errors) == 1 and "data: " in errors[0]
    assert re.search(pattern, errors[0]), errors[0]


def test_at_least_60_hostile_cases_are_tested():
    assert len(RUNS) + len(PICTURES) + len(METADATA) >= 60


def test_watched_detects_outside_reads_and_code(place):
    """The other tests rely on ``watched``."""
    with watched(place.outside) as seen:
        Path(place.outside / "secret.json").read_bytes()
        (place.outside / "link").symlink_to("secret.json")
        (place.outside / "link").read_bytes()
        pickle.loads((place.outside / "weights.pt").read_bytes())
        safetensors.torch.load_file(place.outside / "model.safetensors")
        with safetensors.safe_open(place.outside / "model.safetensors", "pt"):
            pass
        os.system("true")
        socket.socket().close()
    assert {Path(what).name for kind, what in seen if kind == "open"} == {
        "secret.json",
        "link",
        "weights.pt",
        "model.safetensors",
    }
    assert {kind for kind, _ in seen} == {
        "open",
        "pickle.find_class",
        "os.system",
        "socket.__new__",
    }
    assert place.marker.exists()
