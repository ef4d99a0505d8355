"""Checkpoints: all that a training needs to go on as if it had never stopped.

``OUT/checkpoints/step-00000123/`` holds ``model.safetensors``, ``optimizer.safetensors`` (AdamW's
state by parameter name), ``rng.safetensors`` (states of the random generators), ``tokenizer/`` and
``state.json`` (where the training stood, its settings, and the SHA-256 of every other file). It is
written under a temporary name, forced to the disk and then renamed in one move, so a folder of that
name is whole unless the disk lost something; the sums tell. Nothing in it is a pickle."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from mmfused.extras import from_extra
from mmfused.training.ownership import STEP, TEMPORARY, strangers_in_step, temporary
from mmfused.training.run_folder import (
    load_weights,
    model_tensors,
    read_checkpoint,
    read_tensors,
    remove,
    sha256,
    shown,
    sync,
    sync_entry,
    write_json,
)

with from_extra("models"):
    import safetensors.torch

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
    """The first SIGTERM or SIGINT within is only noted, so that work in hand can be finished; the
    next one acts as before.

    Signals that are ignored stay so (a shell's background job), and outside the main thread, where
    Python allows no handlers, nothing changes."""
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
        before = {
            signum: handler
            for signum, handler in found.items()
            if handler not in (None, signal.SIG_IGN)
        }
        for signum in before:
            signal.signal(signum, note)
    try:
        yield stop
    finally:
        restore()


def write(
    root: Path,
    state: dict,
    model,
    optimizer,
    generators: dict,
    tokenizer,
    keep: int,
) -> Path:
    """Saves a checkpoint of ``state["step"]``, a JSON object to which the sums are added, and
    removes all but ``keep``.

    Raises RuntimeError, and writes nothing, where a weight is not finite: going on from there would
    be of no use."""
    groups = {
        "model": model_tensors(model),
        "optimizer": optimizer_tensors(model, optimizer),
        "rng": rng_tensors(model, generators),
    }
    for name, tensor in groups["model"].items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(
                f"{name} is not finite after step {state['step']}, so no checkpoint was written: lower lr or clip"
            )
    path = root / f"step-{state['step']:08d}"
    draft = temporary(path)
    try:
        draft.mkdir(parents=True)
        for name, tensors in groups.items():
            (draft / f"{name}.safetensors").write_bytes(safetensors.torch.save(tensors))
        tokenizer.save_pretrained(draft / "tokenizer")
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        sums = {file.relative_to(draft).as_posix(): sha256(file) for file in files}
        write_json(draft / "state.json", {**state, "sha256": sums})
        sync(draft)
        os.rename(draft, path)
    finally:
        remove(draft)
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
        raise ValueError(
            f"resume: {root} holds no whole checkpoint: {broken[0]}; overwrite the run to begin anew"
        )
    return None


def restore(path: Path, model, optimizer, generators: dict):
    """Puts the checkpoint into ``model``, ``optimizer`` and ``generators``, and sets torch's own
    generators.

    Raises ValueError naming the first tensor that does not fit.
    """
    load_weights(model, path / "model.safetensors")
    state = read_optimizer_state(path / "optimizer.safetensors", model, optimizer)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    states, source = read_tensors(path / "rng.safetensors"), path / "rng.safetensors"
    setters = {name: generator.set_state for name, generator in generators.items()} | {
        "torch.cpu": torch.set_rng_state
    }
    device = next(model.parameters()).device
    if device.type == "cuda" and "torch.cuda" in states:
        setters["torch.cuda"] = partial(torch.cuda.set_rng_state, device=device)
    for name, set_state in setters.items():
        if name not in states:
            raise ValueError(f"{source} lacks the state of the random generator {name}")
        try:
            set_state(states[name])
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{source} holds no state of the random generator {name}: {error}"
            ) from error


def read_optimizer_state(path: Path, model, optimizer) -> dict[int, dict]:
    """AdamW's state by the parameters' numbers; ValueError names the first tensor that the model's
    parameters do not have.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    indices = {name: index for index, name in enumerate(optimized_names(model, optimizer))}
    state: dict[int, dict] = {}
    for key, tensor in read_tensors(path).items():
        name, _, kind = key.rpartition(".")
        if name not in indices:
            raise ValueError(f"{path} holds {key}, and the model has no such parameter")
        expected = () if kind == "step" else shapes[name]
        if kind not in ("step", "exp_avg", "exp_avg_sq") or tuple(tensor.shape) != expected:
            raise ValueError(
                f"{path} holds {key} of shape {tuple(tensor.shape)}, and AdamW has no such state of this model"
            )
        state.setdefault(indices[name], {})[kind] = tensor
    for index, entry in state.items():
        right = len(entry) == 3 and all(
            t.is_floating_point() and t.isfinite().all() for t in entry.values()
        )
        if not right or not entry["step"] >= 1:
            raise ValueError(
                f"{path} holds no whole state of AdamW for {optimized_names(model, optimizer)[index]}"
            )
    if not state:
        raise ValueError(f"{path} holds no state of AdamW")
    return state


def keep_until(root: Path, step: int):
    """Removes the checkpoints after ``step``, broken ones as it is gone on from there, and
    half-written and half-removed ones.

    Raises FileExistsError where one of them holds what the run did not make: it would be in the way
    when its step comes."""
    for path in saved(root):
        if step_of(path) > step and not discard(path):
            raise FileExistsError(
                f"out: {path} is broken, and holds files that the run did not make; move it"
            )
    for path in root.glob(".step-*.tmp"):
        if TEMPORARY.fullmatch(path.name) and not strangers_in_step(path):
            remove(path)


def saved(root: Path) -> list[Path]:
    """The checkpoints under ``root``, oldest first."""
    found = [
        path
        for path in root.glob("step-*")
        if STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(STEP.fullmatch(path.name)[1])


def discard(path: Path) -> bool:
    """Whether it is gone. Renamed first: a process killed meanwhile leaves nothing that looks like
    a checkpoint.

    One in which something else was put stays: a run removes only what it made.
    """
    foreign = [inner.name for inner in strangers_in_step(path)]
    if foreign:
        logger.warning(
            "checkpoint %s is not removed: it holds %s, which the run did not make",
            path.name,
            shown(foreign),
        )
        return False
    draft = temporary(path)
    os.rename(path, draft)
    remove(draft)
    return True


def optimized_names(model, optimizer) -> list[str]:
    """The parameters' names, in the order in which ``optimizer.state_dict()`` numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]
    ]


def optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    names, state = optimized_names(model, optimizer), optimizer.state_dict()["state"]
    return {
        f"{names[i]}.{kind}": t.detach().cpu().contiguous()
        for i, entry in state.items()
        for kind, t in entry.items()
    }


def rng_tensors(model, generators: dict[str, torch.Generator]) -> dict[str, torch.Tensor]:
    """The uint8 states of ``generators``, by their names, and of torch's own ones, which draw
    dropout.
    """
    states = {name: generator.get_state() for name, generator in generators.items()}
    states["torch.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device)
    return states
