"""Training on product data: one loop, used by ``mmfused train`` and ``mmfused demo``.

A run is a folder: ``metrics.jsonl`` grows while training; ``model.safetensors``, ``config.json``, ``tokenizer/``,
``summary.json`` and ``curves.png`` are there, whole, when it ends. ``load_run`` reads it back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

import mmfused
from mmfused import data as product_data
from mmfused.models.fluid import FLUID, FLUIDConfig
from mmfused.run_folder import check_out, clear_out, save_run

MODALITIES = ("both", "image", "text")
logger = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """What one run needs; ``out`` is its folder. Lengths of training: ``steps``, or else ``epochs``."""

    out: str
    data: str = "generated"
    val: str | None = None
    model: str = "fluid"
    preset: str = "tiny"
    model_options: dict = field(default_factory=dict)
    backend: str = "auto"
    modalities: str = "both"
    steps: int | None = None
    epochs: float = 60
    batch_size: int = 64
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    augment: bool | None = None
    swap_text: float = 0.0
    drop_image: float = 0.0
    drop_text: float = 0.0
    image_size: int | None = None
    patch_size: int | None = None
    max_length: int = 64
    vocab_size: int = 2000
    tokenizer: str | None = None
    threads: int | None = None
    device: str = "auto"
    log_every: int = 1
    val_every: int | None = None
    progress: bool = True
    overwrite: bool = False

    def __post_init__(self):
        if self.model != "fluid":
            raise ValueError(f"model: got {self.model!r}, takes 'fluid'")
        if self.modalities not in MODALITIES:
            raise ValueError(f"modalities: got {self.modalities!r}, takes one of {', '.join(MODALITIES)}")
        for name in (
            "steps",
            "epochs",
            "batch_size",
            "lr",
            "clip",
            "image_size",
            "patch_size",
            "threads",
            "log_every",
            "val_every",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, takes a number above 0")
        for name in ("swap_text", "drop_image", "drop_text", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a fraction from 0 to 1")
        if self.drop_image + self.drop_text > 1:
            raise ValueError(f"drop_image and drop_text: got {self.drop_image} and {self.drop_text}, take a sum of at most 1")


def train(config: TrainConfig) -> dict:
    """Trains the model of ``config`` and returns the summary that is also written to ``summary.json``.

    Raises ValueError for unusable data or a backend that cannot run, FileNotFoundError for a missing data folder, and
    FileExistsError where ``out`` holds another run and ``overwrite`` is False: all before a file is touched.
    """
    out = Path(config.out)
    check_out(out, config.overwrite)
    device = pick_device(config.device)
    check_backend(config.backend, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    train_set, val_set = load_data(config)
    tokenizer = load_or_train_tokenizer(config, train_set)
    image_size, patch_size = image_sizes(config, train_set)
    batches, val_batches = make_batches(config, train_set, val_set, tokenizer, image_size)
    torch.manual_seed(config.seed)
    model = build_model(config, train_set.num_classes, len(tokenizer), image_size, patch_size).to(device)

    clear_out(out)
    steps = config.steps or max(1, round(config.epochs * len(batches)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with mmfused.backend(config.backend), open(out / "metrics.jsonl", "w", encoding="utf-8") as log:
        history = run_steps(config, model, batches, val_batches, steps, tokenizer, log)
    last = history["val"][-1]
    summary = {
        "model": config.model,
        "backend": config.backend,
        "device": str(device),
        "modalities": config.modalities,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_rows": len(train_set),
        "val_rows": len(val_set),
        "skipped": [*train_set.skipped, *val_set.skipped],
        "steps": steps,
        "train_loss": history["train"][-1]["loss"],
        "val_loss": last["val_loss"],
        "accuracy": last["accuracy"],
        "macro_f1": last["macro_f1"],
        "step_seconds": statistics.median(record["seconds"] for record in history["train"][1:] or history["train"]),
        "seconds": time.perf_counter() - start,
        "peak_memory": peak_memory(device),
    }
    save_run(out, config, model, tokenizer, summary, history)
    return summary


def load_run(folder: str | os.PathLike):
    """``(model, tokenizer)`` of the run in ``folder``, the model on the CPU in evaluation mode.

    Raises FileNotFoundError where ``folder`` holds no finished run.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished run: config.json is missing")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = FLUID(FLUIDConfig.from_dict(settings["model"]))
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval(), product_data.load_tokenizer(folder / "tokenizer")


@torch.no_grad()
def evaluate(model, batches) -> dict:
    """Mean loss, accuracy and macro F1 of ``model`` over ``batches``, in evaluation mode."""
    was_training = model.training
    model.eval()
    losses, predictions, labels = [], [], []
    for batch in batches:
        output = model(**model_inputs(model, batch))
        losses.append(output.loss.double() * len(batch["labels"]))
        predictions.append(output.logits.argmax(-1).cpu())
        labels.append(batch["labels"])
    model.train(was_training)
    predictions, labels = torch.cat(predictions), torch.cat(labels)
    return {
        "val_loss": float(sum(losses)) / len(labels),
        "accuracy": float((predictions == labels).double().mean()),
        "macro_f1": macro_f1(predictions, labels),
    }


def macro_f1(predictions, labels) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in predictions or labels, (N,) int64 each."""
    size = int(max(predictions.max(), labels.max())) + 1
    hits = torch.bincount(labels[predictions == labels], minlength=size).double()
    total = torch.bincount(labels, minlength=size) + torch.bincount(predictions, minlength=size)
    occurs = total > 0
    return float((2 * hits[occurs] / total[occurs]).mean())


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share ``warmup`` of the ``steps``, then half a cosine to 0; ``step`` counts from 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - ramp) / max(1, steps - ramp)))


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


def run_steps(config, model, batches, val_batches, steps, tokenizer, log) -> dict:
    """Trains for ``steps`` optimiser steps; writes every record to ``log``, returns them under "train" and "val"."""
    optimizer = make_optimizer(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    val_every = config.val_every or max(1, math.ceil(steps / 10))
    history = {"train": [], "val": []}

    def record(kind, entry):
        history[kind].append(entry)
        log.write(json.dumps(entry) + "\n")
        log.flush()

    model.train()
    bar = tqdm(total=steps, desc=f"{config.model} {config.backend}", disable=not config.progress, unit="step")
    stream, since, window = endless(batches), time.perf_counter(), 0
    for step in range(1, steps + 1):
        batch = next(stream)
        if config.modalities == "both" and config.drop_image + config.drop_text > 0:
            batch = drop_modalities(batch, config.drop_image, config.drop_text, generator, tokenizer)
        rate = learning_rate(step - 1, steps, config.lr, config.warmup)
        output = update(model, optimizer, batch, rate, config.clip)
        window += 1
        if step % config.log_every == 0 or step == steps:
            loss = float(output.loss.detach())
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {step}: lower lr ({config.lr}) or clip ({config.clip})")
            terms = {name: float(value.detach()) for name, value in output.losses.items()}
            seconds = (time.perf_counter() - since) / window
            record("train", {"step": step, "loss": loss, **terms, "lr": rate, "seconds": seconds})
            accuracy = f", acc {history['val'][-1]['accuracy']:.1%}" if history["val"] else ""
            bar.set_postfix_str(f"loss {loss:.3f}{accuracy}, {seconds:.3f} s/step", refresh=False)
            since, window = time.perf_counter(), 0
        bar.update()
        if step % val_every == 0 or step == steps:
            record("val", {"step": step, **evaluate(model, val_batches)})
            since, window = time.perf_counter(), 0
    bar.close()
    return history


def update(model, optimizer, batch, rate, clip):
    """One optimiser step at learning rate ``rate``, gradients clipped to norm ``clip``; returns the model's output."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    output = model(**model_inputs(model, batch))
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return output


def endless(batches):
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        yield from batches
        epoch += 1


def model_inputs(model, batch) -> dict:
    """The part of ``batch`` that the model's modalities need, on the model's device."""
    names = {"image": ("pixel_values", "image_present"), "text": ("input_ids", "attention_mask")}
    wanted = [key for kind, keys in names.items() if model.config.modalities in (kind, "both") for key in keys]
    device = next(model.parameters()).device
    return {key: batch[key].to(device, non_blocking=True) for key in (*wanted, "labels")}


def make_optimizer(model, config):
    """AdamW; weights of norms and biases are not decayed."""
    groups = [{"params": [], "weight_decay": config.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        kept = parameter.ndim <= 1 or "norm" in name or name.endswith("bias")
        groups[kept]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, and torch sees no CUDA device here")
    return device


def check_backend(name: str, device: torch.device):
    if name not in mmfused.library.BACKENDS:
        raise ValueError(f"backend: got {name!r}, takes one of {', '.join(mmfused.library.BACKENDS)}")
    reasons = mmfused.library.why_not_fused(device, torch.float32) if name == "fused" else []
    if reasons:
        raise ValueError(f"backend: 'fused' cannot run on {device}: {'; '.join(reasons)}")


def load_data(config):
    """The training and the validation set, each with its own draw of swapped texts."""
    if config.data == "generated":
        train_set, val_set = product_data.GeneratedProducts("train"), product_data.GeneratedProducts("val")
    elif config.val is None:
        raise ValueError("val: got nothing, takes a folder with images and metadata.csv to validate on")
    else:
        train_set, val_set = product_data.ProductFolder(config.data), product_data.ProductFolder(config.val)
    for name, split in (("data", train_set), ("val", val_set)):
        if len(split) == 0:
            raise ValueError(f"{name}: {getattr(config, name)} holds no usable row, takes at least one")
        warn_of_skipped(name, split)
    if val_set.num_classes > train_set.num_classes:
        known = f"the labels 0 to {train_set.num_classes - 1} of the training data"
        raise ValueError(f"val: label {val_set.num_classes - 1} is out of range, takes {known}")
    if config.swap_text:
        train_set = product_data.swap_texts(train_set, config.swap_text, seed=2 * config.seed)
        val_set = product_data.swap_texts(val_set, config.swap_text, seed=2 * config.seed + 1)
    return train_set, val_set


def warn_of_skipped(name: str, split, most: int = 5):
    if split.skipped:
        more = [f"and {len(split.skipped) - most} more"] if len(split.skipped) > most else []
        logger.warning("%s: %d rows skipped\n  %s", name, len(split.skipped), "\n  ".join(split.skipped[:most] + more))


def load_or_train_tokenizer(config, train_set):
    if config.tokenizer:
        return product_data.load_tokenizer(config.tokenizer)
    return product_data.train_tokenizer([text for text in train_set.texts if text], vocab_size=config.vocab_size)


def image_sizes(config, train_set) -> tuple[int, int]:
    """Sides of pictures and patches; unless given, the stored size up to 96, and patches of 8 up to 32, of 16 above."""
    pictures = (item["image"] for item in map(train_set.__getitem__, range(len(train_set))) if item["image_present"])
    side = config.image_size or min(96, *next(pictures, torch.empty(3, 32, 32)).shape[1:])
    patch = config.patch_size or (8 if side <= 32 else 16)
    if side < patch or (config.image_size and side % patch):
        raise ValueError(f"image_size: got {side}, takes a multiple of patch_size = {patch}")
    return side - side % patch, patch


def make_batches(config, train_set, val_set, tokenizer, size):
    # The generated set's colours mean something, and its pictures are new enough; photos need every variation.
    augment = config.data != "generated" if config.augment is None else config.augment
    collate = product_data.Collate(
        tokenizer, size, config.max_length, augment=augment and config.modalities != "text", seed=config.seed
    )
    val_collate = product_data.Collate(tokenizer, size, config.max_length)
    batch_size = min(config.batch_size, len(train_set))
    batches = product_data.Batches(train_set, collate, batch_size, shuffle=True, seed=config.seed, drop_last=True)
    val_batches = product_data.Batches(val_set, val_collate, 256, shuffle=False, seed=0, drop_last=False)
    return batches, val_batches


def build_model(config, num_classes, vocab_size, image_size, patch_size):
    sizes = {"vocab_size": vocab_size, "image_size": image_size, "patch_size": patch_size}
    options = {"modalities": config.modalities, **config.model_options}
    return FLUID(FLUIDConfig.preset(config.preset, num_classes=num_classes, **sizes, **options))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the CUDA allocator held, or on the CPU the most resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
