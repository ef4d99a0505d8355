"""A trained model with everything needed to measure it: tokenizer, batches, device, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmfused import data as product_data
from mmfused.models import MODELS
from mmfused.training.datasets import load_folder
from mmfused.training.files import sha256
from mmfused.training.run_folder import load_saved, read_settings
from mmfused.training.setup import (
    VAL_BATCH_SIZE,
    check_backend,
    make_collate,
    make_val_batches,
    pick_device,
    use_amp,
)


class Trained:
    """A trained model in evaluation mode, on ``device``.

    Args:
        folder: of the run or checkpoint.
        model: the model.
        tokenizer: its tokenizer.
        settings: those saved in the folder.
        device: where it computes.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = device
        self.model: Any = model.to(device)
        self.name: str = settings["training"]["model"]
        self.task: str = MODELS[self.name].task
        self.amp: bool = use_amp(settings["training"].get("amp", "off"), device)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return sha256(self.folder / "model.safetensors")

    def must_retrieve(self, command: str) -> None:
        """Raise ValueError unless it is a retrieval model."""
        if self.task != "retrieval":
            raise ValueError(
                f"{command}: checkpoint: got {self.folder}, which holds {self.name}, a classifier, "
                "expected a retrieval model"
            )

    def batches(
        self,
        data: str,
        batch_size: int | None = None,
        text_column: str = "text",
        num_classes: int | None = None,
        name: str = "data",
    ) -> tuple[Any, product_data.Batches]:
        """Return the items of a folder, or of the generated validation set, and their batches.

        Args:
            data: the folder, or "generated".
            batch_size: None takes the one of training's validation.
            text_column: column of metadata.csv.
            num_classes: rows with a label that is not below it are skipped.
            name: the argument that named the folder, for errors.
        """
        size = self.model.picture_size
        if data == "generated":
            rows = product_data.GeneratedProducts("val")
        else:
            rows = load_folder(name, data, size, text_column, num_classes)
        max_length = self.settings["training"]["max_length"]
        collate = make_collate(self.tokenizer, size, max_length, self.model.config)
        return rows, make_val_batches(rows, collate, batch_size or VAL_BATCH_SIZE)


def load_trained(
    folder: str,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Trained:
    """Load the run or checkpoint in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is damaged, as :func:`mmfused.training.run_folder.load_run` describes, or
            backend or device are not available.
    """
    where = pick_device(device)
    settings = read_settings(Path(folder))
    model, tokenizer = load_saved(Path(folder), settings)
    trained = Trained(Path(folder), model, tokenizer, settings, where)
    check_backend(backend, where, torch.bfloat16 if trained.amp else torch.float32)
    if threads:
        torch.set_num_threads(threads)
    return trained
