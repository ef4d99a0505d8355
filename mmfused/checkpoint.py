"""Checkpoints: all that a training needs to go on as if it had never stopped.

``OUT/checkpoints/step-00000123/`` holds ``model.safetensors``, ``optimizer.safetensors`` (AdamW's state by parameter name),
``rng.safetensors`` (states of the random generators), ``tokenizer/`` and ``state.json`` (where the training stood, its
settings, and the SHA-256 of every other file). It is written under a temporary name, forced to the disk and then renamed
in one move, so a folder of that name is whole unless the disk lost something; the sums tell. Nothing in it is a pickle.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch

from mmfused.run_folder import (
    load_weights,
    model_tensors,
    read_checkpoint,
    read_tensors,
    remove,
    sha256,
    sync,
    sync_entry,
    write_json,
)

NAME = re.compile(r"step-(\d{8,})")
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal ended a training, which is saved in ``path``; the message says how to go on."""

    def __init__(self, signum: int, step: int, path: str):
        super().__init__(signum, step, path)
        self.signum, self.step, self.path = signum, step, path

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        return f"stopped by {name} after step {self.step}, saved in {self.path}; the same command with --resume goes on from there"


class StopRequest:
    """``signum`` is None until the first SIGTERM or SIGINT; calling it tells whether one came."""

    signum: int | None = None

    def __call__(self) -> bool:
        return self.signum is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """The first SIGTERM or SIGINT within is only noted, so that work in hand can be finished; the next one acts as before.

    Signals that are ignored stay so (a shell's background job), and outside the main thread, where Python allows no
    handlers, nothing changes.
    """
    stop, before = StopRequest(), {}

    def restore():
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def note(signum, frame):
        stop.signum = signum
        restore()

    if threading.current_thread() is threading.main_thread():
        found = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        # None: set by something other than Python, which could not be put back.
        before = {signum: handler for signum, handler in found.items() if handler not in (None, signal.SIG_IGN)}
        for signum in before:
            signal.signal(signum, note)
    try:
        yield stop
    finally:
        restore()


def write(root: Path, state: dict, model, optimizer, generators: dict, tokenizer, keep: int) -> Path:
    """Saves a checkpoint of ``state["step"]``, a JSON object to which the sums are added, and removes all but ``keep``.

    Raises RuntimeError, and writes nothing, where a weight is not finite: going on from there would be of no use.
    """
    groups = {
        "model": model_tensors(model),
        "optimizer": optimizer_tensors(model, optimizer),
        "rng": rng_tensors(model, generators),
    }
    for name, tensor in groups["model"].items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(f"{name} is not finite after step {state['step']}, so no checkpoint was written: lower lr or clip")
    path = root / f"step-{state['step']:08d}"
    temporary = root / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, tensors in groups.items():
            (temporary / f"{name}.safetensors").write_bytes(safetensors.torch.save(tensors))
        tokenizer.save_pretrained(temporary / "tokenizer")
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        sums = {file.relative_to(temporary).as_posix(): sha256(file) for file in files}
        write_json(temporary / "state.json", {**state, "sha256": sums})
        sync(temporary)
        os.rename(temporary, path)
    finally:
        remove(temporary)
    for folder in (root, root.parent):
        sync_entry(folder)
    for old in saved(root)[:-keep]:
        discard(old)
    return path


def newest(root: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint under ``root`` and its state; None where there is none at all.

    Broken ones are passed over with a warning; raises ValueError where nothing else is there.
    """
    broken = []
    for path in reversed(saved(root)):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            broken.append(error)
            logger.warning("checkpoint %s is ignored: %s", path.name, error)
    if broken:
        raise ValueError(f"resume: {root} holds no whole checkpoint: {broken[0]}; overwrite the run to begin anew")
    return None


def restore(path: Path, model, optimizer, generators: dict):
    """Puts the checkpoint into ``model``, ``optimizer`` and ``generators``, and sets torch's own generators.

    Raises ValueError naming the first tensor that does not fit.
    """
    load_weights(model, path / "model.safetensors")
    indices = {name: index for index, name in enumerate(optimized_names(model, optimizer))}
    state = {}
    for key, tensor in read_tensors(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition(".")
        if name not in indices:
            raise ValueError(f"{path / 'optimizer.safetensors'} holds {key}, and the model has no such parameter")
        state.setdefault(indices[name], {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    states = read_tensors(path / "rng.safetensors")
    for name, generator in generators.items():
        generator.set_state(states[name])
    torch.set_rng_state(states["torch.cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "torch.cuda" in states:
        torch.cuda.set_rng_state(states["torch.cuda"], device)


def keep_until(root: Path, step: int):
    """Removes the checkpoints after ``step``, broken ones as it is gone on from there, and half-written and half-removed ones."""
    for path in saved(root):
        if step_of(path) > step:
            discard(path)
    for path in root.glob(".step-*.tmp"):
        remove(path)


def saved(root: Path) -> list[Path]:
    """The checkpoints under ``root``, oldest first."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def discard(path: Path):
    """Renamed first: a process killed meanwhile leaves nothing that looks like a checkpoint."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    os.rename(path, temporary)
    remove(temporary)


def optimized_names(model, optimizer) -> list[str]:
    """The parameters' names, in the order in which ``optimizer.state_dict()`` numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    names, state = optimized_names(model, optimizer), optimizer.state_dict()["state"]
    return {f"{names[i]}.{kind}": t.detach().cpu().contiguous() for i, entry in state.items() for kind, t in entry.items()}


def rng_tensors(model, generators: dict[str, torch.Generator]) -> dict[str, torch.Tensor]:
    """The uint8 states of ``generators``, by their names, and of torch's own ones, which draw dropout."""
    states = {name: generator.get_state() for name, generator in generators.items()}
    states["torch.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device)
    return states
