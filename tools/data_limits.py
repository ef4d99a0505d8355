"""Measure the time and the memory of large data sets, which this script generates.

    python tools/data_limits.py rows FOLDER     200,000 products: 500 steps of training, one embed
    python tools/data_limits.py pairs FOLDER    1,000,000 pairs with hard negatives: start, 20 steps
    python tools/data_limits.py search FOLDER   50,000 x 50,000 embeddings in nine pairs of views
    python tools/data_limits.py speed FOLDER    steps with pictures in memory and streamed

Each command runs in a process of its own, whose peak memory is printed. FOLDER keeps the data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

ROWS = 200_000
PAIRS = 1_000_000
ITEMS = 50_000
WORDS = (
    "red blue green steel glass oak mug plate lamp chair table shelf soft small large old".split()
)


def pictures(folder: Path, count: int, size: tuple[int, int] = (512, 384)) -> list[str]:
    """Write smooth random pictures, which a JPEG compresses like photos; return their names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"images/{number}.jpg" for number in range(count)]
    for name in names:
        pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (size[1], size[0], 3))
        Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(
            folder / name, quality=85
        )
    return names


def sentence(rng: np.random.Generator, words: int = 12) -> str:
    """Return a text of random words and numbers."""
    return " ".join([*rng.choice(WORDS, words - 2), *map(str, rng.integers(0, 10**6, 2))])


def write_products(folder: Path, rows: int) -> Path:
    """Write a folder of products with labels and coarse labels, unless it is there."""
    if not (folder / "metadata.csv").is_file():
        names = pictures(folder, min(rows, 2000))
        rng = np.random.default_rng(1)
        with open(folder / "metadata.new", "w", encoding="utf-8") as file:
            file.write("file_name,text,label,coarse_label\n")
            for row in range(rows):
                label = row % (rows // 4)
                file.write(f"{names[row % len(names)]},{sentence(rng)},{label},{label % 100}\n")
        os.replace(folder / "metadata.new", folder / "metadata.csv")
    return folder


def write_pairs(folder: Path, count: int) -> Path:
    """Write MMEB's JSON with a hard negative for each pair, unless it is there."""
    path = folder / "train.json"
    if not path.is_file():
        names = pictures(folder, 500)
        with open(folder / "train.new", "w", encoding="utf-8") as file:
            _write_list(file, _pairs(names, count))
        os.replace(folder / "train.new", path)
    return path


def _pairs(names: list[str], count: int) -> Iterator[dict[str, str]]:
    rng = np.random.default_rng(2)
    for row in range(count):
        query, positive, negative = (sentence(rng) for _ in range(3))
        yield {
            "qry": query,
            "qry_image_path": names[row % len(names)] if row % 2 else "",
            "pos_text": positive,
            "pos_image_path": "",
            "neg_text": negative,
            "neg_image_path": "",
        }


def _write_list(file: TextIO, rows: Iterator[dict[str, str]]) -> None:
    file.write("[")
    for number, row in enumerate(rows):
        file.write(("," if number else "") + json.dumps(row))
    file.write("]")


def write_embeddings(path: Path, seed: int) -> Path:
    """Write random embeddings of three views, unless they are there."""
    if not path.is_file():
        rng = np.random.default_rng(seed)
        arrays = {}
        for view in ("image", "text", "both"):
            values = rng.normal(size=(ITEMS, 256)).astype(np.float32)
            arrays[view] = values / np.linalg.norm(values, axis=1, keepdims=True)
        labels = np.arange(ITEMS, dtype=np.int64)
        present = np.ones(ITEMS, dtype=bool)
        np.savez(
            path,
            **arrays,
            labels=labels,
            has_image=present,
            has_text=present,
            file_names=np.array([f"{row}.jpg" for row in range(ITEMS)]),
            skipped=np.array("[]"),
        )
    return path


def measure(name: str, *command: object) -> None:
    """Run an mmfused command; print its seconds and its peak memory."""
    code = "import resource, sys; from mmfused.cli import main; code = main(sys.argv[1:]); "
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); "
    code += "sys.exit(code)"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - begun
    peak = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("peak ")]
    if done.returncode or not peak:
        sys.exit(done.stderr)
    print(f"{name}: {seconds:.1f} s, peak {int(peak[0]) / 2**20:.2f} GiB", flush=True)


def rows(folder: Path) -> None:
    """500 steps with 200,000 products, and their embeddings."""
    data = write_products(folder / "products", ROWS)
    val = write_products(folder / "val", 400)
    out = folder / "run"
    options = ("--batch-size", 32, "--stream", "--overwrite", "--image-size", 64)
    measure(
        "start and 1 step",
        *("train", "--model", "uniecs", "--data", data, "--val", val, "--out", out),
        *("--steps", 1, *options),
    )
    measure(
        "start and 500 steps",
        *("train", "--model", "uniecs", "--data", data, "--val", val, "--out", out),
        *("--steps", 500, *options),
    )
    file = folder / "items.npz"
    measure("embed", "embed", "--checkpoint", out, "--data", data, "--out", file, "--overwrite")


def pairs(folder: Path) -> None:
    """20 steps with 1,000,000 pairs and hard negatives."""
    data = write_pairs(folder / "pairs", PAIRS)
    val = write_pairs(folder / "pairs-val", 100)
    for steps in (1, 20):
        measure(
            f"start and {steps} steps",
            *("train", "--model", "unica", "--data", data, "--val", val, "--steps", steps),
            *("--batch-size", 32, "--out", folder / "pairs-run", "--overwrite"),
        )


def search(folder: Path) -> None:
    """Nine searches of 50,000 queries in 50,000 candidates."""
    files = [write_embeddings(folder / f"{name}.npz", seed) for seed, name in enumerate("qc")]
    measure("search", "eval", "--embeddings", files[0], "--products-embeddings", files[1])


def speed(folder: Path) -> None:
    """Steps with the pictures of 2,000 products in memory, and streamed."""
    data = write_products(folder / "few", 2000)
    val = write_products(folder / "small", 32)
    for size, model_options in ((96, ()), (224, ("--preset", "paper"))):
        for stream in ("--no-stream", "--stream"):
            out = folder / f"speed{stream}"
            measure(
                f"{size} px {stream}",
                *("train", "--model", "uniecs", "--data", data, "--val", val, "--out", out),
                *("--image-size", size, "--overwrite", stream, "--batch-size", 32, *model_options),
                *("--steps", 40 if size == 96 else 4),
            )
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            print(f"  {summary['step_seconds']:.4f} s a step")


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = {"rows": rows, "pairs": pairs, "search": search, "speed": speed}
    parser.add_argument("what", choices=commands)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    commands[args.what](args.folder)


if __name__ == "__main__":
    main()
