"""Write and read checkpoints, from which training resumes with the same results.

``OUT/checkpoints/step-00000123/`` holds ``model.safetensors``, ``optimizer.safetensors`` (AdamW's
state by parameter name), ``rng.safetensors`` (states of the random generators), ``tokenizer/`` and
``state.json`` (step, position in the data, size of ``metrics.jsonl``, training time, settings, and
the SHA-256 of every other file).

A checkpoint is written to a temporary folder, which is flushed to disk and then renamed, so a
killed process never leaves an incomplete ``step-*`` folder. The SHA-256 sums reveal later damage.
Nothing is pickled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfused.training.files import (
    join_names,
    load_weights,
    model_tensors,
    read_tensors,
    remove,
    save_tensors,
    sha256,
    sync,
    sync_entry,
    write_json,
)
from mmfused.training.folder_lock import (
    STEP_NAME,
    TEMPORARY_NAME,
    foreign_in_checkpoint,
    temporary_path,
)
from mmfused.training.run_folder import read_checkpoint

logger: logging.Logger = logging.getLogger(__name__)


# ---- writing -------------------------------------------------------------------------------------


def write(
    root: Path,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    tokenizer: Any,
    keep: int,
) -> Path:
    """Write a checkpoint and return its path; keep only the ``keep`` newest checkpoints.

    Args:
        root: the folder ``checkpoints`` of a run.
        state: contents of ``state.json``, without the SHA-256 sums.
        model: the model whose weights are saved.
        optimizer: the optimizer whose state is saved.
        generators: random generators by name; torch's default generators are saved too.
        tokenizer: saved with ``save_pretrained``.
        keep: number of checkpoints to keep, at least 1.

    Raises:
        RuntimeError: a weight is not finite; no checkpoint is written.
    """
    groups = {
        "model": model_tensors(model),
        "optimizer": _optimizer_tensors(model, optimizer),
        "rng": _rng_tensors(model, generators),
    }
    _check_finite(groups["model"], state["step"])
    path = root / f"step-{state['step']:08d}"
    temporary = temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in groups.items():
            save_tensors(temporary / f"{name}.safetensors", tensors)
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
        _discard(old)
    return path


def _check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(
                f"{name} is not finite after step {step}, so no checkpoint was written: "
                "lower lr or clip"
            )


def _optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    names = _optimized_names(model, optimizer)
    return {
        f"{names[index]}.{kind}": tensor.detach().cpu().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for kind, tensor in entry.items()
    }


def _rng_tensors(
    model: nn.Module,
    generators: Mapping[str, torch.Generator],
) -> dict[str, Tensor]:
    """Return the uint8 states of ``generators`` and of torch's default generators, by name."""
    states = {name: generator.get_state() for name, generator in generators.items()}
    states["torch.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _optimized_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the parameters, in the order of the indices in the optimizer's state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]
    ]


# ---- reading -------------------------------------------------------------------------------------


def newest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest intact checkpoint under ``root`` and the contents of its ``state.json``.

    Damaged checkpoints are skipped with a warning. If there are no checkpoints, return None.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged: list[ValueError] = []
    for path in reversed(saved(root)):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            damaged.append(error)
            logger.warning("checkpoint %s is ignored: %s", path.name, error)
    if damaged:
        raise ValueError(
            f"resume: {root} holds only damaged checkpoints: {damaged[0]}; "
            "overwrite the run to start again"
        )
    return None


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
) -> None:
    """Load a checkpoint into the model, the optimizer, ``generators`` and torch's generators.

    Raises:
        ValueError: a tensor is missing, or does not fit the model, the optimizer or a generator.
    """
    load_weights(model, path / "model.safetensors")
    state = _read_optimizer_state(path / "optimizer.safetensors", model, optimizer)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    source = path / "rng.safetensors"
    states = read_tensors(source)
    setters: dict[str, Callable[[Tensor], object]] = {}
    for name, generator in generators.items():
        setters[name] = generator.set_state
    setters["torch.cpu"] = torch.set_rng_state
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
                f"{source} holds an invalid state of the random generator {name}: {error}"
            ) from error


def _read_optimizer_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[int, dict[str, Tensor]]:
    """Return AdamW's state by parameter index; raise ValueError unless it fits the model."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = _optimized_names(model, optimizer)
    indices = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        name, _, kind = key.rpartition(".")
        if name not in indices:
            raise ValueError(f"{path} holds {key}, but the model has no parameter {name}")
        expected = () if kind == "step" else shapes[name]
        if kind not in ("step", "exp_avg", "exp_avg_sq") or tuple(tensor.shape) != expected:
            raise ValueError(
                f"{path} holds {key} of shape {tuple(tensor.shape)}, "
                "which is not a state that AdamW has for this model"
            )
        state.setdefault(indices[name], {})[kind] = tensor
    for index, entry in state.items():
        finite = all(t.is_floating_point() and t.isfinite().all() for t in entry.values())
        if not (len(entry) == 3 and finite and entry["step"] >= 1):
            raise ValueError(f"{path} holds no complete state of AdamW for {names[index]}")
    if not state:
        raise ValueError(f"{path} holds no state of AdamW")
    return state


# ---- the folder ``checkpoints`` ------------------------------------------------------------------


def saved(root: Path) -> list[Path]:
    """Return the checkpoints under ``root``, oldest first."""
    found = [
        path
        for path in root.glob("step-*")
        if STEP_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=_step_of)


def remove_after(root: Path, step: int) -> None:
    """Remove the checkpoints after ``step``, and temporary folders of killed processes.

    Training resumes from the newest intact checkpoint, at ``step``; later checkpoints are damaged.

    Raises:
        FileExistsError: a later checkpoint contains foreign files, and is therefore not removed.
    """
    for path in saved(root):
        if _step_of(path) > step and not _discard(path):
            raise FileExistsError(
                f"out: {path} is damaged, and holds files that the run did not make; move it"
            )
    for path in root.glob(".step-*.tmp"):
        if TEMPORARY_NAME.fullmatch(path.name) and not foreign_in_checkpoint(path):
            remove(path)


def _step_of(path: Path) -> int:
    """Return the step of a checkpoint from its name, which matches ``STEP_NAME``."""
    return int(path.name.removeprefix("step-"))


def _discard(path: Path) -> bool:
    """Remove a checkpoint and return True; return False if it contains foreign files.

    The folder is renamed first, so that a process killed during the removal leaves no incomplete
    checkpoint.
    """
    foreign = [inner.name for inner in foreign_in_checkpoint(path)]
    if foreign:
        logger.warning(
            "checkpoint %s is not removed: it holds %s, which the run did not make",
            path.name,
            join_names(foreign),
        )
        return False
    temporary = temporary_path(path)
    os.rename(path, temporary)
    remove(temporary)
    return True
