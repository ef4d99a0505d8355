"""The folder of a training run: whose it is, and how its files come to be there whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from matplotlib.figure import Figure

import mmfused

RUN_FILES = ("metrics.jsonl", "model.safetensors", "config.json", "summary.json", "curves.png", "tokenizer")


def check_out(out: Path, overwrite: bool):
    held = [name for name in RUN_FILES if (out / name).exists()]
    if held and not overwrite:
        raise FileExistsError(f"out: {out} already holds a run ({', '.join(held)}); choose another folder or overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)


def clear_out(out: Path):
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        remove(out / name)


def remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_run(out: Path, config, model, tokenizer, summary, history):
    """Every file under a temporary name first, then moved: a file with its own name is a whole file."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    settings = {"mmfused": mmfused.__version__, "model": model.config.to_dict(), "training": asdict(config)}
    whole(out / "tokenizer", lambda path: tokenizer.save_pretrained(path))
    whole(out / "model.safetensors", lambda path: path.write_bytes(safetensors.torch.save(state)))
    whole(out / "curves.png", lambda path: draw_curves({config.backend: history}, path))
    whole(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8"))
    whole(out / "config.json", lambda path: path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8"))


def whole(path: Path, write):
    """Calls ``write(temporary path)``, then gives the result its name in one move."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def draw_curves(runs: dict[str, dict], path: Path):
    """Training loss and validation accuracy of each named history, side by side, as PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, history in runs.items():
        left.plot([r["step"] for r in history["train"]], [r["loss"] for r in history["train"]], label=name, linewidth=1)
        right.plot([r["step"] for r in history["val"]], [r["accuracy"] for r in history["val"]], label=name, marker="o")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1))
    left.legend()
    figure.savefig(path, format="png", dpi=120)
