"""Training on product data: one loop, used by ``mmfused train`` and ``mmfused demo``.

A run is a folder: ``metrics.jsonl`` and ``checkpoints/`` grow while training; ``model.safetensors``, ``config.json``,
``tokenizer/``, ``summary.json`` and ``curves.png`` are there, whole, when it ends. ``load_run`` reads it back. A run that
was stopped or killed goes on from its newest checkpoint, on a CPU bit for bit as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import mmfused
from mmfused import checkpoint as checkpoints
from mmfused.data import load_tokenizer
from mmfused.data._common import torch_generator
from mmfused.gradients import average_gradients, join_ranks, stop_together, wait_for_ranks
from mmfused.metrics import peak_memory
from mmfused.models import MODELS
from mmfused.models.retrieval import RetrievalModel
from mmfused.run_folder import (
    SCORE_OF_TASK,
    check_out,
    clean_out,
    clear_out,
    is_finished,
    load_run,
    read_json,
    read_settings,
    save_run,
)
from mmfused.tasks import TASKS
from mmfused.train_config import TrainConfig
from mmfused.train_setup import (
    build_model,
    check_backend,
    check_rows,
    digest,
    image_sizes,
    load_catalogue,
    load_data,
    load_or_train_tokenizer,
    pick_device,
    use_amp,
)

__all__ = ["TrainConfig", "load_run", "train"]


def train(config: TrainConfig) -> dict:
    """Trains the model of ``config`` and returns the summary that is also written to ``summary.json``.

    With ``config.resume`` it goes on from the newest checkpoint in ``out``; where the run there is finished, its summary
    is returned and nothing touched; where there is nothing yet, it begins.

    Raises ValueError for unusable data, a backend that cannot run, or a checkpoint of other settings or data,
    FileNotFoundError for a missing data folder, and FileExistsError where ``out`` holds another run and neither
    ``overwrite`` nor ``resume`` is set: all before a file is touched. Raises ``checkpoint.Stopped`` when SIGTERM or SIGINT
    asked it to stop (in the main thread), after saving a checkpoint, and RuntimeError where the loss is not finite.
    """
    out = Path(config.out)
    rank, world = join_ranks(pick_device(config.device))
    if config.resume and is_finished(out):
        config.check_same(read_settings(out)["training"], out)
        return read_json(out / "summary.json")
    found = checkpoints.newest(out / "checkpoints") if config.resume else None
    if found:
        config.check_same(found[1]["settings"]["training"], found[0])
    else:
        check_out(out, config.overwrite, config.resume)
    training = prepare(config, found, rank, world)
    wait_for_ranks()  # all have read what is there, and agree that it can be used
    if rank == 0:
        if found is None:
            clear_out(out)
        clean_out(out)
        checkpoints.keep_until(out / "checkpoints", training.step)
    with mmfused.backend(config.backend):
        training.run()
    summary = training.summary()
    if rank == 0:
        save_run(out, training.settings, training.model, training.tokenizer, summary, training.history)
    wait_for_ranks()
    return summary


def prepare(config, found: tuple[Path, dict] | None, rank: int = 0, world: int = 1) -> Training:
    """Everything up to the first step, or up to the step of the checkpoint that was ``found``; writes nothing."""
    device = pick_device(config.device)
    amp = use_amp(config.amp, device)
    check_backend(config.backend, device, torch.bfloat16 if amp else torch.float32)
    if config.threads:
        torch.set_num_threads(config.threads)
    train_set, val_set = load_data(config)
    products = load_catalogue(config)
    if found:
        check_rows(config, found[1]["rows"], train_set, val_set, products)
        tokenizer = MODELS[config.model].config.prepare_tokenizer(load_tokenizer(found[0] / "tokenizer"))
    else:
        tokenizer = load_or_train_tokenizer(config, train_set, products)
    torch.manual_seed(config.seed)
    if found:
        kind = MODELS[config.model]
        model = kind.model(kind.config.from_dict(found[1]["settings"]["model"])).to(device)
    else:
        sizes = image_sizes(config, train_set)
        model = build_model(config, train_set.num_classes, tokenizer, *sizes).to(device)
    image_size = model.picture_size
    data = (train_set, val_set, products)
    task = TASKS[MODELS[config.model].task](config, tokenizer, image_size, model.config, *data, rank, world)
    given = [split for split in data if split is not None]
    about = {
        "settings": {"model": model.config.to_dict(), "training": config.to_dict(), "image_size": image_size},
        "rows": {name: digest(split) for name, split in zip(("data", "val", "products"), given, strict=False)},
        "facts": {"train_rows": len(train_set), "val_rows": len(val_set), "skipped": [s for split in given for s in split.skipped]},
    }
    training = Training(config, model, tokenizer, task, amp, rank, **about)
    if found:
        training.go_on_from(*found)
    if rank > 0:  # dropout of its own; the first rank's is the one that a checkpoint holds
        torch.manual_seed(torch_generator(config.seed, training.step, rank).initial_seed())
    return training


class Training:
    """The loop, and all that changes while it runs.

    ``settings`` rebuild the model, ``rows`` are the sums of the data, ``facts`` belong to the summary.
    """

    def __init__(self, config, model, tokenizer, task, amp: bool, rank: int, settings: dict, rows: dict, facts: dict):
        self.config, self.model, self.tokenizer, self.amp = config, model, tokenizer, amp
        self.task, self.batches, self.main = task, task.batches, rank == 0
        self.score = SCORE_OF_TASK[MODELS[config.model].task]
        self.settings = {"mmfused": mmfused.__version__, **settings}
        self.rows, self.facts = rows, facts
        self.out = Path(config.out)
        self.device = next(model.parameters()).device
        self.steps = config.steps or max(1, round(config.epochs * len(self.batches) / config.accumulate))
        self.val_every = config.val_every or max(1, math.ceil(self.steps / 10))
        self.save_every = config.save_every or self.val_every
        self.optimizer = make_optimizer(model, config)
        self.generators = {"drop": torch.Generator().manual_seed(config.seed)}
        self.step = 0
        self.saved: tuple[int, Path] | None = None  # step and folder of the newest checkpoint
        self.history = {"train": [], "val": []}
        self.metrics_bytes = 0
        self.seconds_before = 0.0  # of the processes that this one goes on from
        self.window = 0  # steps since the last record

    def go_on_from(self, path: Path, state: dict):
        """Raises ValueError where the checkpoint does not fit the model, or ``metrics.jsonl`` lacks records it had."""
        self.history = read_history(self.out / "metrics.jsonl", state["metrics_bytes"])
        checkpoints.restore(path, self.model, self.optimizer, self.generators)
        self.step, self.saved = state["step"], (state["step"], path)
        self.metrics_bytes, self.seconds_before = state["metrics_bytes"], state["seconds"]

    def run(self):
        """Up to the last step, or to a signal: then it saves a checkpoint and raises ``Stopped``."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.begun = self.since = time.perf_counter()
        title = f"{self.config.model} {self.config.backend}"
        shown = {"disable": not (self.config.progress and self.main), "unit": "step", "initial": self.step}
        with (
            open(self.out / "metrics.jsonl" if self.main else os.devnull, "ab") as self.log,
            tqdm(total=self.steps, desc=title, **shown) as self.bar,
            checkpoints.stop_on_signals() as stop,
        ):
            if self.main:
                self.log.truncate(self.metrics_bytes)  # steps after the checkpoint are made again
            self.loop(stop)

    def loop(self, stop: checkpoints.StopRequest):
        self.model.train()
        stream = self.batches.stream(self.step * self.config.accumulate)
        while True:
            stop_together(stop)
            # A signal does not wait for a validation; the run that goes on makes up for it here.
            if self.is_due(self.val_every) and self.validated_step() < self.step:
                self.validate(stop)
            if (self.is_due(self.save_every) or stop()) and (self.saved is None or self.saved[0] < self.step):
                self.save()
            if stop():
                raise checkpoints.Stopped(stop.signum, self.step, str(self.saved[1]))
            if self.step == self.steps:
                return
            self.advance(stream)

    def is_due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.steps)

    def validated_step(self) -> int:
        return self.history["val"][-1]["step"] if self.history["val"] else 0

    def advance(self, stream):
        """One step from the next batches of ``stream``; records it where that is due."""
        c = self.config
        rate = learning_rate(self.step, self.steps, c.lr, c.warmup)
        if isinstance(self.model, RetrievalModel):
            self.model.set_progress(self.step / self.steps)
        batches = map(self.hide, islice(stream, c.accumulate))
        loss, terms = update(self.model, self.optimizer, self.task, batches, c.accumulate, rate, c.clip, self.amp)
        self.step += 1
        self.window += 1
        if self.is_due(c.log_every):
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {float(loss)} at step {self.step}: lower lr ({c.lr}) or clip ({c.clip})")
            seconds = (time.perf_counter() - self.since) / self.window
            terms = {name: float(value) for name, value in terms.items()}
            self.record("train", {"step": self.step, "loss": float(loss), **terms, "lr": rate, "seconds": seconds})
            score = f", {self.score} {self.history['val'][-1][self.score]:.1%}" if self.history["val"] else ""
            self.bar.set_postfix_str(f"loss {loss:.3f}{score}, {seconds:.3f} s/step", refresh=False)
            self.restart_clock()
        self.bar.update()

    def hide(self, batch: dict) -> dict:
        c = self.config
        if c.modalities != "both" or c.drop_image + c.drop_text == 0:
            return batch
        hidden = partial(drop_modalities, generator=self.generators["drop"], tokenizer=self.tokenizer)
        return self.task.hide(batch, partial(hidden, image=c.drop_image, text=c.drop_text))

    def validate(self, stop):
        result = self.task.evaluate(self.model, self.amp, stop)
        if result is not None:
            self.record("val", {"step": self.step, **result})
        self.restart_clock()

    def save(self):
        """The records first: a checkpoint says how many bytes of them are its own, so they must be on the disk."""
        if not self.main:
            self.saved = self.step, self.out / "checkpoints"
            return
        os.fsync(self.log.fileno())
        epoch, batch = divmod(self.step * self.config.accumulate, len(self.batches))
        state = {
            "step": self.step,
            "next_batch": {"epoch": epoch, "batch": batch},
            "metrics_bytes": self.metrics_bytes,
            "seconds": self.seconds(),
            "rows": self.rows,
            "settings": self.settings,
        }
        parts = (self.model, self.optimizer, self.generators, self.tokenizer)
        self.saved = self.step, checkpoints.write(self.out / "checkpoints", state, *parts, self.config.keep)
        self.restart_clock()

    def record(self, kind: str, entry: dict):
        self.history[kind].append(entry)
        line = json.dumps(entry).encode() + b"\n"
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
            "step_seconds": statistics.median(record["seconds"] for record in training[1:] or training),
            "seconds": self.seconds(),
            "peak_memory": peak_memory(self.device),
        }


def read_history(path: Path, length: int) -> dict:
    """The records in the first ``length`` bytes of ``metrics.jsonl``, under "train" and "val"."""
    data = path.read_bytes() if path.is_file() else b""
    if len(data) < length:
        raise ValueError(
            f"resume: {path} holds {len(data)} bytes, but {length} at the checkpoint; put it back or overwrite the run"
        )
    records = [json.loads(line) for line in data[:length].splitlines()]
    return {"train": [r for r in records if "loss" in r], "val": [r for r in records if "loss" not in r]}


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share ``warmup`` of the ``steps``, then half a cosine to 0; ``step`` counts from 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - ramp) / max(1, steps - ramp)))


def update(model, optimizer, task, batches: Iterable[dict], count: int, rate: float, clip: float, amp: bool = False):
    """One optimiser step at learning rate ``rate`` from ``count`` batches, gradients averaged over ranks, then clipped to ``clip``.

    Returns what :func:`mmfused.gradients.add_gradients` does.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    result = task.gradients(model, batches, count, amp)
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return result


def drop_modalities(batch: dict, image: float, text: float, generator: torch.Generator, tokenizer) -> dict:
    """The batch with samples' image or text hidden, with these probabilities and never both, where a sample has both.

    A hidden text is what an empty one looks like: [CLS] [SEP].
    """
    rows = len(batch["labels"])
    draw = torch.rand(rows, generator=generator)
    whole = batch["image_present"] & (batch["attention_mask"].sum(1) > 2)
    no_image, no_text = whole & (draw < image), whole & (draw >= image) & (draw < image + text)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[no_text] = tokenizer.pad_token_id
    ids[no_text, 0], ids[no_text, 1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    mask[no_text, 2:] = 0
    pixels = batch["pixel_values"].masked_fill(no_image[:, None, None, None], 0.0)
    present = batch["image_present"] & ~no_image
    return {**batch, "pixel_values": pixels, "image_present": present, "input_ids": ids, "attention_mask": mask}


def make_optimizer(model, config):
    """AdamW; weights of norms and biases are not decayed."""
    groups = [{"params": [], "weight_decay": config.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim <= 1 or "norm" in name or name.endswith("bias")
        groups[kept]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
