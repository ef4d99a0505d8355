"""Training on product data: one loop, used by ``mmfused train`` and ``mmfused demo``.

A run is a folder: ``metrics.jsonl`` and ``checkpoints/`` grow while training;
``model.safetensors``, ``config.json``, ``tokenizer/``, ``summary.json`` and ``curves.png`` are
there, whole, when it ends. ``load_run`` reads it back. A run that was stopped or killed goes on
from its newest checkpoint, on a CPU bit for bit as if nothing had happened."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch

import mmfused
from mmfused.data._common import torch_generator
from mmfused.extras import from_extra
from mmfused.models import MODELS
from mmfused.models.retrieval import RetrievalModel
from mmfused.training.config import TrainConfig
from mmfused.training.gradients import average_gradients
from mmfused.training.metrics import peak_memory
from mmfused.training.ownership import MARK, Lock, is_mark, same_file
from mmfused.training.ranks import check_agreement, join_ranks, refused_together, stop_together
from mmfused.training.run_folder import (
    SCORE_OF_TASK,
    build_saved,
    check_whole,
    is_finished,
    load_own_tokenizer,
    load_run,
    save_run,
)
from mmfused.training.setup import (
    SPLITS,
    build_model,
    check_backend,
    check_init,
    check_rows,
    image_sizes,
    load_catalogue,
    load_data,
    load_or_train_tokenizer,
    load_pretrained,
    pick_device,
    picture_size,
    use_amp,
)
from mmfused.training.start import (
    FINISHED,
    SCORES,
    as_line,
    begin,
    check_history,
    find_start,
    finished_summary,
    is_due,
    read_history,
)
from mmfused.training.steps import drop_modalities, learning_rate, make_optimizer
from mmfused.training.tasks import TASKS

from . import checkpoint as checkpoints

with from_extra("models"):
    from tqdm import tqdm

__all__ = ["TrainConfig", "load_run", "train"]
logger = logging.getLogger(__name__)
MOST_STEPS = 10**12


def train(config: TrainConfig) -> dict:
    """Trains the model of ``config`` and returns the summary that is also written to
    ``summary.json``.

    With ``config.resume`` it goes on from the newest checkpoint in ``out``; where the run there is
    finished, its summary is returned and nothing touched; where there is nothing yet, it begins.

    Raises ValueError for unusable data, a backend that cannot run, or a checkpoint of other
    settings or data, FileNotFoundError for a missing data folder, and FileExistsError where ``out``
    holds another run and neither ``overwrite`` nor ``resume`` is set, files that no run made, or a
    run that another process writes: all before a file is touched. Raises ``checkpoint.Stopped``
    when SIGTERM or SIGINT asked it to stop (in the main thread), after saving a checkpoint, and
    RuntimeError where the loss is not finite, or where at the end a file is missing that it wrote.

    Over ranks, all raise where one does: that one its own error, the others
    ``ranks.OtherRankError``, which quotes it; and ValueError where their settings, rows or numbers
    of steps differ."""
    out = Path(config.out)
    rank, world = join_ranks(pick_device(config.device))
    shared = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("threads", "device", "progress")
    }
    check_agreement({**shared, "mmfused": mmfused.__version__})
    with ExitStack() as stack:
        with refused_together():
            lock = (
                stack.enter_context(Lock(out))
                if rank == 0 and is_mark(out / MARK) and not is_finished(out)
                else None
            )
            found = find_start(config, out)
        check_agreement({"finished": found is FINISHED})
        if found is FINISHED:
            with refused_together():
                return finished_summary(config, out)
        with refused_together():
            training = prepare(config, found, rank, world)
        check_agreement(training.agreed())
        with refused_together():
            if rank == 0:
                training.lock = lock or stack.enter_context(Lock(out))
                begin(config, out, found, training.step, training.lock.was_there)
        with mmfused.backend(config.backend):
            return training.run()


def prepare(config, found: tuple[Path, dict] | None, rank: int = 0, world: int = 1) -> Training:
    """Everything up to the first step, or up to the step of the checkpoint that was ``found``;
    writes nothing.
    """
    device = pick_device(config.device)
    amp = use_amp(config.amp, device)
    check_backend(config.backend, device, torch.bfloat16 if amp else torch.float32)
    if config.threads:
        torch.set_num_threads(config.threads)
    kind = MODELS[config.model]
    if found:
        model = build_saved(found[1]["settings"], found[0])
        size = model.picture_size
    else:
        check_init(config)
        pretrained, sizes = load_pretrained(config), image_sizes(config)
        size = picture_size(config, pretrained, *sizes)
    train_set, val_set = load_data(config, size)
    products = load_catalogue(config, size)
    data = (train_set, val_set, products)
    torch.manual_seed(config.seed)
    if found:
        check_rows(config, found[1]["settings"]["rows"], *data)
        tokenizer = kind.config.prepare_tokenizer(load_own_tokenizer(found[0]))
    else:
        tokenizer = load_or_train_tokenizer(config, train_set, products)
        model = build_model(config, train_set.num_classes, tokenizer, *sizes, pretrained)
    model = model.to(device)
    task = TASKS[kind.task](config, tokenizer, model.picture_size, model.config, *data, rank, world)
    given = [split for split in data if split is not None]
    about = {
        "settings": {
            "model": model.config.to_dict(),
            "training": config.to_dict(),
            "image_size": model.picture_size,
            "rows": {
                name: split.digest
                for name, split in zip(SPLITS, data, strict=True)
                if split is not None
            },
        },
        "facts": {
            "train_rows": len(train_set),
            "val_rows": len(val_set),
            "skipped": [s for split in given for s in split.skipped],
        },
    }
    training = Training(config, model, tokenizer, task, amp, rank, **about)
    if found:
        training.go_on_from(*found)
    if rank > 0:  # dropout of its own; the first rank's is the one that a checkpoint holds
        torch.manual_seed(torch_generator(config.seed, training.step, rank).initial_seed())
    return training


class Training:
    """The loop, and all that changes while it runs.

    ``settings`` rebuild the model and tell the data apart from others, ``facts`` belong to the
    summary."""

    def __init__(
        self,
        config,
        model,
        tokenizer,
        task,
        amp: bool,
        rank: int,
        settings: dict,
        facts: dict,
    ):
        self.config, self.model, self.tokenizer, self.amp = config, model, tokenizer, amp
        self.task, self.batches, self.main = task, task.batches, rank == 0
        self.task_name = MODELS[config.model].task
        self.score = SCORE_OF_TASK[self.task_name]
        self.settings = {"mmfused": mmfused.__version__, **settings}
        self.facts = facts
        self.out = Path(config.out)
        self.device = next(model.parameters()).device
        self.steps = config.steps or max(
            1, round(config.epochs * len(self.batches) / config.accumulate)
        )
        if self.steps > MOST_STEPS:
            raise ValueError(
                f"epochs: got {config.epochs}, which are {self.steps} steps, expected at most {MOST_STEPS} of them"
            )
        self.val_every = config.val_every or max(1, math.ceil(self.steps / 10))
        self.save_every = config.save_every or self.val_every
        self.optimizer = make_optimizer(model, config)
        self.generators = {"drop": torch.Generator().manual_seed(config.seed)}
        self.step = 0
        self.saved: tuple[int, Path] | None = None  # step and folder of the newest checkpoint
        self.lock: Lock | None = None  # on the folder, of the first rank
        self.log: BinaryIO | None = None
        self.history = {"train": [], "val": []}
        self.metrics_bytes = 0
        self.seconds_before = 0.0  # of the processes that this one goes on from
        self.window = 0  # steps since the last record

    def go_on_from(self, path: Path, state: dict):
        """Raises ValueError where the checkpoint does not fit the model, or ``metrics.jsonl`` lacks
        records it had.
        """
        if state["step"] > self.steps:
            raise ValueError(
                f"resume: {path} is of step {state['step']}, expected at most {self.steps}, the last one"
            )
        self.history = read_history(
            self.out / "metrics.jsonl", state["metrics_bytes"], SCORES[self.task_name]
        )
        check_history(
            self.history,
            state["step"],
            self.steps,
            self.config.log_every,
            self.val_every,
            self.out / "metrics.jsonl",
        )
        checkpoints.restore(path, self.model, self.optimizer, self.generators)
        self.step, self.saved = state["step"], (state["step"], path)
        self.metrics_bytes, self.seconds_before = state["metrics_bytes"], state["seconds"]

    def run(self) -> dict:
        """Up to the last step, and the summary; or to a signal: then it saves a checkpoint and
        raises ``Stopped``.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.begun = self.since = time.perf_counter()
        title = f"{self.config.model} {self.config.backend}"
        shown = {
            "disable": not (self.config.progress and self.main),
            "unit": "step",
            "initial": self.step,
        }
        try:
            with refused_together():
                self.log = open(self.out / "metrics.jsonl" if self.main else os.devnull, "ab")
                if self.main:
                    self.log.truncate(
                        self.metrics_bytes
                    )  # steps after the checkpoint are made again
            with (
                tqdm(total=self.steps, desc=title, **shown) as self.bar,
                checkpoints.stop_on_signals() as stop,
            ):
                self.loop(stop)
            with refused_together():
                return self.finish()
        finally:
            if self.log is not None:
                self.log.close()

    def loop(self, stop: checkpoints.StopRequest):
        self.model.train()
        stream = self.batches.stream(self.step * self.config.accumulate)
        while True:
            signum = stop_together(stop)
            # A signal does not wait for a validation; the run that goes on makes up for it here.
            if self.is_due(self.val_every) and self.validated_step() < self.step:
                with refused_together():
                    self.validate(stop)
                signum = stop_together(stop)
            with refused_together():
                if (self.is_due(self.save_every) or signum) and not self.is_saved():
                    self.save()
            if signum:
                raise checkpoints.Stopped(signum, self.step, str(self.saved[1]))
            if self.step == self.steps:
                return
            loss, terms, rate = self.advance(stream)
            with refused_together():
                self.report(loss, terms, rate)

    def is_due(self, every: int) -> bool:
        return is_due(self.step, every, self.steps)

    def validated_step(self) -> int:
        return self.history["val"][-1]["step"] if self.history["val"] else 0

    def finish(self) -> dict:
        summary = self.summary()
        if self.main:
            self.keep_folder()
            save_run(self.out, self.settings, self.model, self.tokenizer, summary, self.history)
            check_whole(self.out, self.metrics_bytes)
        return summary

    def is_saved(self) -> bool:
        return (
            self.saved is not None
            and self.saved[0] == self.step
            and (self.saved[1].is_dir() or not self.main)
        )

    def advance(self, stream) -> tuple:
        """One step from the next batches of ``stream``: its loss, the loss's terms, its learning
        rate.
        """
        c = self.config
        rate = learning_rate(self.step, self.steps, c.lr, c.warmup)
        if isinstance(self.model, RetrievalModel):
            self.model.set_progress(self.step / self.steps)
        batches = map(self.hide, islice(stream, c.accumulate))
        loss, terms = update(
            self.model, self.optimizer, self.task, batches, c.accumulate, rate, c.clip, self.amp
        )
        self.step += 1
        self.window += 1
        return loss, terms, rate

    def report(self, loss, terms: dict, rate: float):
        """Where that is due, a line of ``metrics.jsonl``. Raises RuntimeError where the loss is not
        finite.
        """
        c = self.config
        if self.is_due(c.log_every):
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss is {float(loss)} at step {self.step}: lower lr ({c.lr}) or clip ({c.clip})"
                )
            seconds = (time.perf_counter() - self.since) / self.window
            terms = {name: float(value) for name, value in terms.items()}
            self.record(
                "train",
                {"step": self.step, "loss": float(loss), **terms, "lr": rate, "seconds": seconds},
            )
            score = (
                f", {self.score} {self.history['val'][-1][self.score]:.1%}"
                if self.history["val"]
                else ""
            )
            self.bar.set_postfix_str(f"loss {loss:.3f}{score}, {seconds:.3f} s/step", refresh=False)
            self.restart_clock()
        self.bar.update()

    def hide(self, batch: dict) -> dict:
        c = self.config
        if c.modalities != "both" or c.drop_image + c.drop_text == 0:
            return batch
        hidden = partial(
            drop_modalities, generator=self.generators["drop"], tokenizer=self.tokenizer
        )
        return self.task.hide(batch, partial(hidden, image=c.drop_image, text=c.drop_text))

    def validate(self, stop):
        result = self.task.evaluate(self.model, self.amp, stop)
        if result is not None:
            self.record("val", {"step": self.step, **result})
        self.restart_clock()

    def save(self):
        """The records first: a checkpoint says how many bytes of them are its own, so they must be
        on the disk.
        """
        if not self.main:
            self.saved = self.step, self.out / "checkpoints"
            return
        self.keep_folder()
        os.fsync(self.log.fileno())
        epoch, batch = divmod(self.step * self.config.accumulate, len(self.batches))
        state = {
            "step": self.step,
            "next_batch": {"epoch": epoch, "batch": batch},
            "metrics_bytes": self.metrics_bytes,
            "seconds": self.seconds(),
            "settings": self.settings,
        }
        parts = (self.model, self.optimizer, self.generators, self.tokenizer)
        self.saved = (
            self.step,
            checkpoints.write(self.out / "checkpoints", state, *parts, self.config.keep),
        )
        self.restart_clock()

    def keep_folder(self):
        """Makes the folder, its mark and the records again where they were removed while the
        training ran.

        Raises FileExistsError where another process has taken the folder since, or wrote records of
        its own."""
        if not self.lock.is_in_place():
            self.lock.take()
        path = self.out / "metrics.jsonl"
        if same_file(path, self.log):
            return
        records = sorted(
            [*self.history["train"], *self.history["val"]], key=lambda record: record["step"]
        )
        if path.exists():
            raise FileExistsError(
                f"out: {path} was replaced while the run wrote it; it is left as it is"
            )
        logger.warning(
            "out: %s was removed while the run wrote it; it is made again with all its records",
            path,
        )
        self.log.close()
        self.log = open(path, "xb")
        self.log.write(b"".join(map(as_line, records)))
        self.log.flush()

    def agreed(self) -> dict:
        """What must be the same on all ranks, so that all make the same steps."""
        rows = {f"{name}'s rows": digest for name, digest in self.settings["rows"].items()}
        return {**rows, "steps": self.steps, "step": self.step, "batches": len(self.batches)}

    def record(self, kind: str, entry: dict):
        self.history[kind].append(entry)
        line = as_line(entry)
        self.log.write(line)
        self.log.flush()
        self.metrics_bytes += len(line)

    def restart_clock(self):
        self.since, self.window = time.perf_counter(), 0

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.begun

    def summary(self) -> dict:
        config, training, last = self.config, self.history["train"], self.history["val"][-1]
        return {
            "model": config.model,
            "backend": config.backend,
            "device": str(self.device),
            "amp": "bf16" if self.amp else "off",
            "modalities": config.modalities,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **self.facts,
            "steps": self.steps,
            "train_loss": training[-1]["loss"],
            **{name: value for name, value in last.items() if name != "step"},
            "step_seconds": statistics.median(
                record["seconds"] for record in training[1:] or training
            ),
            "seconds": self.seconds(),
            "peak_memory": peak_memory(self.device),
        }


def update(
    model,
    optimizer,
    task,
    batches: Iterable[dict],
    count: int,
    rate: float,
    clip: float,
    amp: bool = False,
):
    """One optimiser step at learning rate ``rate`` from ``count`` batches, gradients averaged over
    ranks, then clipped to ``clip``.

    Returns what :func:`mmfused.training.gradients.add_gradients` does.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    result = task.gradients(model, batches, count, amp)
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return result
