"""The function behind ``mmfused train``.

A run is a folder. ``metrics.jsonl`` and ``checkpoints/`` are written during training;
``model.safetensors``, ``config.json``, ``tokenizer/``, ``summary.json`` and ``curves.png`` are
written at the end. ``load_run`` loads the result. A run that was stopped or killed can be resumed
from its newest checkpoint. In one process on a CPU, the weights are then bitwise those of an
uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import mmfused
from mmfused.data._common import torch_generator
from mmfused.models import MODELS, ModelConfig
from mmfused.models.checkpointing import checkpoint_layers
from mmfused.models.lora import lora_of
from mmfused.training.config import TrainConfig
from mmfused.training.datasets import (
    SPLITS,
    UNUSED_SIDE,
    check_rows,
    load_data,
    resuming,
    rows_digest,
)
from mmfused.training.folder_lock import MARKER, Lock, is_regular_file
from mmfused.training.initial import (
    build_model,
    check_start,
    fixed_classes,
    load_start,
    load_tokenizer,
    train_tokenizer,
    warn_of_random,
)
from mmfused.training.loop import Training
from mmfused.training.ranks import check_agreement, fail_together, join_ranks
from mmfused.training.resume import (
    FINISHED,
    Checkpoint,
    find_start,
    finished_summary,
    prepare_folder,
)
from mmfused.training.run_folder import (
    build_saved,
    is_finished,
    load_own_tokenizer,
    load_run,
    read_settings,
)
from mmfused.training.setup import check_backend, pick_device, use_amp
from mmfused.training.tasks import task_of

__all__ = ["TrainConfig", "load_run", "train"]


def train(config: TrainConfig) -> dict[str, Any]:
    r"""Train a model and return the summary, which is also written to ``summary.json``.

    With ``config.resume``, training resumes from the newest checkpoint in ``config.out``. If the
    run in ``config.out`` is finished, its summary is returned and nothing is written. If there is
    no run, a new run starts.

    With several ranks, an error on one rank is raised on the other ranks too, as a RuntimeError
    that quotes the error. In a step of a retrieval model, this holds only for errors in the
    encoders and the loss.

    The settings, the data and the folder are checked before any file is changed.

    Args:
        config: the settings.

    Returns:
        A dict that JSON can represent: the model, backend and device; the numbers of parameters,
        rows and steps; skipped rows; the last losses and scores; seconds, and the peak memory in
        bytes.

    Raises:
        ValueError: the data cannot be used, the backend is not available, a checkpoint was written
            with other settings or data, or ranks differ in settings, data or numbers of steps.
        FileNotFoundError: a data folder is missing.
        FileExistsError: ``config.out`` holds files that no run made; another process writes to it;
            or it holds a run, and neither ``overwrite`` nor ``resume`` is set.
        RuntimeError: a loss, weight or embedding is not finite, or files that the run wrote are
            missing at the end.
        Stopped: SIGTERM or SIGINT stopped training, and a checkpoint was saved. Signals are
            handled only if `train` is called in the main thread.

    Examples:
        >>> import pathlib, tempfile
        >>> from mmfused.training.run import TrainConfig, train
        >>> rows = "file_name,text,label\n,red mug,0\n,blue plate,1\n"  # texts without pictures
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = pathlib.Path(folder, "metadata.csv").write_text(rows)
        ...     config = TrainConfig(
        ...         out=f"{folder}/run", data=folder, val=folder, modalities="text", batch_size=2,
        ...         steps=2, progress=False,
        ...     )
        ...     summary = train(config)
        >>> summary["model"], summary["train_rows"], summary["steps"]
        ('fluid', 2, 2)
    """
    out = Path(config.out)
    rank, world = join_ranks(pick_device(config.device))
    check_agreement(_shared_settings(config))
    with ExitStack() as stack:
        with fail_together():
            lock = None
            if rank == 0 and is_regular_file(out / MARKER) and not is_finished(out):
                lock = stack.enter_context(Lock(out))
            found = find_start(config, out)
        check_agreement({"finished": found == FINISHED})
        if found == FINISHED:
            with fail_together():
                return finished_summary(config, out)
        assert not isinstance(found, str)
        with fail_together():
            training = prepare(config, found, rank, world)
        check_agreement(training.shared())
        with fail_together():
            if rank == 0:
                training.lock = lock or stack.enter_context(Lock(out))
                prepare_folder(config, out, found, training.step, training.lock.had_marker)
        with mmfused.backend(config.backend):
            return training.run()


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that must be equal on all ranks."""
    may_differ = ("threads", "device", "progress")
    settings = {name: value for name, value in config.to_dict().items() if name not in may_differ}
    return {**settings, "mmfused": mmfused.__version__}


def prepare(
    config: TrainConfig,
    found: Checkpoint | None,
    rank: int = 0,
    world: int = 1,
) -> Training:
    """Return a `Training` that is ready for its next step, without writing files.

    Args:
        config: the settings.
        found: the checkpoint to resume from; None to start at step 0.
        rank: rank of this process.
        world: number of ranks.
    """
    device = pick_device(config.device)
    amp = use_amp(config.amp, device)
    check_backend(config.backend, device, torch.bfloat16 if amp else torch.float32)
    if config.threads:
        torch.set_num_threads(config.threads)
    model, tokenizer, data = _load_parts(config, found)
    model = model.to(device)
    if config.grad_checkpointing:
        checkpoint_layers(model)
    make_task = task_of(config, data[0])
    size = model.picture_size
    task = make_task(config, tokenizer, size, model.config, *data, rank=rank, world=world)
    training = Training(
        config=config,
        model=model,
        tokenizer=tokenizer,
        task=task,
        amp=amp,
        rank=rank,
        settings=_saved_settings(config, model, data),
        data=data,
    )
    if found:
        training.restore(found)
    if rank > 0:
        # Ranks draw different dropout. Rank 0 keeps its generator, whose state is in checkpoints.
        torch.manual_seed(torch_generator(config.seed, training.step, rank).initial_seed())
    return training


def _load_parts(config: TrainConfig, found: Checkpoint | None) -> tuple[Any, Any, tuple]:
    """Return the model, the tokenizer, and the training, validation and product sets."""
    if found:
        model = build_saved(found.state["settings"], found.path)
        settings = found.state["settings"]
        names = settings.get("class_names")
        data = _load_sets(resuming(config, settings), model.picture_size, model.config, names)
        torch.manual_seed(config.seed)
        check_rows(config, settings, *data)
        prepare_tokenizer = MODELS[config.model].config.prepare_tokenizer
        return model, prepare_tokenizer(load_own_tokenizer(found.path)), data
    start = load_start(config)
    tokenizer = load_tokenizer(config)
    described = check_start(config, start, tokenizer)
    names = None if start.run is None else read_settings(start.run).get("class_names")
    data = _load_sets(config, described.picture_size or UNUSED_SIDE, described, names)
    torch.manual_seed(config.seed)
    train_set, _, products = data
    if tokenizer is None:
        tokenizer = train_tokenizer(config, train_set, products)
    model = build_model(config, getattr(train_set, "num_classes", 1), tokenizer, start)
    if config.init and start.run is None:
        warn_of_random(model, start, config.init, ("image_encoder", "text_encoder"))
    return model, tokenizer, data


def _load_sets(
    config: TrainConfig,
    image_size: int,
    model_config: ModelConfig,
    class_names: Sequence[str] | None,
) -> tuple:
    num_classes = fixed_classes(config, model_config.to_dict())
    return load_data(config, image_size, num_classes, model_config, class_names)


def _saved_settings(config: TrainConfig, model: Any, data: tuple) -> dict[str, Any]:
    """Return the settings of the model and of training, and the digests of the data sets."""
    splits = zip(SPLITS, data, strict=True)
    names = None
    if MODELS[config.model].task == "classification" and config.data != "generated":
        names = data[0].class_names
    return {
        "mmfused": mmfused.__version__,
        "model": model.config.to_dict(),
        "training": config.to_dict(),
        "lora": lora_of(model),
        "image_size": model.picture_size,
        "class_names": names,
        "rows": {name: rows_digest(split) for name, split in splits if split is not None},
    }
