"""The folder of a training run: whose it is, how its files come to be there whole, and how it is
read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from mmfused import data as product_data
from mmfused.extras import from_extra
from mmfused.json_files import read_object
from mmfused.models import MODELS
from mmfused.models.config import shapes_of
from mmfused.training.config import TrainConfig
from mmfused.training.ownership import half_written, strangers, strangers_at, temporary

with from_extra("models"):
    import safetensors.torch
    from matplotlib.figure import Figure

# config.json is written last and removed first: where it is, the run is finished and whole.
RUN_FILES = (
    "config.json",
    "checkpoints",
    "metrics.jsonl",
    "model.safetensors",
    "summary.json",
    "curves.png",
    "tokenizer",
)
SCORE_OF_TASK = {
    "classification": "accuracy",
    "retrieval": "recall_at_1",
}  # the one that is drawn and shown
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")  # of a checkpoint
MOST_JSON = 2**26  # bytes


def check_out(out: Path, overwrite: bool, resume: bool = False):
    """Raises FileExistsError where ``out`` holds a run, or files under a run's names that no run
    made.

    With ``resume``, a run that died before its first checkpoint is none.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file, expected a folder")
    foreign = strangers(out, RUN_FILES)
    if foreign:
        raise FileExistsError(
            f"out: {out} holds files that no run made ({shown(foreign)}); choose another folder, or move them"
        )
    empty = ("checkpoints", "metrics.jsonl") if resume else ()
    held = [name for name in RUN_FILES if (out / name).exists() and name not in empty]
    if held and not overwrite:
        raise FileExistsError(
            f"out: {out} already holds a run ({', '.join(held)}); choose another folder or overwrite it"
        )


def check_replaceable(path: Path, key: str, replace: bool):
    """Raises FileExistsError where the JSON file at ``path`` is another program's, without the
    ``key``, or is to stay.
    """
    if not os.path.lexists(path):
        return
    try:
        ours = not path.is_symlink() and path.is_file() and key in read_json(path)
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"out: {path} is another program's; choose another folder, or move it"
        )
    if not replace:
        raise FileExistsError(
            f"out: {path} is there already; choose another folder, resume or overwrite it"
        )


def shown(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def clear_out(out: Path):
    """Removes the run that :func:`check_out` found, or found none."""
    for name in RUN_FILES:
        remove(out / name)


def clean_out(out: Path):
    """Removes what a process that was killed had half written."""
    for path in half_written(out, RUN_FILES):
        remove(path)


def check_whole(out: Path, metrics_bytes: int):
    """Raises RuntimeError naming what a finished run should hold and does not."""
    missing = [name for name in RUN_FILES if not (out / name).exists()]
    if missing:
        raise RuntimeError(
            f"out: {out} lacks {', '.join(missing)}, which the run wrote: removed meanwhile?"
        )
    found = (out / "metrics.jsonl").stat().st_size
    if found != metrics_bytes:
        raise RuntimeError(
            f"out: {out / 'metrics.jsonl'} holds {found} bytes, but the run wrote {metrics_bytes}"
        )


def is_finished(out: Path) -> bool:
    return all(
        (out / name).exists() for name in ("config.json", "summary.json", "model.safetensors")
    )


def remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_run(out: Path, settings: dict, model, tokenizer, summary: dict, history: dict):
    """Every file under a temporary name first, then moved: a file with its own name is a whole
    file.
    """
    whole(out / "tokenizer", lambda path: tokenizer.save_pretrained(path))
    whole(
        out / "model.safetensors",
        lambda path: path.write_bytes(safetensors.torch.save(model_tensors(model))),
    )
    headline = SCORE_OF_TASK[MODELS[settings["training"]["model"]].task]
    whole(
        out / "curves.png",
        lambda path: draw_curves({settings["training"]["backend"]: history}, path, headline),
    )
    whole(out / "summary.json", lambda path: write_json(path, summary))
    whole(out / "config.json", lambda path: write_json(path, settings))


def model_tensors(model) -> dict:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def whole(path: Path, write):
    """Calls ``write(temporary path)``, then gives the result its name in one move.

    Where ``path`` is a folder, it is not there for a moment: no move takes the place of a folder
    that holds files."""
    draft = temporary(path)
    try:
        write(draft)
        sync(draft)
        if path.is_dir():
            foreign = [inner.name for inner in strangers_at(path)]
            if foreign:
                raise FileExistsError(
                    f"out: {path} holds files that no run made ({shown(foreign)}); move them"
                )
            remove(path)
        os.replace(draft, path)
        sync_entry(path.parent)
    finally:
        remove(draft)


def sync(path: Path):
    """Waits until the file, or the folder with all that it holds, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
    sync_entry(path)


def sync_entry(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draw_curves(runs: dict[str, dict], path: Path, score: str = "accuracy"):
    """Training loss and a validation score of each named history, side by side, as PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, history in runs.items():
        left.plot(
            [r["step"] for r in history["train"]],
            [r["loss"] for r in history["train"]],
            label=name,
            linewidth=1,
        )
        right.plot(
            [r["step"] for r in history["val"]],
            [r[score] for r in history["val"]],
            label=name,
            marker="o",
        )
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel=f"validation {score.replace('_', ' ')}", ylim=(0, 1))
    left.legend()
    figure.savefig(path, format="png", dpi=120)


def load_run(folder: str | os.PathLike):
    """``(model, tokenizer)`` of the run in ``folder``, or of one of its checkpoints; the model on
    the CPU in evaluation mode.

    Raises FileNotFoundError where ``folder`` holds neither, and ValueError with one sentence where
    a file of it is truncated, corrupt, a pickle, or holds the weights of another model."""
    return load_saved(Path(folder), read_settings(Path(folder)))


def load_saved(folder: Path, settings: dict):
    """As :func:`load_run`, with the settings that were read from the folder, and its files looked
    through, before.
    """
    model = build_saved(settings, folder)
    load_weights(model, folder / "model.safetensors")
    # Again: a saved tokenizer of some classes comes back without what was put around its texts.
    return model.eval(), model.config.prepare_tokenizer(load_own_tokenizer(folder))


def build_saved(settings: dict, folder: Path):
    """The model of the ``settings``, with any weights; first it is seen that the ``folder``'s are
    its, and how large they are.
    """
    kind = MODELS[settings["training"]["model"]]
    try:
        config = kind.config.from_dict(settings["model"])
        shapes = shapes_of(kind, config)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds the settings of no model that this mmfused has: {error}"
        ) from error
    path = inside(folder, "model.safetensors")
    check_shapes(path, read_shapes(path), shapes)
    return kind.model(config)


def load_own_tokenizer(folder: Path):
    """The tokenizer of the run or checkpoint in ``folder``. Raises ValueError where a file of it is
    a link that leads outside.
    """
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder / 'tokenizer'} is missing")
    for path in (folder / "tokenizer").glob("*"):
        inside(folder, f"tokenizer/{path.name}")
    return product_data.load_tokenizer(inside(folder, "tokenizer"))


def read_settings(folder: Path) -> dict:
    """The settings of the run or checkpoint in ``folder``: "mmfused", "model", "training" and
    "image_size".

    Raises as :func:`load_run`.
    """
    if (folder / "state.json").is_file():
        return read_checkpoint(folder)["settings"]
    refuse_pickles(folder)
    if not (folder / "config.json").is_file():
        hint = (
            " (it is not finished; take one of its checkpoints)"
            if any(folder.glob("checkpoints/step-*"))
            else ""
        )
        raise FileNotFoundError(f"{folder} holds no finished run: config.json is missing{hint}")
    settings = read_json(inside(folder, "config.json"))
    check_settings(settings, folder / "config.json")
    return settings


def check_settings(settings: dict, path: Path) -> None:
    """Raises ValueError unless they are what a training writes; the model's config checks "model"
    itself.
    """
    check_fields(
        settings, {"mmfused": str, "training": dict, "model": dict, "image_size": int}, path
    )
    try:
        TrainConfig.from_dict(settings["training"])
    except ValueError as error:
        raise ValueError(f"{path} holds settings of no training: {error}") from error


def read_checkpoint(path: Path) -> dict:
    """``state.json`` of the checkpoint in ``path``. Raises ValueError naming a file that is not as
    it was written.
    """
    if not (path / "state.json").is_file():
        raise ValueError(f"{path / 'state.json'} is missing")
    state, source = read_json(inside(path, "state.json")), path / "state.json"
    check_fields(
        state,
        {"step": int, "metrics_bytes": int, "seconds": float, "settings": dict, "sha256": dict},
        source,
    )
    check_settings(state["settings"], source)
    if (
        not 1 <= state["step"] < 2**53
        or not 0 <= state["metrics_bytes"] < 2**53
        or not 0 <= state["seconds"] < 1e12
    ):
        raise ValueError(f"{source} is corrupt: step, metrics_bytes or seconds is out of range")
    for name in (*TENSOR_FILES, *state["sha256"]):
        if not inside(path, name).is_file():
            raise ValueError(f"{path / name} is missing")
        if sha256(path / name) != state["sha256"].get(name):
            raise ValueError(
                f"{path / name} is truncated or corrupt: its SHA-256 is not the one in state.json"
            )
    return state


def check_fields(value: dict, kinds: dict[str, type], path: Path) -> None:
    for name, kind in kinds.items():
        if name not in value:
            raise ValueError(f"{path} lacks {name}")
        found = type(value[name])
        if found is not kind and not (kind is float and found is int):
            raise ValueError(
                f"{path} is corrupt: {name} is of type {found.__name__}, expected {kind.__name__}"
            )


def inside(folder: Path, name: str) -> Path:
    """``folder / name``. Raises ValueError where that lies outside of the folder, be it by a link."""
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder} names {name!r}, which leads outside of it; only what is in the folder is read"
        )
    return path


def refuse_pickles(path: Path):
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run any code when opened; only safetensors are read"
            )
        raise ValueError(
            f"{path} is a file; what is read is the folder of a run or of one of its checkpoints"
        )
    pickles = sorted(inner.name for inner in path.glob("*") if inner.suffix in PICKLES)
    if pickles and not (path / "model.safetensors").is_file():
        raise ValueError(
            f"{path / pickles[0]} is a pickle, which can run any code when opened; only safetensors are read"
        )


def read_json(path: Path) -> dict:
    return read_object(path, MOST_JSON)


def read_tensors(path: Path) -> dict:
    """Raises FileNotFoundError, or ValueError where ``path`` is no whole safetensors file."""
    with opened_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the file's tensors, by its header alone. Raises as :func:`read_tensors`."""
    with opened_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@contextmanager
def opened_tensors(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error


def load_weights(model, path: Path):
    """Raises ValueError naming the first tensor in which the file and ``model`` differ, and as
    :func:`read_tensors`.
    """
    got = read_tensors(path)
    check_shapes(
        path,
        *(
            {name: tuple(t.shape) for name, t in tensors.items()}
            for tensors in (got, model.state_dict())
        ),
    )
    model.load_state_dict(got)


def check_shapes(path: Path, got: dict, expected: dict):
    for name in [*expected, *got]:
        theirs, ours = (shapes.get(name, "no such tensor") for shapes in (got, expected))
        if theirs != ours:
            raise ValueError(
                f"{path} holds the weights of another model: {name}: got {theirs}, expected {ours}"
            )


def sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
