"""The training loop: steps, validation, records and checkpoints."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mmfused.distributed import in_group
from mmfused.extras import from_extra
from mmfused.models import MODELS
from mmfused.models.lora import lora_of
from mmfused.models.retrieval import RetrievalModel
from mmfused.training import checkpoint as checkpoints
from mmfused.training.config import TrainConfig
from mmfused.training.folder_lock import Lock
from mmfused.training.gradients import average_gradients
from mmfused.training.metrics import peak_memory
from mmfused.training.optimizer import make_optimizer, set_rates
from mmfused.training.ranks import fail_together, stop_together
from mmfused.training.records import Records, check_history, is_due, read_history
from mmfused.training.resume import SCORES, Checkpoint
from mmfused.training.run_folder import SCORE_OF_TASK, check_complete, save_run
from mmfused.training.signals import Stopped, StopRequest, stop_on_signals
from mmfused.training.tasks import Task, drop_modalities

with from_extra("models"):
    from tqdm import tqdm

MAX_STEPS = 10**12


class Training:
    """The training loop and its state.

    Args:
        config: the settings.
        model: the model, on its device.
        tokenizer: the model's tokenizer, saved with the model.
        task: makes the batches, gradients and scores.
        amp: compute under bfloat16 autocast.
        rank: rank of this process.
        settings: saved in each checkpoint and in ``config.json``.
        data: the training, validation and product sets; None for a set that the run lacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: Any,
        task: Task,
        amp: bool,
        rank: int,
        settings: dict[str, Any],
        data: tuple[Any, ...],
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.batches: Any = task.batches
        self.amp = amp
        self.main: bool = rank == 0
        self.world: int = dist.get_world_size() if in_group() else 1
        self.settings = settings
        self.data: list[Any] = [split for split in data if split is not None]
        self.out: Path = Path(config.out)
        self.device: torch.device = next(model.parameters()).device
        self.steps: int = self._number_of_steps()
        self.val_every: int = config.val_every or max(1, math.ceil(self.steps / 10))
        self.save_every: int = config.save_every or self.val_every
        self.optimizer: torch.optim.AdamW = make_optimizer(model, config)
        self.generators: dict[str, torch.Generator] = {
            "drop": torch.Generator().manual_seed(config.seed)
        }
        self.records: Records = Records(self.out / "metrics.jsonl", self.main)
        self.step = 0
        self.pictures = 0  # of this rank since the last record
        # Step and folder of the newest checkpoint.
        self.saved: tuple[int, Path] | None = None
        # The lock on the folder, held by rank 0.
        self.lock: Lock | None = None
        # Training time of the earlier processes of a resumed run, in seconds.
        self.seconds_before = 0.0
        self.steps_since_record = 0

    def _number_of_steps(self) -> int:
        config = self.config
        from_epochs = round(config.epochs * len(self.batches) / config.accumulate)
        steps = config.steps or max(1, from_epochs)
        if steps > MAX_STEPS:
            raise ValueError(
                f"epochs: got {config.epochs}, which make {steps} steps, "
                f"expected at most {MAX_STEPS} steps"
            )
        return steps

    def restore(self, found: Checkpoint) -> None:
        """Load the checkpoint ``found`` and the records up to its step.

        Raises:
            ValueError: the checkpoint does not fit the run, or ``metrics.jsonl`` lacks records.
        """
        path, state = found
        if state["step"] > self.steps:
            raise ValueError(
                f"resume: {path}: got step {state['step']}, expected at most {self.steps}, "
                "the last step of the run"
            )
        records = self.records
        scores = SCORES[MODELS[self.config.model].task]
        records.history = read_history(records.path, state["metrics_bytes"], scores)
        records.size = state["metrics_bytes"]
        check_history(
            records.history,
            state["step"],
            self.steps,
            self.config.log_every,
            self.val_every,
            records.path,
        )
        checkpoints.load_state(path, self.model, self.optimizer, self.generators)
        self.step = state["step"]
        self.saved = (state["step"], path)
        self.seconds_before: float = state["seconds"]

    def shared(self) -> dict[str, Any]:
        """Return the values that must be equal on all ranks."""
        rows = {f"{name}'s rows": digest for name, digest in self.settings["rows"].items()}
        return {**rows, "steps": self.steps, "step": self.step, "batches": len(self.batches)}

    def run(self) -> dict[str, Any]:
        """Train up to the last step, write the result and return the summary.

        Raises:
            Stopped: a signal came, and a checkpoint was saved.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.begun: float = time.perf_counter()
        self.since: float = self.begun
        progress = tqdm(
            total=self.steps,
            desc=f"{self.config.model} {self.config.backend}",
            disable=not (self.config.progress and self.main),
            unit="step",
            initial=self.step,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; few lines in a log file
        )
        try:
            with fail_together():
                self.records.open()
            with progress as bar, stop_on_signals() as stop:
                self.bar: Any = bar
                self.loop(stop)
            with fail_together():
                return self.finish()
        finally:
            self.records.close()

    def loop(self, stop: StopRequest) -> None:
        """Make the remaining steps, and validate and save when due."""
        self.model.train()
        # `Batches.stream` for a classifier, `PairBatches.stream` for a retrieval model.
        stream = self.batches.stream(self.step * self.config.accumulate)
        while True:
            signum = stop_together(stop)
            # A validation that a signal interrupted is repeated here after resuming.
            if self.is_due(self.val_every) and self.validated_step() < self.step:
                with fail_together():
                    self.validate(stop)
                signum = stop_together(stop)
            with fail_together():
                if (self.is_due(self.save_every) or signum) and not self.is_saved():
                    self.save()
            if signum:
                assert self.saved is not None
                raise Stopped(signum, self.step, str(self.saved[1]))
            if self.step == self.steps:
                return
            loss, terms, rates = self.advance(stream)
            with fail_together():
                self.report(loss, terms, rates)

    def is_due(self, every: int) -> bool:
        """Return whether an action that runs every ``every`` steps, and at the end, is due now."""
        return is_due(self.step, every, self.steps)

    def validated_step(self) -> int:
        """Return the step of the newest validation."""
        last = self.records.last_val
        return last["step"] if last else 0

    def is_saved(self) -> bool:
        """Return whether this step has a checkpoint."""
        if self.saved is None or self.saved[0] != self.step:
            return False
        return self.saved[1].is_dir() or not self.main

    def advance(
        self,
        stream: Iterator[dict[str, Any]],
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Make one step from the next batches; return the loss, its terms and the learning rates.

        The learning rates are by the names of their settings.
        """
        config = self.config
        rates = set_rates(self.optimizer, config, self.step, self.steps)
        if isinstance(self.model, RetrievalModel):
            self.model.set_progress(self.step / self.steps)
        count = config.accumulate
        batches = map(self.drop, self.counted(islice(stream, count)))
        loss, terms = update(
            self.model, self.optimizer, self.task, batches, count, config.clip, self.amp
        )
        self.step += 1
        self.steps_since_record += 1
        return loss, terms, rates

    def counted(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches, and count their pictures for the progress bar."""
        for batch in batches:
            self.pictures += count_pictures(batch)
            yield batch

    def drop(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Hide some images and texts of a batch, with the probabilities in the settings."""
        config = self.config
        if config.modalities != "both" or config.drop_image + config.drop_text == 0:
            return batch
        drop = partial(
            drop_modalities,
            image=config.drop_image,
            text=config.drop_text,
            generator=self.generators["drop"],
            tokenizer=self.tokenizer,
        )
        return self.task.map_items(batch, drop)

    def report(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        rates: dict[str, float],
    ) -> None:
        """Record the step if a record is due, and update the progress bar.

        Raises:
            RuntimeError: a record is due and the loss is not finite.
        """
        config = self.config
        if self.is_due(config.log_every):
            value = float(loss)
            if not math.isfinite(value):
                raise RuntimeError(
                    f"the loss is {value} at step {self.step}: "
                    f"lower lr ({config.lr}) or clip ({config.clip})"
                )
            elapsed = time.perf_counter() - self.since
            seconds = elapsed / self.steps_since_record
            numbers = {name: float(term) for name, term in terms.items()}
            record = {"step": self.step, "loss": value, **numbers, **rates, "seconds": seconds}
            self.records.add("train", record)
            # All ranks have equal shares of a batch.
            speed = self.world * self.pictures / elapsed
            text = f"loss {value:.3f}{self._shown_score()}, {seconds:.3f} s/step"
            self.bar.set_postfix_str(f"{text}, {speed:.4g} pictures/s", refresh=False)
            self.restart_clock()
        self.bar.update()

    def _shown_score(self) -> str:
        score = SCORE_OF_TASK[MODELS[self.config.model].task]
        last = self.records.last_val
        return f", {score} {last[score]:.1%}" if last else ""

    def validate(self, stop: StopRequest) -> None:
        """Record the scores of the validation set, unless ``stop`` interrupts the validation."""
        result = self.task.evaluate(self.model, self.amp, stop)
        if result is not None:
            self.records.add("val", {"step": self.step, **result})
        self.restart_clock()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        folder = self.out / "checkpoints"
        if not self.main:
            self.saved = (self.step, folder)
            return
        self.restore_folder()
        # The records are flushed first, because the checkpoint contains the size of their file.
        self.records.sync()
        epoch, batch = divmod(self.step * self.config.accumulate, len(self.batches))
        state = {
            "step": self.step,
            "next_batch": {"epoch": epoch, "batch": batch},
            "metrics_bytes": self.records.size,
            "seconds": self.seconds(),
            "settings": self.settings,
        }
        path = checkpoints.write(
            folder,
            state,
            self.model,
            self.optimizer,
            self.generators,
            self.tokenizer,
            self.config.keep,
        )
        self.saved = (self.step, path)
        self.restart_clock()

    def restore_folder(self) -> None:
        """Create the folder, its marker and ``metrics.jsonl`` again if they have been removed.

        Raises:
            FileExistsError: another process has locked the folder, or ``metrics.jsonl`` has been
                replaced.
        """
        assert self.lock is not None
        if not self.lock.is_in_place():
            self.lock.take()
        self.records.write_again()

    def restart_clock(self) -> None:
        """Restart the measurement of the time per step."""
        self.since: float = time.perf_counter()
        self.steps_since_record: int = 0
        self.pictures: int = 0

    def seconds(self) -> float:
        """Return the training time in seconds, including the time of earlier processes."""
        return self.seconds_before + time.perf_counter() - self.begun

    def finish(self) -> dict[str, Any]:
        """Write the result and return the summary."""
        summary = self.summary()
        if self.main:
            self.restore_folder()
            history = self.records.history
            save_run(self.out, self.settings, self.model, self.tokenizer, summary, history)
            check_complete(self.out, self.records.size, lora_of(self.model) is not None)
        return summary

    def summary(self) -> dict[str, Any]:
        """Return the contents of ``summary.json``."""
        config = self.config
        train_records = self.records.history["train"]
        last_val = self.records.history["val"][-1]
        # The first record includes one-time costs such as compilation.
        timed = train_records[1:] or train_records
        return {
            "model": config.model,
            "backend": config.backend,
            "device": str(self.device),
            "amp": "bf16" if self.amp else "off",
            "modalities": config.modalities,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train_rows": len(self.data[0]),
            "val_rows": len(self.data[1]),
            "skipped": [row for split in self.data for row in split.skipped],
            # Pictures that could not be decoded when a batch needed them.
            "unreadable": [row for split in self.data for row in getattr(split, "lost", ())],
            "steps": self.steps,
            "train_loss": train_records[-1]["loss"],
            **{name: value for name, value in last_val.items() if name != "step"},
            "step_seconds": statistics.median(record["seconds"] for record in timed),
            "seconds": self.seconds(),
            "peak_memory": peak_memory(self.device),
        }


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    task: Task,
    batches: Iterable[dict[str, Any]],
    count: int,
    clip: float,
    amp: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Make one optimizer step; return the mean loss of the batches, and its mean terms by name.

    Gradients are averaged over ranks, then clipped.

    Args:
        model: the model to train.
        optimizer: the model's optimizer.
        task: computes the gradients.
        batches: the batches of this step.
        count: number of batches.
        clip: largest norm of the gradient of all parameters.
        amp: compute under bfloat16 autocast.
    """
    optimizer.zero_grad(set_to_none=True)
    result = task.gradients(model, batches, count, amp)
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return result


def count_pictures(batch: dict[str, Any]) -> int:
    """Return the number of pictures in a batch, of all roles of a batch of pairs."""
    if "image_present" in batch:
        return int(batch["image_present"].sum())
    if "image_grid_thw" in batch:  # of UNITE: one row per picture
        return len(batch["image_grid_thw"])
    return sum(count_pictures(items) for items in batch.values() if isinstance(items, dict))
